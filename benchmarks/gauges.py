"""What the benchmark of a step measures beside time: launches, waits, waiting for data; and versions."""

import os
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LAUNCH = re.compile(r"cu(da)?(LaunchKernel|GraphLaunch|MemcpyAsync|MemsetAsync)")  # of CUDA's runtime and its driver


def counts(step: Callable[[], Any], device: torch.device, mode: str) -> dict[str, int | str]:
    """Launches and waits of a step; of a CPU the launches alone, since host and device are one there."""
    if device.type == "cpu":
        from benchmarks.launches import Count

        with Count() as count:
            step()
        return {"launches": sum(count.launches.values()) if mode == "eager" else "", "waits": ""}
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
    launches = sum(event.count for event in profile.key_averages() if LAUNCH.match(event.key))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return {"launches": launches, "waits": sum("synchronizing" in str(warning.message) for warning in found)}


def loaded_packs(count: int, frames: int) -> Iterator[Any]:
    """Packs of so many clips of JPEG frames, from shards through the workers of the data loader, without end."""
    from benchmarks.loader import open_clips, write_clips
    from fovlm.data.dataloader import PackLoader
    from fovlm.data.packing import PackBudget

    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"FOVLM_DATA": folder, "FOVLM_CACHE": f"{folder}/cache"}
        write_clips(Path(folder), 8 * count, frames)
        workers = min(8, (os.cpu_count() or 2) - 1)
        clips = open_clips()
        cost = count * (32 * frames + int(clips.sizes(0, 1)[0, 2]))
        yield from PackLoader(clips, PackBudget(cost, 32), 1, workers=workers, pin=True)


def waiting(step: Callable[[], Any], packs: Iterator[Any], rounds: int) -> float:
    """The share of waiting when each step takes a pack from the loader first (and computes on its own)."""
    began, waited = time.perf_counter(), 0.0
    for _ in range(rounds):
        asked = time.perf_counter()
        next(packs)
        waited += time.perf_counter() - asked
        step()
        torch.cuda.synchronize()
    return round(waited / (time.perf_counter() - began), 3)


def versions() -> dict[str, str]:
    """Of Python, and of the packages that a step depends on."""
    found = {"python": platform.python_version()}
    for package in ("transformers", "deepspeed"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
