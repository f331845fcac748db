"""What a run measures about itself between two rows of the journal: speed, waiting, memory."""

import contextlib
import resource
import time
from collections.abc import Iterator

import torch

from fovlm.checkpoint.store import State


class Throughput:
    """Counts from one row to the next. `state` is the run's when it begins."""

    def __init__(self, state: State):
        self.began, self.waited = time.monotonic(), 0.0
        self.step, self.samples, self.tokens = state.step, state.samples, state.tokens

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is time without work for the model."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def speeds(self, state: State) -> dict[str, float]:
        """Samples and weighted tokens a second of all ranks, seconds a step, and this rank's share of waiting."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        return {
            "samples_per_second": (state.samples - self.samples) / seconds,
            "tokens_per_second": (state.tokens - self.tokens) / seconds,
            "seconds_per_step": seconds / max(state.step - self.step, 1),
            "waiting": self.waited / seconds,
        }


# Dense bf16 FLOP/s by the vendor's data sheets; the first name that the device's own name holds counts.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def peak_flops(device: torch.device) -> float | None:
    """What the GPU could do in dense bf16, FLOP/s; None for a CPU or a GPU that is not in the list."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def device_name(device: torch.device) -> str:
    """The GPU's own name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def memory_gb(device: torch.device) -> float:
    """This rank's peak memory so far in GB: the GPU's allocated tensors, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
