"""Find and read run folders: which runs are meant, which of them count, and which may be compared at all.

A run is identified by its settings (`experiment.yaml`). Its `versus:` says what it is compared with; its name is a
label: nano-A1-s2 belongs to the side nano-A1, and nano-XS-C1-F is the cell of a grid, of size XS, budget C1 and
architecture F.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from fovlm.checkpoint.run_folder import read_metrics, read_summary
from fovlm.config.schema import Experiment
from fovlm.errors import UserError, did_you_mean, few
from fovlm.paths import run_root
from fovlm.report.confounds import grouped, scaled_label
from fovlm.report.runs import ARCH, Evidence, RunRecord
from fovlm.sweep import select

SEED = re.compile(r"-s\d+$")
CELL = re.compile(r"^(?P<group>.*?)(?P<size>[^-]+)-(?P<budget>C\d+)-(?P<arch>[A-Z])$")


def collect(words: Iterable[str]) -> Evidence:
    """Read the runs that the words name: run folders, folders of them, globs, names or groups as `fovlm sweep` knows.

    Raises UserError when a word names nothing, no run is finished, or runs that would be compared were scored on
    different validation sets.
    """
    folders: dict[Path, None] = {}
    for word in words:
        folders |= dict.fromkeys(folder.resolve() for folder in _folders(word))
    evidence = Evidence([])
    for folder in folders:
        try:
            experiment = Experiment.parse((folder / "experiment.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            problem = "its experiment.yaml is damaged or of another version of fovlm"
            evidence.left_out.append((folder.name, problem))
            continue
        if experiment.versus:
            evidence.versus.setdefault(SEED.sub("", experiment.name), experiment.versus)
        run = _read(folder, experiment)
        if isinstance(run, RunRecord):
            evidence.runs.append(run)
        else:
            evidence.left_out.append((folder.name, run))
    evidence.runs.sort(key=lambda run: _order(evidence, run))
    _drop(evidence)
    if not evidence.runs:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in evidence.left_out[:5])
        raise UserError(f"no runs to compare ({reasons or 'no run folder'})")
    for labels in evidence.families.values():
        _one_set([run for label in labels for run in evidence.side(label)])
    cells = evidence.cells
    _one_set(evidence.side(scaled_label(evidence)) + cells)  # their noise may be that of its seeds
    groups = grouped(cells, lambda run: run.group, lambda run: run.name)
    if len(groups) > 1:
        several = "; ".join(map(few, groups.values()))
        raise UserError(f"runs of different grids can't be compared: {several}; make one report for each")
    return evidence


def _folders(word: str) -> list[Path]:
    """The run folders that a word means, including further seeds when it is a run's name."""
    roots = (Path(), run_root())
    for path in (root / word for root in roots):
        if (path / "experiment.yaml").is_file():
            return [path, *(_with_seeds([word]) if path == run_root() / word else ())]
        if inside := sorted(p.parent for p in path.glob("*/experiment.yaml")):
            return inside
        if path.is_file():
            return []  # a shell's `runs/*` also names runs.csv
    wildcard = any(c in word for c in "*?[") and not Path(word).is_absolute()
    for root in roots if wildcard else ():
        if inside := sorted(p.parent for p in root.glob(f"{word}/experiment.yaml")):
            return inside
    if Path(word).is_absolute() or word.startswith("."):
        raise UserError(f"no run folder, and no folder of runs: {word}")
    try:
        names = [name for _, name in select.select([word])]
    except UserError as error:
        known = [p.parent.name for p in run_root().glob("*/experiment.yaml")]
        where = f"here or in {run_root()}{did_you_mean(word, known)}"
        raise UserError(f"no run folder '{word}' {where}; {error}") from None
    if not (inside := _with_seeds(names)):
        raise UserError(f"'{word}' has not been run: no folder of it in {run_root()} (fovlm sweep '{word}')")
    return inside


def _with_seeds(names: list[str]) -> list[Path]:
    """The folders of these runs and of their further seeds."""
    found = sorted(p.parent for p in run_root().glob("*/experiment.yaml"))
    return [folder for name in names for folder in found if SEED.sub("", folder.name) == name]


def _read(folder: Path, experiment: Experiment) -> RunRecord | str:
    """A finished run, or why it is left out."""
    rows = read_metrics(folder)
    summary = read_summary(folder)
    status = summary.get("status", "no run_summary.json")
    if status != "finished":
        return f"not finished ({status}, last row at step {int(rows[-1]['step']) if rows else 0})"
    if not isinstance(summary.get("final"), dict) or "val_loss" not in summary["final"]:
        return "has no validation loss"
    if not summary.get("val_hash"):
        return "has no val_hash: its validation set is unknown"
    label = SEED.sub("", experiment.name)
    cell = CELL.match(label)
    if cell is None:
        return RunRecord(experiment.name, folder, experiment, summary, rows, label)
    arch = ARCH.get(experiment.model.visual)
    if cell["arch"] != arch:
        return f"its name says architecture {cell['arch']}, its settings {arch or experiment.model.visual}"
    where = cell["group"], cell["size"], cell["budget"]
    return RunRecord(experiment.name, folder, experiment, summary, rows, label, *where)


def _drop(evidence: Evidence) -> None:
    """Leave out copies of a seed, and runs that are in no comparison."""
    baselines = {versus.baseline for versus in evidence.versus.values()} | {scaled_label(evidence)}
    first: dict[tuple[str, int], RunRecord] = {}
    for run in evidence.runs:
        copied = first.get((run.label, run.seed))
        if copied:
            reason = f"has train.seed {run.seed} as {copied.name} has: a copy is no evidence"
            evidence.left_out.append((run.name, reason))
        elif run.is_cell or run.label in evidence.versus or run.label in baselines:
            first[run.label, run.seed] = run
        else:
            evidence.left_out.append((run.name, "has no versus: and is not the baseline of a run given here"))
    evidence.runs = list(first.values())


def _one_set(runs: list[RunRecord]) -> None:
    """Raises UserError unless all were scored on one validation set."""
    sets = grouped(runs, lambda run: f"{'+'.join(run.experiment.data.val)} {run.val_set}", lambda run: run.name)
    if len(sets) > 1:
        several = "; ".join(f"[{name}] {few(names)}" for name, names in sets.items())
        raise UserError(
            f"runs scored on different validation sets can't be compared: {several}; make one report for each"
        )


def _order(evidence: Evidence, run: RunRecord) -> tuple[bool, float, str, str, bool, str, int]:
    """Sides by family, the baseline first; then cells by size, budget and architecture; each by seed."""
    if run.is_cell:
        return True, run.parameters, run.budget, run.arch, False, "", run.seed
    root = evidence.root(run.label)
    return False, 0, root, "", run.label != root, run.label, run.seed
