"""Fits: loss as a law of size and data, and the best size of a budget.

The law is that of Hoffmann et al. 2022 ("Chinchilla", arXiv 2203.15556, section 3.3): L(N, D) = E + A / N^alpha +
B / D^beta, fitted by the Huber loss (delta 1e-3) of log L with L-BFGS from a grid of starts. Two details follow
Besiroglu et al. 2024 (arXiv 2404.10102), who found why the first fit was off: the loss is summed and not averaged, and
the optimizer is not stopped early. N and D may be in any unit; they are scaled to their geometric mean inside.
"""

import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import huber

from fovlm.report.statistics import LEVEL, student

DELTA = 1e-3  # of the Huber loss: about 0.1 % of the loss
FEW = 20  # points; a resample of fewer often lacks a size or a budget, so noise is added to them instead
STARTS = 24  # the points of the grid with the lowest loss, from which the fit is run to convergence
NOISY = 2000  # parabolas through noisy losses
TAILS = (50 * (1 - LEVEL), 50 * (1 + LEVEL))  # per cent
NORMAL = 1.96  # Student's quantile for many degrees of freedom
STEEPEST = 4.0  # the highest exponent that the fit looks for
# Bounds of log E (less log of the lowest loss), log A, alpha, log B, beta, where N and D are 1 at their mean.
BOUNDS = ((-8.0, 1.0), (-12.0, 6.0), (1e-3, STEEPEST), (-12.0, 6.0), (1e-3, STEEPEST))

Numbers = Sequence[float]


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, loss in nats."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, N: ArrayLike, D: ArrayLike) -> np.ndarray:
        """Predicted losses for sizes N and amounts of data D."""
        N, D = np.asarray(N, float), np.asarray(D, float)
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

    def exponent(self, rise: float = 1.0) -> float:
        """a in "the best size grows as C^a", where a sample costs c0 + c1 N FLOPs; at most `STEEPEST`.

        `rise` is the slope of log FLOPs over log N between the smallest and the largest size (`cost_of_size`). At the
        best size alpha A / N^alpha = p beta B / D^beta with p = c1 N / (c0 + c1 N) and C = D (c0 + c1 N); from the one
        size to the other, log C so grows by (alpha + beta rise + 1 - rise) / beta times what log N does. With c0 = 0,
        where C is N times D, this is the beta / (alpha + beta) of Hoffmann et al.
        """
        slower = self.alpha + self.beta * rise + 1 - rise  # 0 or less: there is no best size
        return self.beta / max(slower, self.beta / STEEPEST)


@dataclass(frozen=True)
class Fit:
    """A fitted law; `intervals` holds (low, high) of each of its parameters and, with a `rise`, of `exponent`."""

    law: Law
    intervals: dict[str, tuple[float, float]]
    points: int
    spread: float  # standard deviation of log(measured / predicted)
    rise: float | None

    @property
    def exponent(self) -> float | None:
        return None if self.rise is None else self.law.exponent(self.rise)


def fit_law(N: Numbers, D: Numbers, L: Numbers, noise: float = 0.0, draws: int = 200, rise: float | None = 1.0) -> Fit:
    """Fit the law to losses L > 0 at sizes N and amounts of data D, with bootstrap intervals from `draws` refits.

    Points are resampled. With fewer than `FEW`, normal noise is added to the fitted log losses instead: that of the
    residuals, corrected for the five fitted parameters and multiplied by Student's factor for the few degrees of
    freedom, or `noise` (of log L, as measured over seeds) where that is more. `rise` gives the exponent of the best
    size (`Law.exponent`), None leaves it out. Raises ValueError for fewer than six points or a number that is not
    above 0.
    """
    if len(L) < 6 or min(*N, *D, *L) <= 0:
        raise ValueError("a law of five parameters needs six points or more, all numbers above 0")
    n, d, y = (np.log(np.asarray(v, float)) for v in (N, D, L))
    n0, d0 = n.mean(), d.mean()
    n, d = n - n0, d - d0
    best = _best(n, d, y, _starts(y))
    rng = np.random.default_rng(0)
    fitted = _predict(best, n, d)[0]
    freedom = len(y) - 5
    left = float(np.sqrt(((y - fitted) ** 2).sum() / freedom)) * student(freedom) / NORMAL
    scale = max(left, noise)
    found = []
    for _ in range(draws):
        if len(y) >= FEW:
            pick = rng.integers(0, len(y), len(y))
            data = n[pick], d[pick], y[pick]
        else:
            data = n, d, fitted + scale * rng.standard_normal(len(y))
        found.append(_law(_best(*data, [best], 1e-8), n0, d0))  # far below the measured noise
    law = _law(best, n0, d0)
    names = [field.name for field in fields(Law)]
    columns = dict(zip(names, np.array([astuple(one) for one in found]).reshape(-1, 5).T, strict=True))
    if rise is not None:
        columns["exponent"] = np.array([one.exponent(rise) for one in found])
    intervals = {k: tuple(np.percentile(v, TAILS).tolist()) for k, v in columns.items()} if found else {}
    return Fit(law, intervals, len(y), float((y - fitted).std()), rise)


