"""Pictures of where a model looks: each clip a row of frames, coarse looks above fine ones, attention as a red veil."""

from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as nnf
from torch import Tensor

from fovlm.batch import Batch
from fovlm.model import FoveatedVLM

matplotlib.use("Agg")  # draws into files; needs no screen

from matplotlib import pyplot as plt

MOST_FRAMES = 8  # a row shows no more


def maps(weights: Tensor, layer: int | None = None) -> Tensor:
    """Attention weights [layers, K, H, N] -> f32 [K, side, side] over the patches, mean over heads.

    One layer, or the mean over all. CLS (row 0) has no place in the picture and is left out.
    """
    chosen = weights.mean(0) if layer is None else weights[layer]
    patches = chosen.mean(1)[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    return patches.unflatten(1, (side, side))


def save_maps(model: FoveatedVLM, batch: Batch, path: Path, clips: int = 4, titles: list[str] | None = None) -> Path:
    """Draw the first clips of a pack into one PNG and return its path. A pack without clips draws nothing."""
    gaze = {name: maps(w.cpu()) for name, w in model.gaze(batch).items()}
    frame_of_look = batch.frame_of_look if batch.frame_of_look is not None else torch.arange(len(batch.frames))
    shown = [i for i, size in enumerate(batch.sizes) if size.looks][:clips]
    if not shown:
        return path
    columns = min(MOST_FRAMES, max(batch.sizes[i].looks for i in shown))
    rows = [(i, name) for i in shown for name in gaze]
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.4 * columns, 1.6 * len(rows)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, (i, name) in enumerate(rows):
        looks = (batch.look_segment == i).nonzero()[:, 0][:columns]
        for column, k in enumerate(looks.tolist()):
            _draw(axes[row, column], batch.frames[int(frame_of_look[k])].cpu(), gaze[name][k])
        title = (titles[i] if titles else batch.keys[i]) if name == next(iter(gaze)) else ""
        axes[row, 0].set_title(f"{name}  {title}".strip(), fontsize=7, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Fixed margins: a layout that makes room for a long question would shrink the frames.
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.25 / len(rows), wspace=0.04, hspace=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw(axis, frame: Tensor, weights: Tensor) -> None:
    height, width = frame.shape[-2:]
    veil = nnf.interpolate(weights[None, None], (height, width), mode="nearest")[0, 0]
    axis.imshow(frame.permute(1, 2, 0).numpy())
    axis.imshow(torch.zeros(height, width), cmap="gray", alpha=0.35)  # darken, so that the veil shows on any picture
    axis.imshow(veil.numpy(), cmap="hot", alpha=0.5, vmin=0.0)
