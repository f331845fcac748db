"""Contact sheets of heat maps for papers, and the raw attention weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill, shorten
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from fovlm.errors import UserError
from fovlm.media import decode
from fovlm.viz.gaze import Gaze
from fovlm.viz.heatmap import draw_heatmap, maps, tile
from fovlm.viz.html import clock

COLUMNS = 8
MOST = 24  # looks on a sheet, evenly spaced
LETTERS = 15  # characters of a title per inch
TITLE_LINES = 3  # of a contact sheet, at most
SIDE = (112, 224)  # pixels of a drawn frame: at least, at most
GAP = 4  # pixels between two frames
LEFT, RIGHT = 0.25, 0.08  # inches beside a strip; the names of its rows are at the left
LINE = 0.18  # inches of a line of text
AXES = (
    "coarse, fine f16 [layers, looks, heads, 1 + patches]: attention weights, CLS first, then the patches by row; "
    "entropy_* f32 [looks]: mean over layers and heads, relative to the maximum; "
    "frames u8 [looks, 3, height, width]; seconds f64 [looks]"
)


@dataclass
class Strip:
    """Frames u8 [k, 3, s, s] and their maps [k, side, side] by name: a row of frames for each name."""

    frames: Tensor
    maps: Mapping[str, Tensor]
    title: str = ""
    labels: Sequence[str] = ()  # one above each frame

    def draw(self, side: int) -> np.ndarray:
        """u8 [h, w, 3], with frames of `side` pixels."""
        return tile(np.stack([draw_heatmap(self.frames, grid, side) for grid in self.maps.values()]), GAP, 255)


def draw_sheet(
    strips: Sequence[Strip], path: Path, title: str = "", columns: int = 1, width: float = 11, dpi: int = 150
) -> None:
    """Write strips with the same names, in `columns`, to a PNG or PDF of `width` inches."""
    side = max(min(strips[0].frames.shape[-1], SIDE[1]), SIDE[0])
    names = list(strips[0].maps)
    longest = max(len(strip.frames) for strip in strips)
    w, h = longest * (side + GAP) - GAP, len(names) * (side + GAP) - GAP
    rows = -(-len(strips) // columns)
    wide = width / columns - LEFT - RIGHT  # inches of a strip
    titles = [fill(strip.title, int(LETTERS * wide)) for strip in strips]
    title = fill(title, int(LETTERS * width))
    above = LINE * (max(len(t.splitlines()) for t in titles) + any(strip.labels for strip in strips))
    top = LINE * (len(title.splitlines()) + 0.5) if title else RIGHT
    high = wide * h / w
    height = rows * (high + above) + top + RIGHT
    figure = Figure((width, height))
    for number, strip in enumerate(strips):
        row, column = divmod(number, columns)
        left, bottom = column / columns + LEFT / width, 1 - (top + (row + 1) * (high + above)) / height
        axis = figure.add_axes((left, bottom, wide / width, high / height))
        axis.axis("off")
        axis.imshow(strip.draw(side), interpolation="antialiased")
        axis.set(xlim=(0, w), ylim=(h, 0), anchor="NW")
        for n, name in enumerate(names):
            axis.text(-GAP, n * (side + GAP) + side / 2, name, rotation=90, ha="right", va="center", fontsize=8)
        for k, label in enumerate(strip.labels):
            axis.text(k * (side + GAP) + side / 2, -GAP, label, ha="center", va="bottom", fontsize=7)
        axis.set_title(titles[number], fontsize=8, loc="left", pad=3, parse_math=False)
    figure.text(LEFT / width, 1 - 0.05 / height, title, fontsize=8, va="top", parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)


def write_contact_sheet(
    gaze: Gaze, path: str | Path, layer: int | None = None, head: int | None = None, most: int = MOST
) -> Path:
    """Write a PNG (or PDF, by the path's suffix) of a layer and head, by default their means, and return its path.
    Raises UserError for a layer or head that does not exist."""
    check_choice(gaze.weights["coarse"].shape, layer, head)
    shown = decode.spread(len(gaze.frames), most)
    grids = {name: maps(weights, layer, head) for name, weights in gaze.weights.items()}
    strips = []
    for start in range(0, len(shown), COLUMNS):
        row = shown[start : start + COLUMNS]
        times = [clock(gaze.seconds[k]) for k in row]
        strips.append(Strip(gaze.frames[row], {name: grid[row] for name, grid in grids.items()}, labels=times))
    which = f"layer {'mean' if layer is None else layer}, head {'mean' if head is None else head}"
    title = f"{gaze.question} → {gaze.answer}" if gaze.question else gaze.clip
    width = max(4, 1.3 * len(strips[0].frames) + LEFT + RIGHT)
    title = shorten(title, int(LETTERS * width) * TITLE_LINES - len(which) - 4, placeholder=" …")
    draw_sheet(strips, Path(path), f"{title}  ({which})", width=width)
    return Path(path)


def save_weights(gaze: Gaze, path: str | Path) -> Path:
    """Write the weights as an .npz and return its path; its `axes` describes the arrays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: w.astype(np.float16) for name, w in gaze.weights.items()}
    arrays |= {f"entropy_{name}": values for name, values in gaze.entropy.items()}
    arrays |= {name: np.array(getattr(gaze, name)) for name in ("question", "answer", "clip", "model", "mode")}
    arrays |= {"frames": gaze.frames.numpy(), "seconds": np.array(gaze.seconds), "axes": np.array(AXES)}
    np.savez_compressed(path, **arrays)
    return path


def check_choice(shape: Sequence[int], layer: int | None, head: int | None) -> None:
    """Raise UserError for a layer or head, counted from 0, that weights [layers, looks, heads, ...] do not have."""
    for what, number, count in (("layer", layer, shape[0]), ("head", head, shape[2])):
        if number is not None and not 0 <= number < count:
            raise UserError(f"{what} {number}: this model has {what}s 0 to {count - 1}")
