"""How well a model does in each way of looking, on packs that all models see alike."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fovlm import distributed
from fovlm.data.packing import Batch
from fovlm.model.autoregressive import autoregressive
from fovlm.model.modeling import FoveatedVLM


@dataclass
class Score:
    """Mean nll (nats) over weighted tokens: of all, and by source; `tokens` is their number."""

    loss: float
    tokens: float
    by_source: dict[str, float] = field(default_factory=dict)


def nll_in_mode(model: FoveatedVLM, batch: Batch, mode: str, forward: Callable[..., Tensor] | None = None) -> Tensor:
    """The pack's nll [S] in one mode. `forward` stands in for the model, e.g. the engine around it."""
    forward = forward or model
    if mode == "autoregressive":
        return autoregressive(model, batch)
    return forward(batch, visual="coarse" if mode == "coarse_only" else None)


@torch.no_grad()
def evaluate(
    model: FoveatedVLM,
    batches: Iterable[Batch],
    modes: Iterable[str],
    device: torch.device | str = "cpu",
    forward: Callable[..., Tensor] | None = None,
) -> dict[str, Score]:
    """Score the packs of this rank in each mode and add up over the ranks. Gives every rank the same numbers."""
    model.eval()
    sums: dict[tuple[str, str], list[float]] = {}
    for batch in batches:
        batch = batch.to(device)
        sample_of = batch.text_segment.clamp(min=0).tolist()
        weight = batch.weight * (batch.predict_from >= 0)
        for mode in modes:
            nll = nll_in_mode(model, batch, mode, forward).float() * weight
            for i, value, share in zip(sample_of, nll.tolist(), weight.tolist(), strict=True):
                if share:
                    entry = sums.setdefault((mode, batch.sources[i]), [0.0, 0.0])
                    entry[0] += value
                    entry[1] += share
    merged: dict[tuple[str, str], list[float]] = {}
    for part in distributed.gather(sums):
        for key, (value, share) in part.items():
            entry = merged.setdefault(key, [0.0, 0.0])
            entry[0] += value
            entry[1] += share
    return {mode: _score(merged, mode) for mode in modes}


def _score(sums: dict[tuple[str, str], list[float]], mode: str) -> Score:
    mine = {source: pair for (m, source), pair in sorted(sums.items()) if m == mode}
    total, tokens = (sum(pair[i] for pair in mine.values()) for i in (0, 1))
    return Score(total / max(tokens, 1.0), tokens, {source: v / w for source, (v, w) in mine.items()})


def attention_entropy(weights: Tensor) -> float:
    """How spread out attention is: the mean entropy of weights [..., N] over its most, ln N; 1 is uniform."""
    entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1)
    return float(entropy.mean() / torch.log(torch.tensor(float(weights.shape[-1]))))


def score_table(scores: dict[str, Score], facts: dict[str, float]) -> list[str]:
    """The end of a run in a few lines: validation loss by mode and source, and what the task itself measures."""
    sources = sorted({source for score in scores.values() for source in score.by_source})
    lines = [f"{'validation loss':<22}" + "".join(f"{s:>12}" for s in ("all", *sources))] if scores else []
    for mode, score in scores.items():
        values = [score.loss, *(score.by_source[s] for s in sources)]
        lines.append(f"  {mode:<20}" + "".join(f"{value:12.4f}" for value in values))
    return lines + [f"  {name:<40}{value:10.4f}" for name, value in facts.items()]
