"""One HTML file that shows a gaze, or two side by side, without network or other files.

It holds frames as JPEGs and weights as one byte per patch. `page.html` is the page, `page.js` its script. Questions and
answers are untrusted: they reach the page as JSON without a `<`, are shown as text, and only this script may run (by
its hash).
"""

import base64
import hashlib
import json
import math
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

from fovlm.errors import UserError
from fovlm.fileio import write_atomically
from fovlm.media import encode
from fovlm.model.modes import MODE_NOTES
from fovlm.viz.gaze import Gaze
from fovlm.viz.heatmap import DARKEN, STOPS, entropy

QUALITY = 85  # of the JPEGs


def write_page(gazes: list[Gaze], path: str | Path) -> Path:
    """Write the page of one gaze, or of two at the same clip, and return its path. Raises UserError otherwise."""
    first = gazes[0]
    if len(gazes) > 2:
        raise UserError(f"{len(gazes)} gazes: a page shows one or two")
    for other in gazes[1:]:
        same = first.frames.shape == other.frames.shape and torch.equal(first.frames, other.frames)
        if not same or first.weights["coarse"].shape != other.weights["coarse"].shape:
            raise UserError("two gazes on one page need the same clip, and models of the same shape")
    pieces = files("fovlm.viz")
    script = pieces.joinpath("page.js").read_text(encoding="utf-8")
    parts = {
        "HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "DATA": json.dumps(_data(gazes), separators=(",", ":")).replace("<", "\\u003c"),
        "SCRIPT": script,
    }
    page = Template(pieces.joinpath("page.html").read_text(encoding="utf-8"))
    write_atomically(Path(path), page.substitute(parts))
    return Path(path)


def _data(gazes: list[Gaze]) -> dict[str, Any]:
    first = gazes[0]
    layers, K, H, N = first.weights["coarse"].shape
    frames, frame_of_look = [], []  # a picture with several looks is stored once
    for k, frame in enumerate(first.frames):
        if not k or not torch.equal(frame, first.frames[k - 1]):
            jpeg = encode.encode_jpeg(frame.permute(1, 2, 0).numpy(), QUALITY)
            frames.append("data:image/jpeg;base64," + base64.b64encode(jpeg).decode())
        frame_of_look.append(len(frames) - 1)
    still = len(set(first.seconds)) < K  # looks at one picture share its time; equal frames of a video do not
    shown = f"{K} looks at {len(frames)} picture{'s'[: len(frames) != 1]}" if still else f"{K} frame{'s'[: K != 1]}"
    models = " and ".join(dict.fromkeys(gaze.model for gaze in gazes))
    facts = [first.clip, shown, f"model {models}", MODE_NOTES[first.mode], f"{layers} layers, {H} heads"]
    return {
        "about": " · ".join(facts),
        "K": K,
        "H": H,
        "layers": layers,
        "side": math.isqrt(N),  # the rows of a frame are a square of patches and a few other tokens
        "stops": STOPS,
        "darken": DARKEN,
        "frames": frames,
        "frame_of_look": frame_of_look,
        "times": [f"look {k + 1}" if still else clock(second) for k, second in enumerate(first.seconds)],
        "coarse": _weights(first.weights["coarse"]),
        "gazes": [
            {
                "question": gaze.question,
                "answer": gaze.answer,
                "fine": _weights(gaze.weights["fine"]) if "fine" in gaze.weights else None,
                "tokens": [[token.kind, token.text, token.look] for token in gaze.tokens],
            }
            for gaze in gazes
        ],
    }


def _weights(weights: np.ndarray) -> dict[str, Any]:
    """[layers, K, H, N] -> the patches as u8; of each layer, look and head the weight of 255, CLS and entropy."""
    n = math.isqrt(weights.shape[-1]) ** 2  # patches; CLS and registers come before them
    patches = weights[..., -n:].astype(np.float32)
    most = patches.max(-1).clip(1e-12)
    return {
        "u8": base64.b64encode((patches / most[..., None] * 255).round().astype(np.uint8).tobytes()).decode(),
        "most": base64.b64encode(most.astype("<f4").tobytes()).decode(),
        "cls": [round(float(x), 4) for x in weights[..., :-n].sum(-1).flat],
        "entropy": [round(float(x), 3) for x in entropy(weights).flatten()],
    }


def clock(seconds: float) -> str:
    """75.5 -> `1:15.5`."""
    minutes, rest = divmod(round(seconds, 2), 60)
    return f"{int(minutes)}:{rest:05.2f}".rstrip("0").rstrip(".") if rest % 1 else f"{int(minutes)}:{int(rest):02d}"
