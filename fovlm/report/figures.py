"""The charts of the report, as SVG: each side has the same colour and marker in all of them, fit for print.

Each function draws into a file and returns it, or None when it has nothing to show. Bars and bands go from the lowest
to the highest seed.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws into files; needs no screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from fovlm.report.grid import ARCHS, Grid
from fovlm.report.runs import Evidence

# Okabe and Ito's colours, which colour-blind readers tell apart, then others; the marker repeats it without colour.
STYLES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "P"), ("#777777", "v"),
    ("#56B4E9", ">"), ("#004466", "p"), ("#8C510A", "X"), ("#AAAAAA", "<"), ("#7FB8D8", "h"), ("#BF9B30", "d"),
)  # fmt: skip
ARCH_STYLE = {"F": STYLES[0], "B": STYLES[3]}
SHADES = ("-", "--", "-.", ":", (0, (5, 1)))  # of budgets and sizes
STYLED = plt.rc_context({
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.4,
    "lines.markersize": 4.5, "svg.hashsalt": "fovlm", "savefig.bbox": "tight", "legend.fontsize": 8,
})  # fmt: skip
WIDE = 20  # a ratio of losses beyond which their axis is logarithmic


@STYLED
def final_losses(evidence: Evidence, labels: Sequence[str], path: Path, floor: float | None = None) -> Path:
    """Final validation loss of each side: every seed a dot, their mean and range below. `floor`: the loss of a model
    that does not see."""
    figure, axis = _figure(6.4, 0.7 + 0.34 * len(labels))
    for row, label in enumerate(labels):
        colour, marker = _style(evidence, label)
        losses = [run.loss for run in evidence.side(label)]
        axis.plot(losses, [row] * len(losses), marker, color=colour, alpha=0.7, markeredgewidth=0, markersize=6)
        if len(losses) > 1:
            mean = statistics.fmean(losses)
            reach = [[mean - min(losses)], [max(losses) - mean]]
            axis.errorbar(mean, row + 0.26, xerr=reach, fmt="|", color=colour, capsize=2, markersize=8)
    if floor is not None:
        axis.axvline(floor, color="black", linewidth=0.8, linestyle=":", label="best without the video")
        axis.legend(loc="upper left", bbox_to_anchor=(0, 1.0 + 0.5 / len(labels)), borderaxespad=0)
    axis.set_yticks(range(len(labels)), [evidence.title(label) for label in labels])
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("final validation loss, nats per token (lower is better)")
    _log_if_wide(axis.set_xscale, [run.loss for label in labels for run in evidence.side(label)])
    return _save(figure, path)


@STYLED
def over_samples(
    evidence: Evidence, labels: Sequence[str], column: str, y_label: str, path: Path, level: float | None = None
) -> Path | None:
    """A metric over the samples seen, by side: mean and range of the seeds. `level`: a line to compare with."""
    curves = {label: [run.curve(column) for run in evidence.side(label)] for label in labels}
    axis = _curves(evidence, curves, "samples seen", y_label)
    if axis is None:
        return None
    if level is not None:
        axis.axhline(level, color="black", linewidth=0.8, linestyle=":")
    return _save(axis.figure, path)


@STYLED
def over_flops(evidence: Evidence, labels: Sequence[str], path: Path) -> Path | None:
    """Validation loss over the FLOPs spent, forward and backward, with a line where the cheapest side ends."""
    curves = {label: [[(samples * run.flops_per_sample, loss) for samples, loss in run.curve("val_loss")]
                      for run in evidence.side(label)] for label in labels}  # fmt: skip
    axis = _curves(evidence, curves, "training FLOPs, forward and backward", "validation loss, nats per token")
    if axis is None:
        return None
    budget = min(curve[-1][0] for found in curves.values() for curve in found if curve)
    axis.axvline(budget, color="black", linewidth=0.8, linestyle=":")
    axis.annotate("equal FLOPs", (budget, 0.5), (3, 0), xycoords=("data", "axes fraction"), fontsize=8, rotation=90,
                  textcoords="offset points", va="center")  # fmt: skip
    axis.set_xscale("log")
    return _save(axis.figure, path)


@STYLED
def iso_flop(grid: Grid, path: Path) -> Path | None:
    """Loss over size: for each budget a parabola and its lowest point, for each architecture a panel."""
    archs = grid.archs
    figure, axes = _figure(3.1 * len(archs), 3.1, len(archs))
    for axis, arch in zip(axes, archs, strict=True):
        colour, marker = ARCH_STYLE[arch]
        for line, budget in zip(SHADES, grid.budgets, strict=False):
            cells = grid.of(arch, budget)
            if not cells:
                continue
            spread = [[c.loss - min(c.losses) for c in cells], [max(c.losses) - c.loss for c in cells]]
            axis.errorbar([c.N for c in cells], [c.loss for c in cells], yerr=spread, fmt=marker, color=colour,
                          capsize=2)  # fmt: skip
            fit = grid.optima.get((arch, budget))
            label = f"{budget}, {statistics.fmean(c.flops for c in cells):.2g} FLOPs"
            if fit is None:
                axis.plot([c.N for c in cells], [c.loss for c in cells], linestyle=line, color=colour, label=label)
                continue
            sizes = np.geomspace(cells[0].N, cells[-1].N, 61)
            losses = np.polyval(fit.coefficients, np.log(sizes / fit.mean))
            axis.plot(sizes, losses, linestyle=line, color=colour, label=label)
            if fit.size is not None:
                axis.plot(fit.size, fit.loss, "*", color="black", markersize=8)
        axis.set_title(ARCHS[arch], fontsize=9)
        axis.set_xscale("log")
        axis.set_xlabel("parameters N")
        sizes_of = {cell.size: cell.N for cell in grid.of(arch)}
        axis.set_xticks(list(sizes_of.values()), [f"{size}\n{_short(N)}" for size, N in sizes_of.items()])
        axis.minorticks_off()
    for line in _legend_beside(axes[-1]).get_lines():
        line.set_color("black")
    axes[0].set_ylabel("final validation loss, nats per token")
    _log_if_wide(axes[0].set_yscale, [cell.loss for cell in grid.cells])
    return _save(figure, path)


@STYLED
def one_or_sixteen(grid: Grid, path: Path) -> Path | None:
    """Loss of F over loss of B for each size, over the budget."""
    pairs = grid.pairs()
    if not pairs:
        return None
    figure, axis = _figure(4.2, 3.0)
    sizes = sorted({(f.N, f.size) for f, _ in pairs})
    for line, (_, size) in zip(SHADES, sizes, strict=False):
        chosen = sorted((f.flops, f.loss / b.loss) for f, b in pairs if f.size == size)
        x, y = zip(*chosen, strict=True)
        axis.plot(x, y, ARCH_STYLE["F"][1], linestyle=line, color=ARCH_STYLE["F"][0], label=f"size {size}")
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    ticks = {f.budget: f.flops for f, _ in pairs}
    axis.set_xticks(list(ticks.values()), [f"{budget}\n{flops:.2g}" for budget, flops in ticks.items()])
    axis.minorticks_off()
    axis.set_xlabel("training FLOPs of each run")
    axis.set_ylabel("loss of F over loss of B\n(below 1: one token is better)")
    _legend_beside(axis)
    return _save(figure, path)


Curve = list[tuple[float, float]]


def _style(evidence: Evidence, label: str) -> tuple[str, str]:
    """Colour and marker of a side."""
    return STYLES[evidence.labels.index(label) % len(STYLES)]


def _figure(width: float, height: float, panels: int = 0) -> tuple[plt.Figure, Any]:
    """A figure and its axis, or its `panels` axes with one scale of y."""
    figure, axes = plt.subplots(1, panels or 1, figsize=(width, height), sharey=True, squeeze=False)
    return figure, axes[0] if panels else axes[0][0]


def _save(figure: Any, path: Path) -> Path:
    """SVG without a date: the same numbers give the same file."""
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def _curves(evidence: Evidence, curves: dict[str, list[Curve]], x_label: str, y_label: str) -> Axes | None:
    """Mean of each side's curves, point by point, and the range of its seeds; None when there is no curve."""
    curves = {label: present for label, found in curves.items() if (present := [c for c in found if c])}
    if not curves:
        return None
    _, axis = _figure(5.6, 3.2)
    for label, found in curves.items():
        colour, marker = _style(evidence, label)
        rows = [list(zip(*row, strict=True)) for row in zip(*found, strict=False)]
        x = [statistics.fmean(xs) for xs, _ in rows]
        axis.plot(x, [statistics.fmean(ys) for _, ys in rows], color=colour, marker=marker if len(x) <= 12 else None,
                  label=evidence.title(label))  # fmt: skip
        if len(found) > 1:
            low, high = [min(ys) for _, ys in rows], [max(ys) for _, ys in rows]
            axis.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    _log_if_wide(axis.set_yscale, [value for found in curves.values() for curve in found for _, value in curve])
    _legend_beside(axis)
    return axis


def _legend_beside(axis: Axes) -> Any:
    return axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)


def _short(number: float) -> str:
    """1.4e5 -> 140k"""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{sign}"
    return f"{number:.0f}"


def _log_if_wide(set_scale: Callable[[str], None], values: Sequence[float]) -> None:
    """Losses that differ by more than `WIDE` times are drawn over their logarithm."""
    if min(values) > 0 and max(values) / min(values) > WIDE:
        set_scale("log")
