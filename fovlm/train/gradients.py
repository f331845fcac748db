"""The gradients of ZeRO-1 and 2 on their way into the optimizer: what is ours of it, in place of DeepSpeed 0.19.8's.

DeepSpeed's objects are patched, since it has no hooks for any of this. `tests/train/test_engine.py` compares all stages
with plain PyTorch.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fovlm import distributed

ROW = 256  # numbers whose squares are summed in fp32, one after the other on a CPU
PIECE = 1 << 23  # bytes that a CPU joins or sends at a time: they fit its cache
GPU_PIECE = 1 << 27  # bytes that a GPU joins and sends at a time, since every piece costs it launches


def lighten(optimizer: Any, stage: int, offload: bool) -> None:
    """Replace what DeepSpeed does parameter by parameter, or more often than needed. Gradients are summed over ranks.

    A gradient that is not finite makes the norm so, and the step is skipped on that: nothing needs to look at every
    gradient first. The norm is a few calls. With offload in bf16, DeepSpeed adds the gradients of the next step to
    those of a skipped one, and then skips every step. Without offload, `Gradients` adds them up.
    """

    def norm(gradients: list[Tensor], parameters: Any, norm_type: int = 2) -> Tensor:
        total = square_sum([g for g in gradients if not getattr(g, "_zero_padding", False)], optimizer.device)
        total = distributed.sum_over_ranks(total, total.device).sqrt().float()
        return torch.where(total.isfinite(), total, -1.0)  # DeepSpeed's sign of a norm that is not finite

    def reset_offload() -> None:
        reset()
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    optimizer.gradient_average = False
    optimizer.check_overflow = lambda partition_gradients=True: None
    optimizer.get_grad_norm_direct = norm
    if offload:
        reset = optimizer.reset_cpu_buffers
        optimizer.reset_cpu_buffers = reset_offload
    else:
        Gradients(optimizer, whole=stage == 1).install()


def square_sum(tensors: list[Tensor], device: torch.device | str) -> Tensor:
    """The sum of the squares of all numbers f64 (0-d): in fp32 within a row, in fp64 over the rows.

    fp64 throughout would copy every tensor; fp32 over a million equal numbers is 0.1 % off.
    """
    flat = [t.detach().view(-1) for t in tensors]
    rows = [part for t in flat for part in (t[: len(t) // ROW * ROW].view(-1, ROW), t[None, len(t) // ROW * ROW :])]
    norms = [torch.linalg.vector_norm(part, dim=1) for part in rows]
    return torch.cat([torch.zeros(1, device=device), *norms]).double().square().sum()


class Gradients:
    """The gradients of all parameters, one fp32 tensor a group, in which the micro-steps of a step are added up.

    DeepSpeed copies each gradient three times, in four calls each: to a bucket, from it, and into the optimizer's flat
    gradient. Here they are joined in pieces, and each piece is added. With `whole` (ZeRO-1) the tensor is the whole
    gradient, and the ranks reduce it once a step. Else (ZeRO-2) it is this rank's share, and they reduce every piece.
    """

    def __init__(self, optimizer: Any, whole: bool):
        self.optimizer, self.whole = optimizer, whole
        self.groups: list[list[Tensor]] = optimizer.round_robin_bit16_groups
        self.shares = 1 if whole else distributed.world()
        sizes = [len(flat) // self.shares for flat in optimizer.bit16_groups_flat]
        self.sums = [torch.zeros(size, dtype=torch.float32, device=optimizer.device) for size in sizes]
        self.added = 0  # micro-steps in `sums`

    def install(self) -> None:
        """Take the place of DeepSpeed's hooks, buckets and sums."""
        for hook in self.optimizer._grad_acc_hooks:
            hook.remove()
        self.optimizer._grad_acc_hooks.clear()
        self.optimizer.reduce_gradients = lambda pipeline_parallel=False: None  # ZeRO-1
        self.optimizer.overlapping_partition_gradients_reduce_epilogue = lambda: None  # ZeRO-2
        self.optimizer.backward_epilogue = self.add

    @torch.no_grad()
    def add(self) -> None:
        """Add up the parameters' gradients after a backward pass; after the last one of a step hand them over."""
        for group, total in zip(self.groups, self.sums, strict=True):
            gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).view(-1) for p in group]
            begin = 0
            for parts in pieces(gradients, self.shares, len(total)):
                old = total[begin : begin + sum(map(len, parts)) // self.shares]
                begin += len(old)
                if self.shares == 1 and not self.added and parts[0].dtype == old.dtype:
                    torch.cat(parts, out=old)
                    continue
                new = torch.cat(parts)
                if not self.whole:
                    new = own_share(new.to(self.optimizer.communication_data_type))
                old.add_(new) if self.added else old.copy_(new)
            for p in group:
                p.grad = None
        self.added += 1
        if self.optimizer.is_gradient_accumulation_boundary():
            self.added = 0
            shares = [own_share(total) if self.whole else total for total in self.sums]
            self.optimizer.averaged_gradients = {i: Partition(share) for i, share in enumerate(shares)}


def pieces(gradients: list[Tensor], shares: int, size: int) -> Iterator[list[Tensor]]:
    """The gradients, zeros behind them, as `shares` shares of `size` numbers -> what to join, some MB each.

    A piece holds the same places of every share, one share after the other.
    """
    most = PIECE if gradients[0].device.type == "cpu" else GPU_PIECE
    step = -(-most // (gradients[0].itemsize * shares))
    found: list[list[list[Tensor]]] = [[[] for _ in range(shares)] for _ in range(0, size, step)]
    padding = gradients[0].new_zeros(shares * size - sum(len(g) for g in gradients))
    at = 0
    for rest in [*gradients, padding]:
        while len(rest):
            share, place = divmod(at, size)
            part, rest = rest.tensor_split([min(step - place % step, size - place)])
            found[place // step][share].append(part)
            at += len(part)
    return (list(chain(*piece)) for piece in found)


def own_share(flat: Tensor) -> Tensor:
    """This rank's share of a tensor that has as many as there are ranks, summed over them; the others are undefined."""
    share = flat.chunk(distributed.world())[distributed.rank()]
    if distributed.world() > 1 and flat.device.type == "cpu":
        dist.all_reduce(flat)  # gloo's reduce_scatter takes three times the processor time of this
    elif distributed.world() > 1:
        dist.reduce_scatter_tensor(share, flat)
    return share


class Partition(list):
    """What DeepSpeed's optimizer step takes for the gradient of a group: a list, and the same as one flat tensor."""

    def __init__(self, flat: Tensor):
        super().__init__([flat])
        self.flat_partition = flat


def gather_weights(partitioned_param_groups: list[list[Tensor]], **unused: Any) -> None:
    """Send every rank's share of the weights to all: DeepSpeed's `all_gather_dp_groups`, for gloo.

    Broadcasts of pieces take a third of the processor time of gloo's all_gather, which also copies.
    """
    for shares in partitioned_param_groups:
        for source, share in enumerate(shares):
            for piece in share.detach().view(torch.uint8).split(PIECE):
                dist.broadcast(piece, source)
