"""Collectives that also work without a process group: then there is one rank."""

import re
import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fovlm.errors import UserError, format_error

T = TypeVar("T")


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective call failed because another rank has ended."""
    return re.search(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe", str(error)) is not None


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: list[float] | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Each value summed over the ranks: f64 [n] on `device`."""
    tensor = torch.as_tensor(values, dtype=torch.float64, device=device).clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank. Waits for the ranks, but not for their GPUs."""
    return bool(sum_over_ranks([float(flag)])[0])


def gather(value: Any) -> list[Any]:
    """The picklable values of all ranks, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


class SharedError(UserError):
    """A user error that every rank has: rank 0 prints it, the others exit silently."""


def collective_call(work: Callable[[], T]) -> T:
    """Call `work` on every rank; a UserError on any of them is raised as SharedError on all.

    So is an OSError that a path from the user causes. Another exception is raised as it is on its rank, and as
    SharedError on the others: nobody is left waiting.
    """
    result, problem = None, f"rank {rank()} failed, see its traceback"
    try:
        result, problem = work(), ""
    except (UserError, OSError) as error:
        if not (line := format_error(error)):
            raise
        problem = line
    finally:
        problems = gather(problem)
    if problem := next((p for p in problems if p), ""):
        raise SharedError(problem)
    return cast(T, result)


def rank_zero_first(work: Callable[[], T]) -> T:
    """Call `work` on rank 0, then on the others, which find what it wrote to disk.

    A UserError on any rank is raised as SharedError on all: no rank is left waiting at a barrier.
    """
    result = collective_call(lambda: work() if rank() == 0 else None)
    return cast(T, collective_call(lambda: result if rank() == 0 else work()))


def check_same(value: Any, problem: str) -> None:
    """Raise SharedError with the names of the hosts where `value` is not that of rank 0, and `problem`."""
    found = gather((value, socket.gethostname()))
    if hosts := {host for other, host in found if other != found[0][0]}:
        raise SharedError(f"{', '.join(sorted(hosts))}: {problem}")
