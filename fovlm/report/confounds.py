"""What runs that are compared may differ in, and what they may not: the recorded settings key by key, and the data.

The seeds of a side may differ in nothing, sides in what is asked, cells of a grid in what their size, budget and
architecture say. Anything else is told, and then nothing is decided, whatever the numbers.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

from fovlm.config.schema import NOT_HASHED, Experiment
from fovlm.report.collect import Evidence, RunRecord

# Settings that are no difference between sides: seeds, and how a run is carried out (`config.HOW`).
APART_FROM = {"name", "note", "seeds", "logger", "train.seed", "deepspeed"}
APART_FROM |= {f"{section}.{key}" for section, keys in NOT_HASHED.items() for key in keys}
SIZE = ("model.llm", "model.encoder", "model.query_dim")  # these and the next two are what the words of a cell say
BUDGET, ARCH = "train.flops", "model.visual"
LENGTH = ("train.samples", "train.steps", BUDGET)


def differing(a: Experiment, b: Experiment) -> list[str]:
    """Key paths in which two runs differ, apart from seeds and how they are carried out."""
    fa, fb = _flat(a.model_dump()), _flat(b.model_dump())
    paths = sorted(key for key in fa.keys() | fb.keys() if fa.get(key) != fb.get(key))
    return _outside(paths, APART_FROM)


def confounds(evidence: Evidence, roles: Sequence[str], varies: Sequence[str]) -> str:
    """What else than `varies` differs between sides, and anything that differs between the seeds of one; "" when
    nothing does."""
    said = []
    for role in roles:
        runs = evidence.side(role)
        if paths := _paths(runs):
            said.append(f"the seeds of {role} differ in {', '.join(paths)}")
        if _of_many_data(runs):
            said.append(f"the seeds of {role} were trained on different data")
    runs = [run for role in roles for run in evidence.side(role)[:1]]
    if other := _outside(_paths(runs), varies):
        said.append(f"the runs also differ in {', '.join(other)}")
    if not {"data.mixture", "data.image_frames"} & set(varies) and _of_many_data(runs):  # the hash has both
        said.append("the runs were trained on different data")
    return "; ".join(said)


def grid_faults(cells: Sequence[RunRecord]) -> str:
    """Why runs of a grid are not what the sizes, budgets and architectures of their names say; "" when they are.

    A budget is one `train.flops` and a size one pair of backbones, each different from the others; nothing else may
    differ, nor the data. The architecture needs no check: a run is left out when its settings are of another.
    """
    said = []
    budgets = _grouped(cells, lambda run: run.budget, lambda run: run.experiment.train.flops)
    sizes = _grouped(cells, lambda run: run.size, _backbones)
    counts = _grouped(cells, lambda run: run.size, lambda run: (run.arch, run.parameters))
    for budget, flops in budgets.items():
        if len(flops) > 1 or None in flops:
            said.append(f"the cells of {budget} are not of one train.flops ({', '.join(map(str, flops))})")
    for size, models in sizes.items():
        if len(models) > 1:
            said.append(f"the cells of {size} are not of one model")
    said += [f"{a} and {b} have the same train.flops" for a, b in combinations(budgets, 2) if budgets[a] == budgets[b]]
    said += [f"{a} and {b} are of one size" for a, b in combinations(counts, 2) if set(counts[a]) & set(counts[b])]
    if other := _outside(_paths(cells), (*SIZE, BUDGET, ARCH)):
        said.append(f"the cells also differ in {', '.join(other)}")
    if _of_many_data(cells):
        said.append("the cells were trained on different data")
    return "; ".join(said)


def is_scaled(run: RunRecord, cell: RunRecord) -> bool:
    """Whether a run outside of a grid is like its cells in all but size, length and architecture, data included."""
    paths = differing(run.experiment, cell.experiment)
    return not _outside(paths, (*SIZE, *LENGTH, ARCH)) and not _of_many_data([run, cell])


def _backbones(run: RunRecord) -> tuple[Any, ...]:
    return run.experiment.model.llm, run.experiment.model.encoder, run.experiment.model.query_dim


def _paths(runs: Sequence[RunRecord]) -> list[str]:
    """Key paths in which any of the runs differs from the first."""
    return sorted({path for run in runs for path in differing(runs[0].experiment, run.experiment)})


def _outside(paths: Iterable[str], parts: Iterable[str]) -> list[str]:
    """The paths that neither are one of the parts nor below it."""
    return [path for path in paths if not any(path == part or path.startswith(part + ".") for part in parts)]


def _of_many_data(runs: Sequence[RunRecord]) -> bool:
    return len({run.summary.get("data_hash") for run in runs}) > 1


def _grouped(
    runs: Sequence[RunRecord], key: Callable[[RunRecord], str], of: Callable[[RunRecord], Any]
) -> dict[str, list[Any]]:
    """For each key the different values that its runs have."""
    found: dict[str, list[Any]] = {}
    for run in runs:
        values, value = found.setdefault(key(run), []), of(run)
        if value not in values:
            values.append(value)
    return found


def _flat(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{at}{key}.") if isinstance(value, dict) else {f"{at}{key}": value}
    return found
