"""What runs that are compared differ in, and whether that is more than the comparison asks about.

The seeds of a side may differ in nothing; a side and its baseline in the changes recorded with `versus:`; cells of a
grid in what their size, budget and architecture say. With any other difference nothing is decided.
"""

import functools
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from fovlm.report.runs import Evidence, RunRecord

SIZE = ("model.llm", "model.encoder", "model.query_dim")  # these and the next two are what the name of a cell says
BUDGET, ARCH = "train.flops", "model.visual"
LENGTH = ("train.samples", "train.steps", BUDGET)
# Settings that the data hash depends on: sides that differ in one of them have different hashes by design.
IN_DATA_HASH = {
    *(f"data.{key}" for key in ("sources", "mixture", "loss_on", "max_frames", "max_tokens", "image_frames", "seed")),
    *("data.generate", "model.question", "model.tokenizer", "model.llm"),
}


def confounds(evidence: Evidence, labels: Sequence[str], baseline: str = "") -> str:
    """What differs between the sides beyond the changes of those that are compared with `baseline`, or between the
    seeds of one; "" when nothing does."""
    faults = []
    for label in labels:
        runs = evidence.side(label)
        if paths := _paths(runs):
            faults.append(f"the seeds of {label} differ in {', '.join(paths)}")
        if _data_differs(runs):
            faults.append(f"the seeds of {label} were trained on different data")
    first = {label: evidence.side(label)[0] for label in labels}
    changes = (
        {c for label in labels if label != baseline for c in evidence.versus[label].changes} if baseline else set()
    )
    for label in first if baseline in first else ():
        differing = first[label].experiment.differs_from(first[baseline].experiment)
        missing = set(evidence.versus[label].changes) - set(differing) if label != baseline else ()
        if missing:
            faults.append(f"{label} does not differ from {baseline} in {', '.join(sorted(missing))}")
    runs = list(first.values())
    if other := sorted(set(_paths(runs)) - changes):
        faults.append(f"the runs also differ in {', '.join(other)}")
    if not IN_DATA_HASH & {".".join(change.split(".")[:2]) for change in changes} and _data_differs(runs):
        faults.append("the runs were trained on different data")
    return "; ".join(faults)


def grid_faults(cells: Sequence[RunRecord]) -> str:
    """Why runs of a grid are not what the sizes, budgets and architectures of their names say; "" when they are.

    A budget is one `train.flops` and a size one pair of backbones, each different from the others; nothing else may
    differ, nor the data. The architecture needs no check: a run is left out when its settings are of another.
    """
    faults = []
    budgets = grouped(cells, lambda run: run.budget, lambda run: run.experiment.train.flops)
    sizes = grouped(cells, lambda run: run.size, lambda run: [_setting(run, path) for path in SIZE])
    counts = grouped(cells, lambda run: run.size, lambda run: (run.arch, run.parameters))
    for budget, flops in budgets.items():
        if len(flops) > 1 or None in flops:
            faults.append(f"the cells of {budget} are not of one train.flops ({', '.join(map(str, flops))})")
    faults += [f"the cells of {size} are not of one model" for size, models in sizes.items() if len(models) > 1]
    faults += [
        f"{a} and {b} have the same train.flops" for a, b in combinations(budgets, 2) if budgets[a] == budgets[b]
    ]
    faults += [f"{a} and {b} are of one size" for a, b in combinations(counts, 2) if set(counts[a]) & set(counts[b])]
    if other := sorted(set(_paths(cells)) - {*SIZE, BUDGET, ARCH}):
        faults.append(f"the cells also differ in {', '.join(other)}")
    if _data_differs(cells):
        faults.append("the cells were trained on different data")
    return "; ".join(faults)


def scaled_label(evidence: Evidence) -> str:
    """The baseline whose seeds show the noise of a grid: it differs from the cells in size, length and architecture
    alone, data included. "" where there is none; among several the one with most seeds."""
    cells = evidence.cells
    likely = [
        run.label
        for run in evidence.runs
        if cells and not run.is_cell and run.label not in evidence.versus
        if set(run.experiment.differs_from(cells[0].experiment)) <= {*SIZE, *LENGTH, ARCH}
        if not _data_differs([run, cells[0]])
    ]
    return max(likely, key=likely.count, default="")


def _setting(run: RunRecord, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), run.experiment)


def _paths(runs: Sequence[RunRecord]) -> list[str]:
    """Key paths in which any of the runs differs from the first."""
    return sorted({path for run in runs for path in run.experiment.differs_from(runs[0].experiment)})


def _data_differs(runs: Sequence[RunRecord]) -> bool:
    return len({run.summary.get("data_hash") for run in runs}) > 1


def grouped(
    runs: Sequence[RunRecord], key: Callable[[RunRecord], str], of: Callable[[RunRecord], Any]
) -> dict[str, list[Any]]:
    """For each key the different values that its runs have."""
    found: dict[str, list[Any]] = {}
    for run in runs:
        values, value = found.setdefault(key(run), []), of(run)
        if value not in values:
            values.append(value)
    return found
