"""`fovlm look --live`: a camera's frames and where the model looks, in the terminal.

Frames are drawn with half blocks, two pixels per character; where the output is not a terminal, each frame is a line.
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
from fovlm.viz.gaze import QUESTION
from fovlm.viz.heatmap import draw_heatmap, entropy, maps

ASK_EVERY = 10  # frames between two answers to the same question
SIDE = 44  # pixels of a drawn frame's side, at most


def watch(
    model: Any, processor: Any, source: str, questions: list[str], fps: float = 1.0, max_new_tokens: int = 40
) -> int:
    """Watch until Ctrl-C, or until the end of a file played as a camera -> the number of frames.

    `source` as in `tolerant.camera`. Each question is answered every ASK_EVERY frames. When the context is full, the
    oldest frames are dropped. Raises UserError if there is no such camera, or nothing in it decodes.
    """
    if len(questions) > 1 and model.config.question == "before_frames":
        raise UserError("this model was trained with one question before the frames: give one")
    stream = model.stream(processor=processor, question=questions[0] if questions else QUESTION, full="slide")
    console = Console()
    answers: dict[str, str] = {}
    frames = camera(source, model.config.frame_size, fps)
    try:
        with Live(console=console, auto_refresh=False, transient=True) as live:
            for frame in frames:
                start = time.perf_counter()
                stream.see(frame)
                weights = stream.weights().cpu()
                seconds = time.perf_counter() - start
                facts = f"attention entropy {float(entropy(weights).mean()):.2f}, {stream.tokens} tokens in the cache"
                line = f"frame {stream.seen}, {facts}, {seconds:.2f} s"
                asked = questions if stream.seen % ASK_EVERY == 1 else []
                answers |= {q: stream.ask(q, max_new_tokens=max_new_tokens).strip() for q in asked}
                if console.is_terminal:
                    text = "\n".join([line, *(f"{q}  {a}" for q, a in answers.items())])
                    side = min(SIDE, (console.width - 2) // 2, 2 * (console.height - 4 - 2 * len(answers)))
                    live.update(Group(pictures(frame, weights, max(side, 8)), Text(text)), refresh=True)
                else:
                    print(line, *(f"{q}  {answers[q]}" for q in asked), sep="\n", flush=True)
        if not stream.seen:
            raise UserError(f"{source}: nothing in it decodes")
    except SampleError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        pass
    print(f"{stream.seen} frames seen, {stream.tokens} tokens in the cache ({stream.nbytes / 2**20:.1f} MB)")
    return stream.seen


def pictures(frame: Tensor, weights: Tensor, side: int) -> Columns:
    """The frame u8 [3, s, s] and, beside it, its heat map (mean over layers and heads)."""
    small = nnf.interpolate(frame[None].float(), (side, side), mode="area").to(torch.uint8)
    return Columns([blocks(small[0].permute(1, 2, 0).numpy()), blocks(draw_heatmap(small, maps(weights))[0])])


def blocks(pixels: np.ndarray) -> Text:
    """u8 [h, w, 3] -> h / 2 lines of w half blocks, with the upper pixel as foreground and the lower as background."""
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2]):
        line = Text()
        for (r, g, b), (R, G, B) in zip(upper.tolist(), lower.tolist()):
            line.append("▀", f"rgb({r},{g},{b}) on rgb({R},{G},{B})")
        lines.append(line)
    return Text("\n").join(lines)
