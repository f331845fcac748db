"""The plot of `kernels.bench`."""

from __future__ import annotations

from pathlib import Path


def plot(rows: list[dict], path: Path) -> None:
    """Forward and backward of every implementation, one panel per operation, shape, type and kind of encoder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    keys = list(dict.fromkeys((r["op"], r["shape"], r["dtype"], r["grads"]) for r in rows))
    across = min(4, len(keys))
    down = -(-len(keys) // across)
    figure, grid = pyplot.subplots(down, across, figsize=(4 * across, 0.6 + 1.8 * down), squeeze=False)
    axes = grid.flatten()
    for axis in axes[len(keys) :]:
        axis.set_visible(False)
    for axis, key in zip(axes, keys):
        here = [r for r in rows if (r["op"], r["shape"], r["dtype"], r["grads"]) == key]
        names = list(dict.fromkeys(r["implementation"] for r in here))
        start = [0.0] * len(names)
        for mode in ("forward", "backward"):
            length = [r["us"] for r in here if r["mode"] == mode]
            axis.barh(names, length, left=start, label=mode)
            start = length
        axis.set_title(" ".join(key[:3]) + f", gradients: {key[3]}", fontsize=9)
        axis.tick_params(labelsize=7)
    axes[0].legend(fontsize=7)
    figure.supxlabel(f"µs, median ({rows[0]['device']})", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
