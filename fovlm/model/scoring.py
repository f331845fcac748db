"""The weighted loss of a pack from hidden states, with its gradient in the same pass.

The logits of NLL_CHUNK tokens exist at a time, and are computed once: since the loss is a sum with known weights, its
gradient by the logits is known with them. So the forward pass also gives the gradients by the hidden states and by the
output embeddings, up to the factor that the backward pass brings.

Letters: S text tokens, s of a chunk, E width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from fovlm.model.modes import NLL_CHUNK


def nll_and_slope(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [s, V] -> the nll f32 [s] of the targets, and the gradient [s, V] of the sum of weight * nll."""
    log_p = logits.float().log_softmax(-1)
    target, weight = target[:, None], weight[:, None].to(log_p.dtype)
    nll = -log_p.gather(1, target)[:, 0]
    slope = log_p.exp_().mul_(weight)  # in place: further fp32 copies of the logits would be the peak of a step
    return nll, slope.scatter_add_(1, target, -weight).to(logits.dtype)


class WeightedNll(torch.autograd.Function):
    """Sum of weight * nll (0-d) of hidden states [S, E] under output embeddings [V, E]. It has one backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, target: Tensor, weight: Tensor, score: Any = nll_and_slope
    ) -> Tensor:
        of_hidden, of_head, nll = [], None, []
        for h, t, w in zip(*(x.split(NLL_CHUNK) for x in (hidden, target, weight)), strict=True):
            logits = nnf.linear(h, head)
            h, matrix = h.to(logits.dtype), head.to(logits.dtype)  # under autocast they differ
            scored, slope = score(logits, t, w)
            nll.append(scored)
            del logits
            if ctx.needs_input_grad[0]:
                of_hidden.append(slope @ matrix)
            if ctx.needs_input_grad[1]:
                of_head = slope.t() @ h if of_head is None else of_head.addmm_(slope.t(), h)
        ctx.gradients = torch.cat(of_hidden).to(hidden.dtype) if of_hidden else None, of_head
        ctx.head_dtype = head.dtype
        return (torch.cat(nll) * weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the weighted loss of a pack has one backward pass")
        (of_hidden, of_head), ctx.gradients = ctx.gradients, None
        if of_hidden is not None:
            of_hidden.mul_(slope)
        if of_head is not None:
            of_head = of_head.mul_(slope).to(ctx.head_dtype)
        return of_hidden, of_head, None, None, None
