"""The losses: weighted sums of the model's nll [S].

The loss of a pack is a SUM, with the weight that it is a sum over. The engine sums the weights of all ranks and
accumulation steps and divides once, so that ranks, accumulation and packing do not change the gradient.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fovlm.data.packing import Batch


@dataclass
class Loss:
    """`total` is a differentiable sum (0-d), `parts` further sums over the same weight, to be logged."""

    total: Tensor
    parts: dict[str, Tensor]


def text_weight(batch: Batch) -> Tensor:
    """The weight of a pack under the text loss: that of its tokens that are predicted (0-d)."""
    return (batch.weight * (batch.predict_from >= 0)).sum()


def text_loss(nll: Tensor, batch: Batch) -> Loss:
    """The sum of the weighted tokens' nll [S]."""
    return Loss((nll * batch.weight).sum(), {})


def per_sample(nll: Tensor, batch: Batch) -> Tensor:
    """Each sample's weighted nll f32 [samples]."""
    sums = nll.new_zeros(len(batch.keys) + 1)  # the last one collects the padding
    segment = torch.where(batch.text_segment < 0, len(batch.keys), batch.text_segment)
    return sums.index_add(0, segment, nll * batch.weight)[:-1]


def pair_weight(batch: Batch) -> Tensor:
    """The weight of a pack under the preference loss: its pairs (0-d)."""
    return torch.tensor(float(len(_pairs(batch))), device=batch.weight.device)


def preference_loss(nll: Tensor, reference_nll: Tensor, batch: Batch, beta: float) -> Loss:
    """Direct preference optimisation (arXiv 2305.18290, equation 7), summed over the pack's pairs.

    `nll` and `reference_nll` [S] are those of the model and of its frozen start on the same pack.
    """
    pairs = _pairs(batch)
    # log-ratio of model to reference per sample; nll is -log p
    ratio = per_sample(reference_nll, batch) - per_sample(nll, batch)
    each = ratio.unbind()  # a list of indices would be copied to the device
    margin = beta * torch.stack([each[c] - each[r] for c, r in pairs]) if pairs else ratio[:0]
    # A pack without a pair still has a backward pass: a rank that skips it makes ZeRO hang.
    total = -nnf.logsigmoid(margin).sum() + 0.0 * nll.sum()
    return Loss(total, {"preferred": (margin > 0).sum().float()})


def _pairs(batch: Batch) -> list[tuple[int, int]]:
    """(chosen, rejected) sample numbers, which are consecutive."""
    return [(i, i + 1) for i, role in enumerate(batch.roles) if role == "chosen"]
