"""A finished run, and the evidence that a set of runs makes."""

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fovlm.checkpoint.run_folder import Row
from fovlm.config import experiments
from fovlm.config.schema import Experiment, Versus
from fovlm.estimate.shapes import geometry, parameters

ARCH = {"foveated": "F", "multi_token": "B"}  # the letter that a grid's names have for `model.visual`
LONGEST = 40  # characters of a setting's value in a label


@dataclass(frozen=True)
class RunRecord:
    """A finished run. `label` names its side: the run's name without the suffix of its seed."""

    name: str
    folder: Path
    experiment: Experiment
    summary: dict[str, Any]
    rows: list[Row]  # of its metrics
    label: str
    group: str = ""  # of a grid's cell: what its name begins with, its size and its budget
    size: str = ""
    budget: str = ""

    @property
    def seed(self) -> int:
        return self.experiment.train.seed

    @property
    def is_cell(self) -> bool:
        return bool(self.size)

    @property
    def arch(self) -> str:
        visual = self.experiment.model.visual
        return ARCH.get(visual, visual)

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
    def flops(self) -> float:
        """FLOPs of the whole run, forward and backward; nan where they were not known."""
        return float(self.summary.get("flops") or math.nan)

    @property
    def flops_per_sample(self) -> float:
        return self.flops / self.samples

    @functools.cached_property
    def parameters(self) -> int:
        """All parameters of backbones and connector that the visual mode uses, trained or frozen."""
        counts = parameters(self.experiment, geometry(self.experiment.model))
        return counts["connector"].trainable + sum(counts[k].trainable + counts[k].frozen for k in ("encoder", "llm"))

    @property
    def val_set(self) -> str:
        """The recorded hash of the validation set."""
        return str(self.summary["val_hash"])

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
    """Runs to compare, what was left out and why, and the `versus:` of every label, finished or not."""

    runs: list[RunRecord]
    left_out: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    versus: dict[str, Versus] = field(default_factory=dict)

    def side(self, label: str) -> list[RunRecord]:
        """The runs of a label by seed."""
        return sorted((run for run in self.runs if run.label == label and not run.is_cell), key=lambda run: run.seed)

    @property
    def cells(self) -> list[RunRecord]:
        """The runs of a grid."""
        return [run for run in self.runs if run.is_cell]

    def root(self, label: str) -> str:
        """The baseline of a label's baseline, and so on to the last."""
        seen = [label]
        while (versus := self.versus.get(seen[-1])) and versus.baseline not in seen:
            seen.append(versus.baseline)
        return seen[-1]

    @property
    def families(self) -> dict[str, list[str]]:
        """Labels that are compared with each other, by the baseline of them all, which comes first if it finished; the
        largest family first."""
        found: dict[str, list[str]] = {}
        for label in dict.fromkeys(run.label for run in self.runs if not run.is_cell):
            found.setdefault(self.root(label), []).append(label)
        return {
            root: sorted(found[root], key=lambda label: label != root)
            for root in sorted(found, key=lambda root: -len(found[root]))
        }

    @property
    def labels(self) -> list[str]:
        """All sides, family by family."""
        return [label for labels in self.families.values() for label in labels]

    def title(self, label: str) -> str:
        """The label with the settings, and their values, in which it differs from its baseline."""
        versus = self.versus.get(label)
        if versus is None:
            return f"{label} (baseline)"
        run, base = self.side(label)[0], self.side(versus.baseline)
        paths = run.experiment.differs_from(base[0].experiment) if base else versus.changes
        values = experiments.flat(run.experiment.model_dump())
        return f"{label} ({', '.join(_setting(path, values.get(path)) for path in paths)})"


def _setting(path: str, value: Any) -> str:
    text = f"{path}: {_shown(value)}"
    return text if len(text) <= LONGEST + len(path) else path


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items())
    if value is None:
        return "none"
    if isinstance(value, list):
        return " and ".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
