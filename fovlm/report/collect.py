"""Run folders as evidence: which runs are meant, what each of them is, and which may be compared at all.

A run is told by its settings (`experiment.yaml`), with its name as a label: nano-LR1-s2 is the role LR1 of the group
`nano-` with its own `train.seed`; a run of a grid is the cell of its sizes, its budget and its visual mode. Losses come
from `run_summary.json` and `metrics.jsonl` (`checkpoint/run_folder.py`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fovlm.checkpoint.run_folder import Row, read_metrics, read_summary
from fovlm.config.schema import Experiment
from fovlm.errors import UserError, did_you_mean
from fovlm.estimate import flops
from fovlm.estimate.shapes import geometry, parameters
from fovlm.paths import run_root
from fovlm.sweep import select

SEED = re.compile(r"-s\d+$")
CELL = re.compile(r"^(?P<group>.*?)(?P<size>[^-]+)-(?P<budget>C\d+)-(?P<arch>[A-Z])$")
ARCH = {"foveated": "F", "multi_token": "B", "coarse": "A6"}

# What the settings of an ablation must say for its name to be believed.
ROLES: dict[str, Callable[[Experiment], bool]] = {
    "F1": lambda e: "encoder" in e.optim.freeze and "llm" in e.optim.freeze,
    "F2": lambda e: "llm" in e.optim.freeze and "encoder" not in e.optim.freeze,
    "LR1": lambda e: _plain(e),
    "LR2": lambda e: _plain(e),
    "LR3": lambda e: _plain(e),
    "LR4": lambda e: _plain(e),
    "A1": lambda e: not e.model.deep_query and e.model.visual == "foveated",
    "A6": lambda e: e.model.visual == "coarse",
    "B1": lambda e: e.model.visual == "multi_token",
    "A8a": lambda e: _plain(e) and e.data.image_frames == 1,
    "A8b": lambda e: _plain(e) and e.data.image_frames > 1,
    "D1": lambda e: _plain(e) and len(e.data.mixture) > 1,
}
PICTURES = ("A8a", "A8b")  # on picture data, with a validation set of their own


@dataclass(frozen=True)
class RunRecord:
    """A finished run. `role` is one of ROLES, "" for a run of a grid or of no known role; `label` names its side."""

    name: str
    folder: Path
    experiment: Experiment
    summary: dict[str, Any]
    rows: list[Row]  # of its metrics
    group: str
    role: str
    size: str = ""  # the grid's words for size and budget
    budget: str = ""

    @property
    def seed(self) -> int:
        return self.experiment.train.seed

    @property
    def is_cell(self) -> bool:
        return bool(self.size)

    @property
    def arch(self) -> str:
        return ARCH[self.experiment.model.visual]

    @property
    def loss(self) -> float:
        """Validation loss as trained, nats, at the last step: not the lowest, which is lower the noisier a run is."""
        return float(self.summary["final"]["val_loss"])

    def mode(self, name: str) -> float | None:
        """The last validation loss in an evaluation mode."""
        value = self.summary["final"].get(f"val_loss_{name}")
        return None if value is None else float(value)

    @property
    def samples(self) -> float:
        return float(self.summary.get("samples") or self.summary["final"]["samples"])

    @property
    def flops_per_sample(self) -> float:
        """FLOPs of the mean sample, forward and backward: as recorded, or an upper bound from the settings."""
        recorded = self.summary.get("flops")
        return float(recorded) / self.samples if recorded else _bound(self.experiment)

    @property
    def parameters(self) -> int:
        """All parameters of backbones and connector that the visual mode uses, trained or frozen."""
        counts = parameters(self.experiment, geometry(self.experiment.model))
        return counts["connector"].trainable + sum(counts[k].trainable + counts[k].frozen for k in ("encoder", "llm"))

    @property
    def val_set(self) -> str:
        """What names the validation set: its recorded hash, or one made of the settings, told as such."""
        recorded = self.summary.get("val_hash")
        if recorded:
            return str(recorded)
        data, train = self.experiment.data, self.experiment.train
        said = [[s, data.sources[s].model_dump()] for s in data.val] + [
            [data.generate and data.generate.model_dump(), data.pack_frames, data.pack_tokens, train.eval_packs]
        ]
        return "unrecorded-" + hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]

    def curve(self, column: str) -> list[tuple[float, float]]:
        """(samples seen, value) of every row that has the column. A row's samples are those of its step."""
        points, samples = [], 0.0
        for row in self.rows:
            samples = row.get("samples", samples)
            if column in row and samples:
                points.append((samples, row[column]))
        return points


@dataclass
class Evidence:
    """What was given: runs to compare, and what was left out and why."""

    runs: list[RunRecord]
    left_out: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)

    def side(self, role: str) -> list[RunRecord]:
        """The runs of a role by seed."""
        return sorted((run for run in self.runs if run.role == role), key=lambda run: run.seed)

    @property
    def cells(self) -> list[RunRecord]:
        return [run for run in self.runs if run.is_cell]


def collect(words: Iterable[str]) -> Evidence:
    """Read the runs that the words name: run folders, folders of them, globs, names or groups as `fovlm run` knows.

    Raises UserError when a word names nothing, no run is finished, or runs that would be compared were scored on
    different validation sets or belong to different groups.
    """
    found: dict[Path, None] = {}
    for word in words:
        found |= dict.fromkeys(folder.resolve() for folder in _folders(word))
    runs, left_out = [], []
    for folder in found:
        run = _read(folder)
        if isinstance(run, RunRecord):
            runs.append(run)
        else:
            left_out.append((folder.name, run))
    runs, twice = _once(sorted(runs, key=_order))
    evidence = Evidence(runs, left_out + twice)
    if not runs:
        told = "; ".join(f"{name}: {reason}" for name, reason in evidence.left_out[:5])
        raise UserError(f"no finished run to report on ({told or 'no run folder'})")
    for kind in (
        [run for run in runs if run.role not in PICTURES],  # cells too: their noise may be that of LR1
        [run for run in runs if run.role in PICTURES],
    ):
        _same(kind)
    return evidence


