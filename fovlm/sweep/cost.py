"""`fovlm sweep --dry-run`: samples and FLOPs of every run, and what they cost in time and money.

Time is FLOPs over measured speed: that of the finished runs in `runs.csv`, from their first step to their last,
validation and checkpoints included, of the same size and visual mode if there are any, else of the same size. Start-up
and other load on that machine are not included.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fovlm.data.packing import PackSize
from fovlm.errors import few
from fovlm.estimate.dry_run import length, metric, sizes_of
from fovlm.estimate.shapes import geometry
from fovlm.sweep.progress import duration, read_progress
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
    """What is left to do of a run. `upper_bound_since`: why samples count as large as the settings allow, or ""."""

    run: PlannedRun
    status: str
    samples: float
    flops: float
    upper_bound_since: str
    speed: Speed | None
    ranks: int

    @property
    def rank_seconds(self) -> float:
        """Seconds times ranks; NaN when the speed is unknown."""
        return self.flops / self.speed.flops_per_second if self.speed else math.nan

    @property
    def seconds(self) -> float:
        return self.rank_seconds / self.ranks


def estimates(
    planned: Iterable[PlannedRun], table: Mapping[str, Mapping[str, str]], ranks: int, on_gpu: bool, given: float | None
) -> list[Estimate]:
    """What is left to do, with `ranks` ranks per run. `table` is runs.csv; `given`, FLOP/s of a rank, replaces it.
    Raises UserError for models whose shapes are not known without a download."""
    known: dict[str, tuple[list[PackSize], str]] = {}  # runs that share their data share the sizes
    found = []
    for run in planned:
        key = run.experiment.model_dump_json(include={"data": True, "model": {"question", "llm", "tokenizer"}})
        if key not in known:
            known[key] = sizes_of(run.experiment)
        sizes, unknown_since = known[key]
        whole = length(run.experiment, geometry(run.experiment.model), sizes)
        status = run_status(run)
        left = {"finished": 0.0, "resumable": 1.0 - read_progress(run)[0]}.get(status, 1.0)
        speed = Speed(given) if given else _measured(run, table, on_gpu)
        found.append(Estimate(run, status, whole.samples * left, whole.flops * left, unknown_since, speed, ranks))
    return found


def _measured(run: PlannedRun, table: Mapping[str, Mapping[str, str]], on_gpu: bool) -> Speed | None:
    """The median speed of finished runs of this size on the same kind of device."""
    size, visual = size_of(run.experiment), run.experiment.model.visual
    same = [
        row
        for row in table.values()
        if row["status"] == "finished" and row["size"] == size and (row["device"] != "cpu") == on_gpu
        and row["flops"] and float(row["wall_seconds"] or 0) > 0
    ]  # fmt: skip
    same = [row for row in same if row["visual"] == visual] or same
    if not same:
        return None
    speeds = [float(row["flops"]) / float(row["wall_seconds"]) / int(row["ranks"]) for row in same]
    return Speed(statistics.median(speeds), tuple(row["name"] for row in same))


def describe(found: list[Estimate], slots: int, price: float | None, on_gpu: bool) -> str:
    """The table of runs, the total when `slots` runs go at a time, and the sources of the numbers.

    `price` is that of one GPU (or CPU process) for an hour.
    """
    one = "GPU" if on_gpu else "process"
    head = ["run", "status", "samples", "FLOPs", "time", f"{one} hours", *(["cost"] if price is not None else [])]
    rows = [head]
    for e in found:
        rows.append([e.run.name, e.status, *_cells(e.samples, e.flops, e.seconds, e.rank_seconds, price)])
    left = [e for e in found if e.status != "finished"]
    time = _scheduled([e.seconds for e in left], slots)
    sums = (sum(e.samples for e in left), sum(e.flops for e in left), time, sum(e.rank_seconds for e in left))
    total = _cells(*sums, price)
    lines = [text_table([*rows, ["all", "to do", *total]])]
    if slots > 1 and not math.isnan(time):
        lines.append(f"{slots} runs at a time")
    if bounded := [e for e in left if e.upper_bound_since]:
        lines.append(
            f"{few([e.run.name for e in bounded])}: every sample counts as large as the settings allow, so FLOPs are "
            f"AT MOST these (and samples at least, where FLOPs are given), since {bounded[0].upper_bound_since}"
        )
    for speed in dict.fromkeys(e.speed for e in left if e.speed and e.speed.measured):
        lines.append(f"time from {metric(speed.flops_per_second)}FLOP/s per {one}, measured on {few(speed.measured)}")
    if unknown := [e.run.name for e in left if e.speed is None]:
        lines.append(
            f"no time for {few(unknown)}: no finished run in runs.csv has their size; --flops-per-second sets the "
            f"speed of one {one}"
        )
    return "\n".join(lines)


def _cells(samples: float, flops: float, seconds: float, rank_seconds: float, price: float | None) -> list[str]:
    hours = rank_seconds / 3600
    known = [duration(seconds), f"{hours:,.2f}", f"{hours * (price or 0):,.2f}"] if hours == hours else ["?"] * 3
    return [f"{samples:,.0f}", metric(flops), *known[: 2 if price is None else 3]]


def _scheduled(seconds: list[float], slots: int) -> float:
    """Time until all end when each run, in order, takes the slot that is free first; NaN when one is unknown."""
    ends = [0.0] * slots
    for one in seconds:
        ends[ends.index(min(ends))] += 0.0 if math.isnan(one) else one
    return math.nan if any(map(math.isnan, seconds)) else max(ends)
