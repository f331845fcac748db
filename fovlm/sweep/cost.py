"""What `fovlm run --dry-run` says: the samples and FLOPs of every run, and what they take in time and money.

Time is FLOPs over the speed that was measured: what the finished runs of `runs.csv` achieved from their first step to
their last, validation and checkpoints included. Of the same size and way of looking if there are such, else of the same
size. Start-up, and whatever else ran on that machine, is not known here.
"""

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fovlm.checkpoint.run_folder import read_metrics
from fovlm.data.packing import PackSize
from fovlm.estimate.dry_run import known_sizes, length, metric
from fovlm.estimate.shapes import geometry
from fovlm.sweep.progress import span
from fovlm.sweep.select import PlannedRun, run_status
from fovlm.sweep.table import size_of
from fovlm.tables import text_table


@dataclass(frozen=True)
class Speed:
    """FLOP/s of one rank, and the runs it was measured on; none when it was given."""

    flops_per_second: float
    measured: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """What is left to do of a run. `why_at_most`: why samples are taken to be as large as they may be, or ""."""

    run: PlannedRun
    status: str
    samples: float
    flops: float
    why_at_most: str
    speed: Speed | None
    ranks: int

    @property
    def rank_seconds(self) -> float | None:
        """Seconds times ranks."""
        return self.flops / self.speed.flops_per_second if self.speed else None

    @property
    def seconds(self) -> float | None:
        return None if self.rank_seconds is None else self.rank_seconds / self.ranks


def estimates(
    planned: Iterable[PlannedRun], table: Mapping[str, Mapping[str, str]], ranks: int, on_gpu: bool, given: float | None
) -> list[Estimate]:
    """What is left to do, for `ranks` ranks a run. `table` is runs.csv, `given` a speed instead: FLOP/s of a rank.

    Raises UserError for models whose shapes only the hub knows.
    """
    known: dict[str, tuple[list[PackSize], str]] = {}  # runs that share their data share the sizes
    found = []
    for run in planned:
        key = run.experiment.model_dump_json(include={"data": True, "model": {"question", "llm", "tokenizer"}})
        if key not in known:
            known[key] = known_sizes(run.experiment)
        sizes, why_not = known[key]
        long = length(run.experiment, geometry(run.experiment.model), sizes)
        how = run_status(run)
        left = {"finished": 0.0, "begun": 1.0 - _progress(run)}.get(how, 1.0)
        speed = Speed(given) if given else _measured(run, table, on_gpu)
        found.append(Estimate(run, how, long.samples * left, long.flops * left, why_not, speed, ranks))
    return found


def _progress(run: PlannedRun) -> float:
    return next((row["progress"] for row in reversed(read_metrics(run.folder)) if "progress" in row), 0.0)


def _measured(run: PlannedRun, table: Mapping[str, Mapping[str, str]], on_gpu: bool) -> Speed | None:
    """The median speed of finished runs like this one, on the same kind of device."""
    size, visual = size_of(run.experiment), run.experiment.model.visual
    alike = [
        row
        for row in table.values()
        if row["status"] == "finished" and row["size"] == size and (row["device"] != "cpu") == on_gpu
        and row["flops"] and float(row["wall_seconds"] or 0) > 0
    ]  # fmt: skip
    alike = [row for row in alike if row["visual"] == visual] or alike
    if not alike:
        return None
    speeds = [float(row["flops"]) / float(row["wall_seconds"]) / int(row["ranks"]) for row in alike]
    return Speed(statistics.median(speeds), tuple(row["name"] for row in alike))


def describe(found: list[Estimate], slots: int, price: float | None, on_gpu: bool) -> str:
    """The table, what all of it takes in `slots` places side by side, and where the numbers are from.

    `price` is that of one GPU (or CPU process) for an hour.
    """
    hours = "GPU hours" if on_gpu else "process hours"
    head = ["run", "is", "samples", "FLOPs", "time", hours, *(["cost"] if price is not None else [])]
    to_do = [e for e in found if e.status != "finished"]
    time = _side_by_side([e.seconds for e in to_do], slots)
    samples, flops = sum(e.samples for e in to_do), sum(e.flops for e in to_do)
    everything = _cells(samples, flops, time, _sum([e.rank_seconds for e in to_do]), price)
    rows = [*(_row(e, price) for e in found), ["all", "to do", *everything]]
    lines = [text_table([head, *rows])]
    if slots > 1 and time is not None:
        lines.append(f"{slots} runs at a time")
    if guessed := [e for e in to_do if e.why_at_most]:
        lines.append(
            f"{_few([e.run.name for e in guessed])}: every sample taken as large as the settings allow, so FLOPs "
            f"are AT MOST these (and samples at least, where FLOPs are given), since {guessed[0].why_at_most}"
        )
    for speed in dict.fromkeys(e.speed for e in to_do if e.speed and e.speed.measured):
        one = "GPU" if on_gpu else "process"
        lines.append(f"time from {metric(speed.flops_per_second)}FLOP/s of one {one}, as {_few(speed.measured)} ran")
    if unknown := [e.run.name for e in to_do if e.speed is None]:
        lines.append(
            f"no time for {_few(unknown)}: no finished run in runs.csv has their size; --flops-per-second says what "
            f"one {'GPU' if on_gpu else 'process'} achieves"
        )
    return "\n".join(lines)


def _row(e: Estimate, price: float | None) -> list[str]:
    return [e.run.name, e.status, *_cells(e.samples, e.flops, e.seconds, e.rank_seconds, price)]


def _cells(
    samples: float, flops: float, seconds: float | None, rank_seconds: float | None, price: float | None
) -> list[str]:
    hours = None if rank_seconds is None else rank_seconds / 3600
    times = ["?", "?"] if seconds is None or hours is None else [span(seconds), f"{hours:,.2f}"]
    costs = [] if price is None else ["?" if hours is None else f"{hours * price:,.2f}"]
    return [f"{samples:,.0f}", metric(flops), *times, *costs]


def _side_by_side(seconds: list[float | None], slots: int) -> float | None:
    """How long it takes when each run, in order, goes to the place that is free first; None when one is unknown."""
    ends = [0.0] * slots
    for one in seconds:
        if one is None:
            return None
        first = ends.index(min(ends))
        ends[first] += one
    return max(ends)


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def unless_told() -> tuple[int, bool]:
    """Ranks that launch.sh gives a run that nobody gave a place, and whether they are GPUs."""
    gpus = int(os.environ.get("NUM_GPUS", torch.cuda.device_count()))
    return gpus or int(os.environ.get("CPU_RANKS", 2)), gpus > 0