def cost_of_size(N: Numbers, flops: Numbers) -> tuple[float, float]:
    """How the FLOPs of a sample grow with size: a line c0 + c1 N, fitted by least squares of the relative errors.

    Returns (rise, miss): the slope of log FLOPs over log N between the ends of that line, and the largest deviation of
    a size from it, as a share of its FLOPs or of the line's whole rise, whichever is less; 0 and inf where the line
    does not rise.
    """
    n, f = np.asarray(N, float), np.asarray(flops, float)
    c0, c1 = np.linalg.lstsq(np.stack([1 / f, n / f], 1), np.ones_like(f), rcond=None)[0]
    line = c0 + c1 * n
    low, high = (float(c0 + c1 * end) for end in (n.min(), n.max()))
    if c1 <= 0 or low <= 0:
        return 0.0, np.inf
    miss = float((np.abs(f - line) / np.minimum(f, high - low)).max())
    return float(np.log(high / low) / np.log(n.max() / n.min())), miss


@dataclass(frozen=True)
class Optimum:
    """The lowest point of a parabola of loss over log size. `sure`: the share of draws that are convex and have it
    within the range of the sizes; `size`, `low`, `high` and `loss` are None where the parabola itself does not."""

    size: float | None
    loss: float | None
    low: float | None
    high: float | None
    sure: float
    coefficients: tuple[float, float, float]  # of log(size / mean)^2, ^1, ^0
    mean: float  # the geometric mean of the sizes


def parabola(N: Numbers, L: Numbers, noise: float | None) -> Optimum:
    """Fit a parabola of loss over log N ("approach 2" of Hoffmann et al.) and its lowest point.

    `noise` is the standard deviation of a loss in nats; the interval comes from NOISY fits to losses with that noise
    added. Without it there is no interval and `sure` is 0.
    """
    x = np.log(np.asarray(N, float))
    mean = x.mean()
    y = np.asarray(L, float)
    c = np.polyfit(x - mean, y, 2)
    inside = _lowest(c[:, None], x - mean)[0]
    size = loss = low = high = None
    if np.isfinite(inside):
        size, loss = float(np.exp(inside + mean)), float(np.polyval(c, inside))
    sure = 0.0
    if noise is not None:
        noisy = y[:, None] + noise * np.random.default_rng(0).standard_normal((len(y), NOISY))
        lowest = _lowest(np.polyfit(x - mean, noisy, 2), x - mean)
        sure = float(np.isfinite(lowest).mean())
        if size is not None and sure > 0:
            ends = np.nanpercentile(lowest, TAILS)
            low, high = (float(np.exp(end + mean)) for end in ends)
    return Optimum(size, loss, low, high, sure, (float(c[0]), float(c[1]), float(c[2])), float(np.exp(mean)))


def _lowest(c: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Where parabolas with coefficients c [3, draws] are lowest; nan where that is not within the range of x."""
    with np.errstate(divide="ignore", invalid="ignore"):
        at = -c[1] / (2 * c[0])
    return np.where((c[0] > 0) & (at >= x.min()) & (at <= x.max()), at, np.nan)


def _law(theta: np.ndarray, n0: float, d0: float) -> Law:
    e, a, alpha, b, beta = theta.tolist()
    return Law(float(np.exp(e)), float(np.exp(a + alpha * n0)), alpha, float(np.exp(b + beta * d0)), beta)


def _predict(theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log of the law at the points, and the shares [3, points] of its three terms."""
    e, a, alpha, b, beta = theta
    terms = np.stack([np.full_like(n, e), a - alpha * n, b - beta * d])
    total = np.logaddexp.reduce(terms, axis=0)  # scipy's logsumexp takes ten times as long for few points
    return total, np.exp(terms - total)


def _loss(theta: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Sum of the Huber losses in units of DELTA squared, and its gradient."""
    predicted, share = _predict(theta, n, d)
    r = (predicted - y) / DELTA
    g = np.clip(r, -1, 1) / DELTA
    gradient = np.array([g @ share[0], g @ share[1], -g @ (share[1] * n), g @ share[2], -g @ (share[2] * d)])
    return float(huber(1, r).sum()), gradient


def _starts(y: np.ndarray) -> list[np.ndarray]:
    """A grid over all five parameters."""
    e = y.min() + np.log([0.02, 0.3, 0.7, 0.95])
    term = y.mean() + np.log([0.02, 0.15, 0.5])
    rate = (0.1, 0.35, 0.7, 1.5)
    return [np.array(theta) for theta in itertools.product(e, term, rate, term, rate)]


def _best(n: np.ndarray, d: np.ndarray, y: np.ndarray, starts: list[np.ndarray], close: float = 1e-12) -> np.ndarray:
    """The best of L-BFGS from the most promising starts -> theta [5]. It stops at a change `close` of the loss."""
    shift = np.array([y.min(), 0, 0, 0, 0])
    bounds = [(low + s, high + s) for (low, high), s in zip(BOUNDS, shift, strict=True)]
    starts = sorted(starts, key=lambda theta: _loss(theta, n, d, y)[0])[:STARTS]
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": close, "gtol": 1e-6}
    results = [
        minimize(_loss, start, (n, d, y), method="L-BFGS-B", jac=True, bounds=bounds, options=options)
        for start in starts
    ]
    return np.asarray(min(results, key=lambda result: result.fun).x)
