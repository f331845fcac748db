"""Analysis of a grid of sizes, budgets and architectures: iso-FLOP curves, L(N, D), the best size, one token or many.

A cell is a size and a budget in one architecture. N counts all parameters that the architecture uses, embeddings
included; D counts training samples. Losses of the seeds of a cell are averaged.
"""

import math
import statistics
from dataclasses import dataclass, field

from fovlm.report.confounds import confounds, grid_faults, scaled_label
from fovlm.report.runs import Evidence, RunRecord
from fovlm.report.scaling_law import FEW, NORMAL, STEEPEST, Fit, Optimum, cost_of_size, fit_law, parabola
from fovlm.report.statistics import LEVEL, Difference, slope, student

ARCHS = {"F": "foveated, 1 token a frame", "B": "multi-token, 16 tokens a frame"}
POINTS, SIZES = 8, 3  # needed for a law of five parameters; sizes and budgets
WIDEST = 0.3  # interval of the exponent with which the growth of the best size is decided
EDGE = 0.99  # of the highest exponent that the fit looks for: an interval that ends above it has no upper end
MAX_MISFIT = 0.03  # of a size's FLOPs; with sizes further off the line of FLOPs over size no growth is given
FREEDOM = 2  # degrees of freedom that a seed spread needs: three seeds
SURE = 0.95  # share of the draws that have their lowest point inside the sizes
PAIRS = 6  # cells of both architectures that a trend needs
OPTIMUM_RULE = (
    "A parabola of loss over log N through the cells of a budget. The noise of a loss is the seed spread of the grid's "
    "own cells, or else that of a baseline that differs from the cells in size, length and architecture alone, "
    f"relative to its loss, with {FREEDOM} degrees of freedom or more (three seeds) and widened by Student's factor "
    f"for so few. The size is decided when the lowest point is within the range of the sizes in at least {SURE:.0%} of "
    "2000 draws with that noise. Cells that differ in more than size, budget and architecture decide "
    "nothing here and below."
)
LAW_RULE = (
    f"L(N, D) = E + A / N^alpha + B / D^beta by the Huber loss of log L (delta 1e-3), L-BFGS from a grid of starts, "
    f"bootstrap intervals of {LEVEL:.0%} (fewer than {FEW} points are not resampled: noise is added to the fitted "
    "losses, that of the residuals or of the seeds, each widened by Student's factor, whichever is more). Fitted to at "
    f"least {POINTS} cells of {SIZES} sizes and {SIZES} budgets. A sample is assumed to cost c0 + c1 N FLOPs, so that "
    "between the smallest and the largest size the best N grows as C^(beta / (alpha + beta P + 1 - P)), P being the "
    "slope of log FLOPs a sample over log N: 1 where FLOPs are N times D. No growth is given where a size is more than "
    f"{MAX_MISFIT:.0%} off that line, of its own FLOPs or of the line's rise. The growth of the best size with compute "
    f"is decided when the interval of that exponent is at most {WIDEST} wide and those of alpha and beta end below "
    f"{STEEPEST:g}, where the search ends."
)
TREND_RULE = (
    f"log(loss of F / loss of B) over log FLOPs, a straight line through at least {PAIRS} pairs of cells over {SIZES} "
    f"budgets: decided when the {LEVEL:.0%} interval of its slope (Student) does not contain 0 and all cells have "
    "learned to see (their loss is clearly below the best possible without the video, where that is known). Cells of "
    "one budget are treated as independent."
)


@dataclass(frozen=True)
class Cell:
    """The mean over the seeds of one size, budget and architecture."""

    size: str
    budget: str
    arch: str
    N: float
    D: float
    flops: float
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)


