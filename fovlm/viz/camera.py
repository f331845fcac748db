"""`fovlm look --live`: what a camera sees and where the model looks, in the terminal, with one token kept a frame.

A picture is drawn with half blocks, two pixels a character. Where the output is no terminal each frame is a line.
"""

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from torch import Tensor

from fovlm.errors import SampleError, UserError
from fovlm.media.tolerant import camera
from fovlm.viz.gaze import ANYTHING
from fovlm.viz.heatmap import draw_heatmap, entropy, maps

ASK_EVERY = 10  # frames between two answers to the same question
SIDE = 44  # pixels of a drawn picture's side, at most


def watch(
    model: Any, processor: Any, source: str, questions: list[str], fps: float = 1.0, max_new_tokens: int = 40
) -> int:
    """Watch until Ctrl-C, or until a file that stands in for a camera ends -> how many frames were seen.

    `source` as in `footage.camera`. Each question is answered every ASK_EVERY frames. When the context is full, the
    oldest frames are forgotten. Raises UserError when there is no such camera, or nothing to see.
    """
    if len(questions) > 1 and model.config.question == "before_frames":
        raise UserError("this model was trained with one question ahead of the frames: give one")
    ahead = questions[0] if questions else ANYTHING
    stream = model.stream(processor=processor, question=ahead, full="slide")
    console = Console()
    answers: dict[str, str] = {}
    frames = camera(source, model.config.frame_size, fps)
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for frame in frames:
                begun = time.perf_counter()
                stream.see(frame)
                weights = stream.weights().cpu()
                took = time.perf_counter() - begun
                spread = float(entropy(weights).mean())
                line = (
                    f"frame {stream.seen}, attention {spread:.2f} of uniform, {stream.tokens} tokens kept, {took:.2f} s"
                )
                asked = questions if stream.seen % ASK_EVERY == 1 else []
                answers |= {q: stream.ask(q, max_new_tokens=max_new_tokens).strip() for q in asked}
                if console.is_terminal:
                    said = "\n".join([line, *(f"{q}  {a}" for q, a in answers.items())])
                    side = min(SIDE, (console.width - 2) // 2, 2 * (console.height - 4 - 2 * len(answers)))
                    live.update(Group(pictures(frame, weights, max(side, 8)), Text(said)), refresh=True)
                else:
                    print(line, *(f"{q}  {answers[q]}" for q in asked), sep="\n", flush=True)
        if not stream.seen:
            raise UserError(f"{source}: nothing in it decodes")
    except SampleError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        pass
    print(f"{stream.seen} frames seen, {stream.tokens} tokens kept ({stream.nbytes / 2**20:.1f} MB)")
    return stream.seen


def pictures(frame: Tensor, weights: Tensor, side: int) -> Columns:
    """The frame u8 [3, s, s] and, beside it, where the look goes (the mean over layers and heads)."""
    small = nnf.interpolate(frame[None].float(), (side, side), mode="area").to(torch.uint8)
    painted = draw_heatmap(small, maps(weights))[0]
    return Columns([blocks(small[0].permute(1, 2, 0).numpy()), blocks(painted)])


def blocks(pixels: np.ndarray) -> Text:
    """u8 [h, w, 3] -> h / 2 lines of w half blocks, the upper pixel as their colour and the lower as the ground."""
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2]):
        line = Text()
        for (r, g, b), (R, G, B) in zip(upper.tolist(), lower.tolist()):
            line.append("▀", f"rgb({r},{g},{b}) on rgb({R},{G},{B})")
        lines.append(line)
    return Text("\n").join(lines)
