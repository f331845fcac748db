"""A gaze for papers: a contact sheet, frames in rows with coarse looks above fine ones; and the raw weights."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from fovlm.errors import UserError
from fovlm.media import decode
from fovlm.viz.gaze import Gaze
from fovlm.viz.heatmap import draw_heatmap, maps
from fovlm.viz.html import clock

matplotlib.use("Agg")  # draws into files; needs no screen

from matplotlib import pyplot as plt

COLUMNS = 8
MOST = 24  # looks on a sheet, evenly spaced
LONGEST = 200  # letters of the title
AXES = (
    "coarse, fine f16 [layers, looks, heads, 1 + patches]: attention weights, CLS first, then the patches by row; "
    "entropy_* f32 [looks]: mean over layers and heads, over its most; frames u8 [looks, 3, height, width]; "
    "seconds f64 [looks]"
)


def write_contact_sheet(
    gaze: Gaze, path: str | Path, layer: int | None = None, head: int | None = None, most: int = MOST
) -> Path:
    """Write a PNG (or PDF, by the path's ending) and return its path; of one layer and head, else their means.

    Raises UserError for a layer or head that is not there.
    """
    check(gaze, layer, head)
    shown = decode.spread(len(gaze.frames), most)
    columns = min(COLUMNS, len(shown))
    blocks = -(-len(shown) // columns)
    rows = blocks * len(gaze.weights)
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 1.4 * rows + 0.5), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for n, (name, weights) in enumerate(gaze.weights.items()):
        painted = draw_heatmap(gaze.frames[shown], maps(torch.from_numpy(weights[:, shown]), layer, head), 224)
        for i, (k, picture) in enumerate(zip(shown, painted, strict=True)):
            axis = axes[i // columns * len(gaze.weights) + n, i % columns]
            axis.imshow(picture)
            if n == 0:
                axis.set_title(clock(gaze.seconds[k]), fontsize=7, pad=2)
            if i % columns == 0:
                axis.text(-0.04, 0.5, name, rotation=90, ha="right", va="center", fontsize=8, transform=axis.transAxes)
    what = (
        "mean over layers and heads" if layer is None and head is None else f"layer {_told(layer)}, head {_told(head)}"
    )
    title = f"{gaze.question}  {gaze.answer}" if gaze.question else gaze.clip
    title = f"{' '.join(title.split())[:LONGEST]}  ({what})"
    top = 1 - 0.4 / figure.get_figheight()
    figure.subplots_adjust(left=0.035, right=0.995, bottom=0.01, top=top, wspace=0.04, hspace=0.12)
    figure.text(0.035, 1 - 0.06 / figure.get_figheight(), title, fontsize=8, va="top", parse_math=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def save_weights(gaze: Gaze, path: str | Path) -> Path:
    """Write the weights as an .npz and return its path; its `axes` says what the arrays are."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: w.astype(np.float16) for name, w in gaze.weights.items()}
    arrays |= {f"entropy_{name}": spread for name, spread in gaze.entropy.items()}
    arrays |= {name: np.array(getattr(gaze, name)) for name in ("question", "answer", "clip", "model", "mode")}
    arrays |= {"frames": gaze.frames.numpy(), "seconds": np.array(gaze.seconds), "axes": np.array(AXES)}
    np.savez_compressed(path, **arrays)
    return path


def check(gaze: Gaze, layer: int | None, head: int | None) -> None:
    """Refuse a layer or head that is not there; they count from 0. Raises UserError."""
    layers, _, heads, _ = gaze.weights["coarse"].shape
    check_choice(layers, heads, layer, head)


def check_choice(layers: int, heads: int, layer: int | None, head: int | None) -> None:
    """The same for a model of so many layers and heads, ahead of any look."""
    for what, number, count in (("layer", layer, layers), ("head", head, heads)):
        if number is not None and not 0 <= number < count:
            raise UserError(f"{what} {number}: this model has {what}s 0 to {count - 1}")


def _told(number: int | None) -> str:
    return "mean" if number is None else str(number)
