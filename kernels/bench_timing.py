"""The clock of `kernels.bench`: work over buffers that together exceed the cache.

On a GPU one CUDA graph holds the work on every buffer, so that the host's launches are not in the time; on a CPU the
buffers take turns.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Implementation = Callable[[Inputs, "Tensor | None"], Tensor]


def buffers(nbytes: int, device: str) -> int:
    """How many buffers of so many bytes exceed the GPU's last cache by one, at least two; on a CPU 64 MiB."""
    cache = torch.cuda.get_device_properties().L2_cache_size if device == "cuda" else 64 << 20
    return max(2, -(-cache // nbytes) + 1)


def replays(work: Callable[[int], object], count: int, repeat: int) -> Tensor:
    """Microseconds [repeat] of `work` on one of `count` buffers: a graph of all of them, replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and chooses kernels, which a capture must not
        for number in range(2 * count):
            work(number % count)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            work(number)
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return torch.tensor([1e3 * a.elapsed_time(b) / count for a, b in itertools.pairwise(events)])


def measure(
    run: Implementation, sets: list[Inputs], looks: Tensor | None, grads: str, repeat: int, device: str
) -> tuple[dict[str, Tensor], float | None]:
    """Microseconds [3] (20 %, median, 80 %) of forward, backward and both; peak MB beside the inputs.

    On a GPU, backward is the time of both less that of forward.
    """
    leaves = [{n: t.detach().requires_grad_(grads == "all" or n == "query") for n, t in t.items()} for t in sets]
    slope = torch.randn_like(sets[0]["query"])

    def back(number: int, out: Tensor) -> None:
        torch.autograd.grad(out, [t for t in leaves[number].values() if t.requires_grad], slope)

    peak = None
    if device == "cuda":
        back(0, run(leaves[0], looks))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        back(0, run(leaves[0], looks))
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        forward = replays(lambda number: run(leaves[number], looks), len(sets), repeat)
        both = replays(lambda number: back(number, run(leaves[number], looks)), len(sets), repeat)
        backward = both - forward.median()
    else:
        times = []
        for number in range(repeat + 3):  # the first three warm up
            began = time.perf_counter()
            out = run(leaves[number % len(sets)], looks)
            seen = time.perf_counter()
            back(number % len(sets), out)
            times.append((1e6 * (seen - began), 1e6 * (time.perf_counter() - seen)))
        forward, backward = torch.tensor(times[3:]).T
        both = forward + backward
    cut = torch.tensor([0.2, 0.5, 0.8])
    modes = {"forward": forward, "backward": backward, "both": both}
    return {mode: spread.quantile(cut) for mode, spread in modes.items()}, peak


def copy_speed(nbytes: int, repeat: int, device: str) -> float:
    """GB/s of a copy that moves as many bytes (half of them read, half written)."""
    count = buffers(nbytes, device)
    sources = [torch.randn(nbytes // 8 + 1, device=device) for _ in range(count)]
    target = [source.clone() for source in sources]  # touched once already: no page faults in the times
    if device == "cuda":
        taken = replays(lambda number: target[number].copy_(sources[number]), count, repeat)
        return nbytes / taken.median().item() / 1e3
    times = []
    for number in range(repeat + 3):
        began = time.perf_counter()
        target[number % count].copy_(sources[number % count])
        times.append(1e6 * (time.perf_counter() - began))
    return nbytes / torch.tensor(times[3:]).median().item() / 1e3
