"""Learning rates as pure functions of progress, the finished share of the run in [0, 1]. No torch.

Every schedule starts with a linear warm-up over the first `warmup` share of the run.

    constant     the group's peak rate
    cosine       down to `final` times the peak rate (arXiv 1608.03983, without restarts)
    converging   every group from its peak to one common rate, along the same cosine in the logarithm, so that the
                 ratio between groups shrinks evenly
"""

import math

from fovlm.config.schema import OptimSettings


def rates(optim: OptimSettings, progress: float) -> dict[str, float]:
    """The rate of every trained group (connector, encoder, llm) at `progress`; frozen groups are left out."""
    peaks = {"connector": optim.lr_connector, "encoder": optim.lr_encoder, "llm": optim.lr_llm}
    return {group: rate(optim, peak, progress) for group, peak in peaks.items() if group not in optim.freeze}


def rate(optim: OptimSettings, peak: float, progress: float) -> float:
    """The rate of a group with this peak. `progress` is clamped to [0, 1]."""
    progress = min(max(progress, 0.0), 1.0)
    return peak * warm(progress, optim.warmup) * _shape(optim, peak, descent(progress, optim.warmup))


def warm(progress: float, warmup: float) -> float:
    """0 at the start, 1 from the end of the warm-up on."""
    return min(1.0, progress / warmup) if warmup else 1.0


def descent(progress: float, warmup: float) -> float:
    """Half a cosine: 1 until the warm-up ends, 0 at the end of the run."""
    after = max(0.0, progress - warmup) / (1.0 - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * after))


def _shape(optim: OptimSettings, peak: float, high: float) -> float:
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "cosine":
        return optim.final + (1.0 - optim.final) * high
    assert optim.lr_common is not None  # checked by config/schema.py
    return (optim.lr_common / peak) ** (1.0 - high)