@dataclass
class Grid:
    """The cells and all fits: `optima` by (architecture, budget), `fits` and `unfitted` by architecture."""

    cells: list[Cell]
    noise: float | None = None  # standard deviation of log loss over seeds
    noise_from: str = ""
    freedom: int = 0  # degrees of freedom of the noise
    fault: str = ""  # why nothing is decided by these cells
    optima: dict[tuple[str, str], Optimum] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    unfitted: dict[str, str] = field(default_factory=dict)  # architecture -> why
    misfit: dict[str, float] = field(default_factory=dict)  # architecture -> deviation of FLOPs from c0 + c1 N
    trend: Difference | None = None  # slope of log(F / B) over log FLOPs

    def of(self, arch: str, budget: str | None = None) -> list[Cell]:
        """Cells of an architecture, by size."""
        chosen = [c for c in self.cells if c.arch == arch and budget in (None, c.budget)]
        return sorted(chosen, key=lambda cell: (cell.N, cell.flops))

    @property
    def wide_noise(self) -> float | None:
        """The noise, widened by Student's factor for the few seeds that it comes from."""
        return self.noise and self.noise * student(self.freedom) / NORMAL

    @property
    def budgets(self) -> list[str]:
        least = {c.budget: c.flops for c in sorted(self.cells, key=lambda c: -c.flops)}
        return sorted(least, key=lambda budget: least[budget])

    @property
    def archs(self) -> list[str]:
        return [arch for arch in ARCHS if self.of(arch)]

    def pairs(self) -> list[tuple[Cell, Cell]]:
        """(F, B) of every size and budget that has both."""
        other = {(c.size, c.budget): c for c in self.of("B")}
        return [(c, other[c.size, c.budget]) for c in self.of("F") if (c.size, c.budget) in other]


def grid(evidence: Evidence, draws: int = 200) -> Grid | None:
    """All fits that the cells allow; None without cells."""
    by_cell: dict[tuple[str, str, str], list[RunRecord]] = {}
    for run in evidence.cells:
        by_cell.setdefault((run.size, run.budget, run.arch), []).append(run)
    if not by_cell:
        return None
    found = Grid([_cell(*key, runs) for key, runs in by_cell.items()], fault=grid_faults(evidence.cells))
    if found.fault:
        return found
    found.noise, found.noise_from, found.freedom = _noise(list(by_cell.values()), evidence)
    for arch in found.archs:
        for budget in found.budgets:
            cells = found.of(arch, budget)
            if len(cells) >= SIZES:
                seeds = min(len(c.losses) for c in cells) ** 0.5
                spread = found.wide_noise and found.wide_noise * statistics.fmean(c.loss for c in cells) / seeds
                found.optima[arch, budget] = parabola([c.N for c in cells], [c.loss for c in cells], spread)
        cells = found.of(arch)
        sizes, budgets = {c.size for c in cells}, {c.budget for c in cells}
        if len(cells) < POINTS or len(sizes) < SIZES or len(budgets) < SIZES:
            found.unfitted[arch] = f"{len(cells)} cells of {len(sizes)} sizes and {len(budgets)} budgets"
        else:
            data = [c.N for c in cells], [c.D for c in cells], [c.loss for c in cells]
            rise, off = cost_of_size(data[0], [c.flops / c.D for c in cells])
            found.misfit[arch] = off
            rise_or_none = rise if off <= MAX_MISFIT else None
            found.fits[arch] = fit_law(*data, noise=found.wide_noise or 0.0, draws=draws, rise=rise_or_none)
    pairs = found.pairs()
    if len(pairs) >= PAIRS and len({f.budget for f, _ in pairs}) >= SIZES:
        flops = [math.log((f.flops * b.flops) ** 0.5) for f, b in pairs]
        found.trend = slope(flops, [math.log(f.loss / b.loss) for f, b in pairs])
    return found


def optimum_text(found: Grid, arch: str, budget: str) -> str:
    """The best size of a budget, or why there is none."""
    if found.fault:
        return f"not decided: {found.fault}"
    optimum = found.optima.get((arch, budget))
    if optimum is None:
        return f"not decided ({len(found.of(arch, budget))} of {SIZES} sizes)"
    if optimum.size is None:
        cells = found.of(arch, budget)
        best = min(cells, key=lambda cell: cell.loss)
        where = {cells[0].size: "the smallest", cells[-1].size: "the largest"}.get(best.size, "a middle")
        return f"not decided: no lowest point among the sizes; {where} size is best so far"
    if found.noise is None:
        return f"not decided (no three seeds that show the noise); lowest point at N = {optimum.size:.3g}"
    if optimum.sure < SURE:
        return f"not decided: within the sizes in {optimum.sure:.0%} of draws; lowest point at N = {optimum.size:.3g}"
    return f"N = {optimum.size:.3g} [{optimum.low:.3g}, {optimum.high:.3g}]"


