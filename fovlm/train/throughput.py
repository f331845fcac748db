"""What a run measures about itself between two log steps: speed, waiting, memory, use of the GPU."""

import resource
import time
from collections.abc import Iterator
from typing import TypeVar

import torch

from fovlm import distributed
from fovlm.checkpoint.store import State
from fovlm.estimate.flops import peak_flops

T = TypeVar("T")


class Throughput:
    """Counts from one log step to the next; `state` is the run's at the start.

    `flops_per_sample` is the model's own FLOPs of the mean sample, forward and backward, without padding and
    recomputation; None where they are not known.
    """

    def __init__(self, state: State, device: torch.device, flops_per_sample: float | None):
        self.device, self.flops_per_sample = device, flops_per_sample
        self.peak_flops = peak_flops(device_name(device))
        self._restart(state)

    def _restart(self, state: State) -> None:
        self.began, self.waited = time.monotonic(), 0.0
        self.step, self.samples, self.tokens = state.step, state.samples, state.tokens

    def next_of(self, items: Iterator[T]) -> T:
        """The next item; the time it takes counts as waiting for data."""
        began = time.monotonic()
        item = next(items)
        self.waited += time.monotonic() - began
        return item

    def metrics(self, state: State) -> dict[str, float]:
        """Metrics since the last call: samples and weighted tokens per second over all ranks, seconds per step, this
        rank's share of time spent waiting for data, its peak memory in GB, and MFU where the GPU is known."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        row = {
            "samples_per_second": (state.samples - self.samples) / seconds,
            "tokens_per_second": (state.tokens - self.tokens) / seconds,
            "seconds_per_step": seconds / max(state.step - self.step, 1),
            "waiting": self.waited / seconds,
            "memory_gb": memory_gb(self.device),
        }
        if self.peak_flops and self.flops_per_sample:
            row["mfu"] = row["samples_per_second"] * self.flops_per_sample / (self.peak_flops * distributed.world())
        self._restart(state)
        return row


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def memory_gb(device: torch.device) -> float:
    """This rank's peak memory so far in GB: the GPU's allocated tensors, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
