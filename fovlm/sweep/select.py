"""Which runs `fovlm sweep` starts, in which order, and the status of each.

A pattern is a run (`LR1`), a glob over all runs (`135M-*`), a group (`ablations`), or a glob within a group
(`ablations/A*`). A group is a file of `experiments/`; its runs keep the order they have there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from fovlm.checkpoint.run_folder import read_summary
from fovlm.config import experiments, schema
from fovlm.config.existing_run import recorded, settled
from fovlm.config.schema import Experiment
from fovlm.errors import UserError, did_you_mean

# resumable: has checkpoints, or was stopped before its first one; stale: its folder was made under other settings.
Status = Literal["new", "resumable", "stale", "finished"]


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep. `words` are those of `launch.sh`: the experiment's name and overrides."""

    name: str
    group: str
    words: tuple[str, ...]
    experiment: Experiment

    @property
    def folder(self) -> Path:
        return self.experiment.run_folder


def select(patterns: Iterable[str], folder: Path = experiments.EXPERIMENTS) -> list[tuple[str, str]]:
    """(group, name) of the runs that match: each once, in the order of the patterns, then of the files. Raises
    UserError for a pattern without a run."""
    groups, patterns = experiments.groups(folder), list(patterns)
    if not patterns:
        known = ", ".join(f"'{group}/*' ({len(names)})" for group, names in groups.items())
        raise UserError(f"which runs? Names, or groups: {known}")
    return list(dict.fromkeys(pair for pattern in patterns for pair in _matches(pattern, groups)))


def _matches(pattern: str, groups: dict[str, list[str]]) -> list[tuple[str, str]]:
    pairs = [(group, name) for group, names in groups.items() for name in names]
    group, slash, name = pattern.partition("/")
    if not slash:
        found = [pair for pair in pairs if pair[1] == pattern]
        found = found or [pair for pair in pairs if fnmatchcase(pair[1], pattern) or pair[0] == pattern]
        problem = f"no run or group is called '{pattern}'{did_you_mean(pattern, [*(n for _, n in pairs), *groups])}"
    else:
        inside = [pair for pair in pairs if fnmatchcase(pair[0], group)]
        found = [pair for pair in inside if fnmatchcase(pair[1], name or "*")]
        problem = f"'{pattern}': no file experiments/{group}.yaml{did_you_mean(group, groups)}"
        if inside:
            near = did_you_mean(name, [n for _, n in inside])
            problem = f"'{pattern}': no such run in experiments/{group}.yaml{near}"
    if not found:
        raise UserError(problem)
    return found


def plan(
    chosen: Iterable[tuple[str, str]],
    overrides: list[str],
    seeds: int | None = None,
    folder: Path = experiments.EXPERIMENTS,
) -> list[PlannedRun]:
    """The runs with their settings, then their repeats, as many as each one's file says, or `seeds`.

    Repeat s of NAME is called NAME-s1, NAME-s2 ... and has `train.seed` raised by s: other initial weights, the same
    samples in the same order. Raises UserError for invalid settings, before anything runs.
    """
    first = [(group, name, schema.load(name, overrides, folder)) for group, name in chosen]
    repeats = [seeds or experiment.seeds for _, _, experiment in first]
    for word in overrides:
        if word.startswith(("name=", "logger.folder=")) and sum(repeats) > 1:
            raise UserError(f"command line: {word}: several runs would write into one folder")
    planned = []
    for repeat in range(max(repeats, default=0)):
        for (group, name, experiment), count in zip(first, repeats, strict=True):
            if repeat >= count:
                continue
            words = [name, *overrides]
            if repeat:
                words += [f"name={experiment.name}-s{repeat}", f"train.seed={experiment.train.seed + repeat}"]
                experiment = schema.load(name, words[1:], folder)
            planned.append(PlannedRun(experiment.name, group, tuple(words), experiment))
    names = [run.name for run in planned]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two runs would be called {twice}")
    _refuse_cycles({run.name: run.experiment.model.init_from for run in planned})
    return planned


def _refuse_cycles(starts_from: dict[str, str | None]) -> None:
    for name in starts_from:
        chain = [name]
        while (before := starts_from.get(chain[-1])) and before not in chain:
            chain.append(before)
        if before == name:
            cycle = ", which starts from ".join([*chain, name])
            raise UserError(f"model.init_from goes in a circle: {cycle}; one of them must start without another")


def run_status(run: PlannedRun) -> Status:
    """The status of a run, from its folder."""
    summary, wanted = read_summary(run.folder), run.experiment
    finished = summary.get("status") == "finished"
    if not finished and not (run.folder / "checkpoints").is_dir():
        return "new"
    # Parsed again: a setting added since then, at its default, changes nothing.
    made = recorded(run.folder)
    wanted = settled(wanted, made.train.precision) if made else wanted
    if (made.hash if made else summary.get("experiment_hash", wanted.hash)) != wanted.hash:
        return "stale"
    return "finished" if finished else "resumable"
