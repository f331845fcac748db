"""When one side may be called better: intervals over seeds, and the rule that every decision here follows.

A side is the runs of one role with different seeds. Its number is the final validation loss in nats, lower is better.
The difference of two sides has Welch's interval (unequal variances; B. L. Welch, Biometrika 34, 1947): with three seeds
a side it is wide, as it should be. Losses over seeds are taken as roughly normal; where a task is found by some seeds
and not by others they are not, and then the interval is wider still and nothing is decided.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fovlm.report.scaling_law import student

LEVEL = 0.95
SEEDS = 3  # on each side; with two, Welch's interval hangs on a single difference
RULE = (
    f"A side is better when it and its rival have at least {SEEDS} seeds each and the {LEVEL:.0%} interval of the "
    "difference of their mean final validation losses (Welch) does not hold 0; among more than two sides the best must "
    "beat each of the others, each interval at the level that keeps all of them together at 95 % (Bonferroni). The "
    "sides may differ in nothing but what is asked, and the seeds of one in nothing. Otherwise: not decided."
)


@dataclass(frozen=True)
class Side:
    """Final losses (nats) of the seeds of one role."""

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


@dataclass(frozen=True)
class Verdict:
    """`winner` is None when nothing is decided; `text` says what is decided, or why not."""

    winner: str | None
    text: str
    differences: dict[str, Difference]  # rival -> its loss less that of the best side
    level: float = LEVEL  # of each of their intervals


def welch(a: Sequence[float], b: Sequence[float], level: float = LEVEL) -> Difference:
    """The difference of the means of two sides with Welch's interval."""
    value = statistics.fmean(a) - statistics.fmean(b)
    if min(len(a), len(b)) < 2:
        return Difference(value)
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if va + vb == 0:
        return Difference(value, value, value)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    reach = student(level, freedom) * math.sqrt(va + vb)
    return Difference(value, value - reach, value + reach)


def paired(differences: Sequence[float], level: float = LEVEL) -> Difference:
    """The mean of differences taken within each seed, with Student's interval."""
    value = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(value)
    reach = student(level, len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(value, value - reach, value + reach)


def decide(sides: Sequence[Side], noise: float | None = None, confounded: str = "") -> Verdict:
    """Which side has the lowest loss, by `RULE`.

    `noise` is a seed spread measured on another role, told where a side has one seed; it decides nothing. `confounded`
    says what else differs between the sides, and then nothing is decided. Raises ValueError for fewer than two sides.
    """
    if len(sides) < 2:
        raise ValueError("a comparison wants two sides")
    best = min(sides, key=lambda side: side.mean)
    rivals = [side for side in sides if side is not best]
    level = 1 - (1 - LEVEL) / len(rivals)
    differences = {side.name: welch(side.losses, best.losses, level) for side in rivals}
    if confounded:
        return Verdict(None, f"not decided: {confounded}", differences, level)
    few = [side for side in sides if len(side.losses) < SEEDS]
    if few:
        text = f"not decided ({_seeds(few)}; {SEEDS} of each are needed)"
        return Verdict(None, text + _leaning(best, rivals, noise), differences, level)
    open_ = [name for name, difference in differences.items() if not difference.excludes_zero]
    if open_:
        return Verdict(
            None, f"not decided: {best.name} has the lowest mean, but its interval against {', '.join(open_)} holds 0",
            differences, level,
        )  # fmt: skip
    beaten = ", ".join(f"{name}, whose loss is {interval(d)} nats higher" for name, d in differences.items())
    return Verdict(best.name, f"{best.name} is better than {beaten}", differences, level)


def interval(difference: Difference) -> str:
    """`+0.12 [+0.03, +0.21]`, without an interval where there is none."""
    if difference.low is None or difference.high is None:
        return f"{difference.value:+.4f}"
    return f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def pooled(sides: Mapping[str, Side], first: str) -> tuple[str, float] | None:
    """(role, seed spread) of the baseline `first`, or else of the role with most seeds; None where no role has two."""
    known = [side for side in sides.values() if side.spread]
    if not known:
        return None
    side = sides[first] if first in sides and sides[first].spread else max(known, key=lambda s: len(s.losses))
    assert side.spread is not None
    return side.name, side.spread


def _seeds(sides: Sequence[Side]) -> str:
    by_count: dict[int, list[str]] = {}
    for side in sides:
        by_count.setdefault(len(side.losses), []).append(side.name)
    words = {1: "one seed", 2: "two seeds"}
    return ", ".join(f"{words.get(n, f'{n} seeds')} of {' and '.join(names)}" for n, names in sorted(by_count.items()))


def _leaning(best: Side, rivals: Sequence[Side], noise: float | None) -> str:
    """Where it leans, against the noise measured elsewhere. No more than a hint."""
    second = min(rivals, key=lambda side: side.mean)
    gap = second.mean - best.mean
    text = f". {best.name} has the lowest mean, {gap:.3g} nats below {second.name}"
    return text + (f": {gap / noise:.2g} times the seed spread known" if noise else "")
