"""When one side may be called better: intervals over seeds, and the rule that every decision here follows.

A side is the runs of one label with different seeds. Its number is the final validation loss in nats, lower is better.
The difference of two sides has Welch's interval (unequal variances; B. L. Welch, Biometrika 34, 1947): with three seeds
a side it is wide, as it should be. Losses over seeds are taken as roughly normal; where some seeds find the task and
others do not they are not normal, and the interval is wider still.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95
SEEDS = 3  # on each side; with two, Welch's interval depends on a single difference
RULE = (
    f"A side is better when it and its rival have at least {SEEDS} seeds each and the {LEVEL:.0%} interval of the "
    "difference of their mean final validation losses (Welch) does not contain 0; among more than two sides the best "
    "must beat each of the others, each interval at the level that keeps all of them together at 95 % (Bonferroni). "
    "The sides may differ only in what is asked, and the seeds of a side in nothing. Otherwise: not decided."
)


@dataclass(frozen=True)
class Side:
    """Final losses (nats) of the seeds of one label."""

    name: str
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None


@dataclass(frozen=True)
class Difference:
    """mean(a) - mean(b) in nats; low and high are None where a side has one seed."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        """`+0.1200 [+0.0300, +0.2100]`, without an interval where there is none."""
        if self.low is None or self.high is None:
            return f"{self.value:+.4f}"
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


@dataclass(frozen=True)
class Verdict:
    """`winner` is None when nothing is decided; `text` says what is decided, or why not."""

    winner: str | None
    text: str
    differences: dict[str, Difference]  # rival -> its loss minus that of the best side
    level: float = LEVEL  # of each of their intervals


def student(freedom: float) -> float:
    """The t beyond which both tails of Student's distribution together hold 1 - LEVEL."""
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def welch(a: Sequence[float], b: Sequence[float], level: float = LEVEL) -> Difference:
    """The difference of the means of two sides with Welch's interval."""
    value = statistics.fmean(a) - statistics.fmean(b)
    if min(len(a), len(b)) < 2:
        return Difference(value)
    if len(set(a)) == len(set(b)) == 1:  # no variance
        return Difference(value, value, value)
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(level)
    return Difference(value, float(low), float(high))


def paired(differences: Sequence[float]) -> Difference:
    """The mean of differences taken within each seed, with Student's interval."""
    value = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(value)
    if len(set(differences)) == 1:
        return Difference(value, value, value)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(LEVEL)
    return Difference(value, float(low), float(high))


def slope(x: Sequence[float], y: Sequence[float]) -> Difference:
    """The slope of a straight line through three points or more, with Student's interval."""
    line = stats.linregress(x, y)
    reach = student(len(x) - 2) * line.stderr
    return Difference(float(line.slope), float(line.slope - reach), float(line.slope + reach))


def decide(sides: Sequence[Side], noise: float | None = None, confounded: str = "") -> Verdict:
    """Which side has the lowest loss, by `RULE`.

    `noise` is a seed spread measured on another side; it is mentioned where a side has one seed and decides nothing.
    `confounded` says what else differs between the sides, and then nothing is decided. Raises ValueError for fewer than
    two sides.
    """
    if len(sides) < 2:
        raise ValueError("a comparison needs two sides")
    best = min(sides, key=lambda side: side.mean)
    rivals = [side for side in sides if side is not best]
    level = 1 - (1 - LEVEL) / len(rivals)
    differences = {side.name: welch(side.losses, best.losses, level) for side in rivals}
    few = [side for side in sides if len(side.losses) < SEEDS]
    unclear = [name for name, difference in differences.items() if not difference.excludes_zero]
    if confounded:
        text = f"not decided: {confounded}"
    elif few:
        text = f"not decided ({_seeds(few)}; {SEEDS} of each are needed){_leaning(best, rivals, noise)}"
    elif unclear:
        against = ", ".join(unclear)
        text = f"not decided: {best.name} has the lowest mean, but its interval against {against} contains 0"
    else:
        beaten = ", ".join(
            f"{name}, whose loss is {difference} nats higher" for name, difference in differences.items()
        )
        return Verdict(best.name, f"{best.name} is better than {beaten}", differences, level)
    return Verdict(None, text, differences, level)


def _seeds(sides: Sequence[Side]) -> str:
    by_count: dict[int, list[str]] = {}
    for side in sides:
        by_count.setdefault(len(side.losses), []).append(side.name)
    words = {1: "one seed", 2: "two seeds"}
    return ", ".join(f"{words.get(n, f'{n} seeds')} of {' and '.join(names)}" for n, names in sorted(by_count.items()))


def _leaning(best: Side, rivals: Sequence[Side], noise: float | None) -> str:
    """Which side has the lowest mean and by how much, against the noise measured elsewhere. No more than a hint."""
    second = min(rivals, key=lambda side: side.mean)
    gap = second.mean - best.mean
    text = f". {best.name} has the lowest mean, {gap:.3g} nats below {second.name}"
    return text + (f": {float(f'{gap / noise:.2g}'):,g} times the known seed spread" if noise else "")