def _folders(word: str) -> list[Path]:
    """The run folders that a word means, those of further seeds with it when it is a name."""
    roots = (Path(), run_root())
    for root in roots:
        path = root / word
        if (path / "experiment.yaml").is_file():
            return [path]
        if path.is_dir():
            inside = sorted(p.parent for p in path.glob("*/experiment.yaml"))
            if inside:
                return inside
        if path.is_file():
            return []  # a shell's `runs/*` also names runs.csv
    for root in roots:
        if any(c in word for c in "*?[") and not Path(word).is_absolute():
            inside = sorted(p.parent for p in root.glob(f"{word}/experiment.yaml"))
            if inside:
                return inside
    if Path(word).is_absolute() or word.startswith("."):
        raise UserError(f"no run folder, and no folder of runs: {word}")
    try:
        names = [name for _, name in select.select([word])]
    except UserError as error:
        known = [p.parent.name for p in run_root().glob("*/experiment.yaml")]
        where = f"here or in {run_root()}{did_you_mean(word, known)}"
        raise UserError(f"no run folder '{word}' {where}; {error}") from None
    inside = [p for name in names for p in _with_seeds(name)]
    if not inside:
        raise UserError(f"'{word}' has not been run: nothing of it in {run_root()} (fovlm run '{word}')")
    return inside


def _with_seeds(name: str) -> list[Path]:
    found = [p.parent for p in sorted(run_root().glob(f"{name}*/experiment.yaml"))]
    return [folder for folder in found if SEED.sub("", folder.name) == name]


def _read(folder: Path) -> "RunRecord | str":
    """A finished run, or why it is left out."""
    try:
        experiment = Experiment.parse((folder / "experiment.yaml").read_text(encoding="utf-8"))
    except (OSError, ValidationError, yaml.YAMLError) as error:
        return f"experiment.yaml can't be read ({type(error).__name__})"
    rows = read_metrics(folder)
    summary = read_summary(folder)
    status = summary.get("status", "no run_summary.json")
    if status != "finished":
        return f"not finished ({status}, last row at step {rows[-1]['step'] if rows else 0})"
    if not isinstance(summary.get("final"), dict) or "val_loss" not in summary["final"]:
        return "has no validation loss"
    name = SEED.sub("", experiment.name)
    group, dash, last = name.rpartition("-")
    if last in ROLES:
        if not ROLES[last](experiment):
            return f"its settings are not those of {last}"
        return RunRecord(experiment.name, folder, experiment, summary, rows, group + dash, last)
    cell = CELL.match(name)
    if cell and cell["arch"] == ARCH[experiment.model.visual]:
        return RunRecord(
            experiment.name, folder, experiment, summary, rows, cell["group"], "", cell["size"], cell["budget"]
        )
    if cell:
        return f"its name says architecture {cell['arch']}, its settings {ARCH[experiment.model.visual]}"
    return "is neither an ablation nor a run of a grid: no comparison asks for it"


def _once(runs: list[RunRecord]) -> tuple[list[RunRecord], list[tuple[str, str]]]:
    """Each side has each seed once: a copy is no further evidence."""
    kept: dict[tuple[str, str, str, str, str, int], RunRecord] = {}
    twice = []
    for run in runs:
        key = (run.group, run.role, run.size, run.budget, run.arch, run.seed)
        if key in kept:
            twice.append((run.name, f"has train.seed {run.seed} as {kept[key].name} has: a copy is no evidence"))
        else:
            kept[key] = run
    return list(kept.values()), twice


def _same(runs: list[RunRecord]) -> None:
    """Raises UserError unless all are of one group and were scored on one validation set."""
    sets = _by(runs, lambda run: f"{'+'.join(run.experiment.data.val)} {run.val_set}")
    if len(sets) > 1:
        told = "; ".join(f"[{name}] {_some(names)}" for name, names in sets.items())
        raise UserError(f"runs scored on different validation sets can't be compared: {told}; report on them apart")
    groups = _by(runs, lambda run: run.group)
    if len(groups) > 1:
        told = "; ".join(f"{_some(names)}" for names in groups.values())
        raise UserError(f"runs of different groups can't be compared: {told}; report on them apart")


def _order(run: RunRecord) -> tuple[bool, int, float, str, str, int]:
    """Ablations in their order, then cells by size, budget and architecture; each by seed."""
    role = list(ROLES).index(run.role) if run.role else 0
    return run.is_cell, role, run.parameters if run.is_cell else 0, run.budget, run.arch, run.seed


def _by(runs: list[RunRecord], key: Callable[[RunRecord], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run.name)
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _plain(e: Experiment) -> bool:
    """The model of the baseline, with all of it trained."""
    return e.model.visual == "foveated" and e.model.deep_query and not e.optim.freeze


def _bound(experiment: Experiment) -> float:
    """FLOPs of a sample when each is as large as the settings allow, by the mix."""
    largest, shapes = flops.largest(experiment), geometry(experiment.model)
    weights = experiment.data.mixture
    cost = {s: flops.total(flops.sample_cost(experiment, shapes, largest[s])).total for s in weights}
    return sum(cost[s] * weights[s] for s in weights) / sum(weights.values())