def law_text(found: Grid, arch: str) -> str:
    """How the best size grows with compute, or why that is not known."""
    if found.fault:
        return f"not decided: {found.fault}"
    if arch in found.unfitted:
        return f"not decided: {found.unfitted[arch]}, which is too few for five parameters"
    fit = found.fits[arch]
    if fit.exponent is None or fit.rise is None:
        off = found.misfit[arch]
        why = f"are not c0 + c1 N here, a size is {off:.0%} off" if math.isfinite(off) else "do not grow with N here"
        return f"not decided: FLOPs a sample {why}, so that the law does not say how the best size grows"
    low, high = fit.intervals["exponent"]
    growth = f"N grows as C^{fit.exponent:.2f} [{low:.2f}, {high:.2f}] (FLOPs a sample as N^{fit.rise:.2f})"
    unbounded = [name for name in ("alpha", "beta") if fit.intervals[name][1] > EDGE * STEEPEST]
    if unbounded:
        return f"not decided, the data do not bound {' and '.join(unbounded)}: {growth}"
    return growth if high - low <= WIDEST else f"not decided, the interval is too wide: {growth}"


def trend_text(found: Grid, floor: float | None = None) -> str:
    """Whether one token gains on sixteen with compute, and how often it is better.

    Cells whose loss is not below `floor` (nats) have not learned to see: a trend through them is no effect of scale.
    """
    if found.fault:
        return f"not decided: {found.fault}"
    pairs = found.pairs()
    better = sum(f.loss < b.loss for f, b in pairs)
    count = f"F has the lower loss in {better} of {len(pairs)} cells"
    if found.trend is None or found.trend.low is None:
        return f"not decided: {len(pairs)} pairs of cells; {PAIRS} over {SIZES} budgets are needed. {count}"
    trend = (found.trend.value, found.trend.low, found.trend.high or 0.0)
    change, low, high = (f"{math.expm1(slope * math.log(10)):+.1%}" for slope in trend)
    effect = f"the loss of F over that of B changes by {change} for ten times the compute [{low}, {high}]"
    if not found.trend.excludes_zero:
        return f"not decided: {effect}. {count}"
    if floor is not None and (blind := sum(max(f.loss, b.loss) > floor for f, b in pairs)):
        return (
            f"not decided: in {blind} of the cells a side has not learned to see, so this is the trend of when that "
            f"begins: {effect}. {count}"
        )
    gaining = "F gains on B" if found.trend.value < 0 else "B gains on F"
    return f"{gaining} with scale: {effect}. {count}"


def _cell(size: str, budget: str, arch: str, runs: list[RunRecord]) -> Cell:
    D, flops = (statistics.fmean(values) for values in zip(*((run.samples, run.flops) for run in runs), strict=True))
    return Cell(size, budget, arch, float(runs[0].parameters), D, flops, tuple(run.loss for run in runs))


def _noise(groups: list[list[RunRecord]], evidence: Evidence) -> tuple[float | None, str, int]:
    """(seed spread of log loss, whose, degrees of freedom): of the cells together, else of a baseline like them."""
    label = scaled_label(evidence)
    base = [] if confounds(evidence, [label] if label else []) else evidence.side(label)
    for name, sides in (("the seeds of its cells", groups), (f"the seeds of {label}", [base])):
        logs = [[math.log(run.loss) for run in runs] for runs in sides if len(runs) > 1]
        freedom = sum(len(one) - 1 for one in logs)
        if freedom >= FREEDOM:
            spread = math.sqrt(sum(statistics.variance(one) * (len(one) - 1) for one in logs) / freedom)
            return spread, name, freedom
    return None, "", 0
