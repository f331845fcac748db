"""What a grid of sizes, budgets and architectures says: iso-FLOP curves, L(N, D), the best size, one token or many.

A cell is a size and a budget in one architecture. N counts all parameters that the architecture uses, embeddings
included; D counts training samples. Losses of the seeds of a cell are averaged.
"""

import math
import statistics
from dataclasses import dataclass, field

from fovlm.report.collect import Evidence, Run
from fovlm.report.compare import LEVEL, Difference
from fovlm.report.fits import FEW, STEEPEST, Fit, Optimum, fit_law, parabola, student

ARCHS = {"F": "foveated, 1 token a frame", "B": "multi-token, 16 tokens a frame"}
POINTS, SIZES = 8, 3  # of a law of five parameters; sizes and budgets
WIDEST = 0.3  # of the interval of the exponent, that a statement about growth is made of it
EDGE = 0.99  # of the highest exponent that the fit looks for: an interval that comes so near is open
SURE = 0.95  # of the draws that have their lowest point inside the sizes
PAIRS = 6  # cells of both architectures, that a trend is drawn through them
OPTIMUM_RULE = (
    "A parabola of loss over log N through the cells of a budget; the noise of a loss is the seed spread of the grid's "
    "own cells, or else that of the baseline's seeds, relative to its loss. The size is decided when the lowest point "
    f"is within the range of the sizes in at least {SURE:.0%} of 2000 draws with that noise."
)
LAW_RULE = (
    f"L(N, D) = E + A / N^alpha + B / D^beta by the Huber loss of log L (delta 1e-3), L-BFGS from a grid of starts, "
    f"bootstrap intervals of {LEVEL:.0%} (fewer than {FEW} points are not resampled: noise is added to the fitted "
    f"losses, that of the residuals or of the seeds, whichever is more). Fitted to at least {POINTS} cells of {SIZES} "
    f"sizes and {SIZES} budgets. How "
    f"the best size grows with compute is decided when the interval of its exponent is at most {WIDEST} wide and those "
    f"of alpha and beta end below {STEEPEST:g}, where the search ends."
)
TREND_RULE = (
    f"log(loss of F / loss of B) over log FLOPs, a straight line through at least {PAIRS} pairs of cells over {SIZES} "
    f"budgets: decided when the {LEVEL:.0%} interval of its slope (Student) does not hold 0 and all cells have learned "
    "to see (their loss is clearly below the best without a picture, where that is known). Cells of one budget are "
    "taken as independent."
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
    """Everything of the grid: `optima` by (architecture, budget), `fits` by architecture, and what could not be."""

    cells: list[Cell]
    noise: float | None  # standard deviation of log loss
    noise_from: str
    optima: dict[tuple[str, str], Optimum] = field(default_factory=dict)
    fits: dict[str, Fit] = field(default_factory=dict)
    unfitted: dict[str, str] = field(default_factory=dict)  # architecture -> why
    trend: Difference | None = None  # slope of log(F / B) over log FLOPs

    def of(self, arch: str, budget: str | None = None) -> list[Cell]:
        """Cells of an architecture, by size."""
        chosen = [c for c in self.cells if c.arch == arch and budget in (None, c.budget)]
        return sorted(chosen, key=lambda cell: (cell.N, cell.flops))

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
    """Fit all that the cells allow; None without cells."""
    by_cell: dict[tuple[str, str, str], list[Run]] = {}
    for run in evidence.cells:
        by_cell.setdefault((run.size, run.budget, run.arch), []).append(run)
    if not by_cell:
        return None
    found = Grid([_cell(*key, runs) for key, runs in by_cell.items()], *_noise(list(by_cell.values()), evidence))
    for arch in found.archs:
        for budget in found.budgets:
            cells = found.of(arch, budget)
            if len(cells) >= SIZES:
                seeds = min(len(c.losses) for c in cells) ** 0.5
                spread = found.noise and found.noise * statistics.fmean(c.loss for c in cells) / seeds
                found.optima[arch, budget] = parabola([c.N for c in cells], [c.loss for c in cells], spread)
        cells = found.of(arch)
        sizes, budgets = {c.size for c in cells}, {c.budget for c in cells}
        if len(cells) < POINTS or len(sizes) < SIZES or len(budgets) < SIZES:
            found.unfitted[arch] = f"{len(cells)} cells of {len(sizes)} sizes and {len(budgets)} budgets"
        else:
            data = [c.N for c in cells], [c.D for c in cells], [c.loss for c in cells]
            found.fits[arch] = fit_law(*data, noise=found.noise or 0.0, draws=draws)
    found.trend = _trend(found)
    return found


def optimum_text(found: Grid, arch: str, budget: str) -> str:
    """The best size of a budget, or why there is none."""
    optimum = found.optima.get((arch, budget))
    if optimum is None:
        return f"not decided ({len(found.of(arch, budget))} of {SIZES} sizes)"
    if optimum.size is None:
        cells = found.of(arch, budget)
        best = min(cells, key=lambda cell: cell.loss)
        where = {cells[0].size: "the smallest", cells[-1].size: "the largest"}.get(best.size, "a middle")
        return f"not decided: no lowest point among the sizes; {where} size is best so far"
    if found.noise is None:
        return f"not decided (no seeds to take the noise from); lowest point at N = {optimum.size:.3g}"
    if optimum.sure < SURE:
        return f"not decided: within the sizes in {optimum.sure:.0%} of draws; lowest point at N = {optimum.size:.3g}"
    return f"N = {optimum.size:.3g} [{optimum.low:.3g}, {optimum.high:.3g}]"


def law_text(found: Grid, arch: str) -> str:
    """How the best size grows with compute, or why that is not known."""
    if arch in found.unfitted:
        return f"not decided: {found.unfitted[arch]}, which is too few for five parameters"
    fit = found.fits[arch]
    low, high = fit.intervals["exponent"]
    told = f"N grows as C^{fit.law.exponent:.2f} [{low:.2f}, {high:.2f}]"
    open_ = [name for name in ("alpha", "beta") if fit.intervals[name][1] > EDGE * STEEPEST]
    if open_:
        return f"not decided, the data set no limit to {' and '.join(open_)}: {told}"
    return told if high - low <= WIDEST else f"not decided, the interval is too wide: {told}"


def trend_text(found: Grid, floor: float | None = None) -> str:
    """Whether one token gains on sixteen with compute, and how often it is the better.

    Cells whose loss is not below `floor` (nats) have not learned to see: a trend through them is not one of scale.
    """
    pairs = found.pairs()
    better = sum(f.loss < b.loss for f, b in pairs)
    count = f"F has the lower loss in {better} of {len(pairs)} cells"
    if found.trend is None or found.trend.low is None:
        return f"not decided: {len(pairs)} pairs of cells; {PAIRS} over {SIZES} budgets are needed. {count}"
    trend = (found.trend.value, found.trend.low, found.trend.high or 0.0)
    change, low, high = (f"{math.expm1(slope * math.log(10)):+.1%}" for slope in trend)
    told = f"the loss of F over that of B changes by {change} for ten times the compute [{low}, {high}]"
    if not found.trend.excludes_zero:
        return f"not decided: {told}. {count}"
    if floor is not None and (blind := sum(max(f.loss, b.loss) > floor for f, b in pairs)):
        return (
            f"not decided: in {blind} of the cells a side has not learned to see, so this is the trend of when that "
            f"begins: {told}. {count}"
        )
    gaining = "F gains on B" if found.trend.value < 0 else "B gains on F"
    return f"{gaining} with scale: {told}. {count}"


def _cell(size: str, budget: str, arch: str, runs: list[Run]) -> Cell:
    mean = statistics.fmean
    return Cell(
        size, budget, arch, float(runs[0].parameters), mean(run.samples for run in runs),
        mean(run.samples * run.flops_per_sample for run in runs), tuple(run.loss for run in runs),
    )  # fmt: skip


def _noise(groups: list[list[Run]], evidence: Evidence) -> tuple[float | None, str]:
    """Seed spread of log loss: of the grid's cells together, else of the baseline."""
    for name, sides in (("the seeds of its cells", groups), ("the seeds of LR1", [evidence.side("LR1")])):
        logs = [[math.log(run.loss) for run in runs] for runs in sides if len(runs) > 1]
        if logs:
            freedom = sum(len(one) - 1 for one in logs)
            return math.sqrt(sum(statistics.variance(one) * (len(one) - 1) for one in logs) / freedom), name
    return None, ""


def _trend(found: Grid) -> Difference | None:
    """Slope of log(F / B) over log FLOPs with Student's interval."""
    pairs = found.pairs()
    if len(pairs) < PAIRS or len({f.budget for f, _ in pairs}) < SIZES:
        return None
    x = [math.log((f.flops * b.flops) ** 0.5) for f, b in pairs]
    y = [math.log(f.loss / b.loss) for f, b in pairs]
    line = statistics.linear_regression(x, y)
    middle = statistics.fmean(x)
    squares = sum((v - middle) ** 2 for v in x)
    rest = sum((w - line.intercept - line.slope * v) ** 2 for v, w in zip(x, y, strict=True))
    reach = student(LEVEL, len(x) - 2) * math.sqrt(rest / (len(x) - 2) / squares)
    return Difference(line.slope, line.slope - reach, line.slope + reach)
