"""Which runs `fovlm run` is asked for, in which order, and how each stands: what is finished is not done again.

A pattern is a run (`LR1`), a glob over all runs (`135M-*`), a group (`ablations`), or a glob within a group
(`ablations/A*`). A group is a file of `experiments/`; its runs keep the order they have there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from yaml import YAMLError

from fovlm.checkpoint.run_folder import read_summary
from fovlm.config import experiments, schema
from fovlm.config.schema import Experiment
from fovlm.errors import UserError, did_you_mean

# new: nothing to go on from; begun: a checkpoint, or something else that the run itself judges; changed: what is there
# was made under other settings.
Standing = Literal["new", "begun", "finished", "changed"]
FEW = 12  # names in a message


@dataclass(frozen=True)
class PlannedRun:
    """One run to be done: `words` are what launch.sh is given, the experiment's name and overrides."""

    name: str
    group: str
    words: tuple[str, ...]
    experiment: Experiment

    @property
    def folder(self) -> Path:
        return self.experiment.run_folder


def select(patterns: Iterable[str], only: str = "", folder: Path = experiments.EXPERIMENTS) -> list[tuple[str, str]]:
    """(group, name) of the runs that the patterns ask for: each once, in the order of the patterns, then of the files.

    `only` keeps those whose name has this part, or matches this glob. Raises UserError for a pattern without a run.
    """
    groups = experiments.groups(folder)
    everything = [(group, name) for group, names in groups.items() for name in names]
    patterns = list(patterns) or (["*"] if only else [])
    if not patterns:
        told = ", ".join(f"'{group}/*' ({len(names)})" for group, names in groups.items())
        raise UserError(f"which runs? Names, or groups: {told}")
    found = [pair for pattern in patterns for pair in _matches(pattern, groups, everything)]
    kept = [(group, name) for group, name in dict.fromkeys(found) if only in name or fnmatchcase(name, only)]
    if not kept:
        names = [name for _, name in dict.fromkeys(found)]
        told = ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
        raise UserError(f"--filter {only}: none of {told}{did_you_mean(only, names)}")
    return kept


def _matches(pattern: str, groups: dict[str, list[str]], everything: list[tuple[str, str]]) -> list[tuple[str, str]]:
    group, slash, name = pattern.partition("/")
    if not slash:
        names = [n for _, n in everything]
        wanted = [pair for pair in everything if pair[1] == pattern]
        wanted = wanted or [pair for pair in everything if fnmatchcase(pair[1], pattern) or pair[0] == pattern]
        if not wanted:
            raise UserError(f"no run or group is called '{pattern}'{did_you_mean(pattern, [*names, *groups])}")
        return wanted
    inside = [pair for pair in everything if fnmatchcase(pair[0], group)]
    if not inside:
        raise UserError(f"'{pattern}': no file experiments/{group}.yaml{did_you_mean(group, groups)}")
    wanted = [pair for pair in inside if fnmatchcase(pair[1], name or "*")]
    if not wanted:
        raise UserError(
            f"'{pattern}': no such run in experiments/{group}.yaml{did_you_mean(name, [n for _, n in inside])}"
        )
    return wanted


def plan(
    chosen: Iterable[tuple[str, str]],
    overrides: list[str],
    seeds: int | None = None,
    folder: Path = experiments.EXPERIMENTS,
) -> list[PlannedRun]:
    """The runs with their settings, then those once more that are to be repeated, as often as each one's file says.

    `seeds` repeats all of them so often instead. Repeat number s of NAME is called NAME-s1, NAME-s2 ... and has
    `train.seed` raised by s: other first weights, the same samples in the same order. Raises UserError for settings
    that cannot be, before anything runs.
    """
    first = [(group, name, schema.load(name, overrides, folder)) for group, name in chosen]
    times = [seeds or experiment.seeds for _, _, experiment in first]
    for word in overrides:
        if word.startswith(("name=", "logger.folder=")) and sum(times) > 1:
            raise UserError(f"command line: {word}: several runs would write into one folder")
    planned = []
    for repeat in range(max(times, default=0)):
        for (group, name, experiment), most in zip(first, times, strict=True):
            if repeat >= most:
                continue
            words = [name, *overrides]
            if repeat:
                words += [f"name={experiment.name}-s{repeat}", f"train.seed={experiment.train.seed + repeat}"]
                experiment = schema.load(name, words[1:], folder)
            planned.append(PlannedRun(experiment.name, group, tuple(words), experiment))
    names = [run.name for run in planned]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two runs would be called {twice}")
    _refuse_circles({run.name: run.experiment.model.init_from for run in planned})
    return planned


def _refuse_circles(starts_from: dict[str, str | None]) -> None:
    for name in starts_from:
        way = [name]
        while (before := starts_from.get(way[-1])) and before not in way:
            way.append(before)
        if before == name:
            told = ", which starts from ".join([*way, name])
            raise UserError(f"model.init_from goes in a circle: {told}; one of them has to start without another")


def run_status(run: PlannedRun) -> Standing:
    """How the run stands, by what is in its folder."""
    summary, was = read_summary(run.folder), recorded_hash(run.folder)
    finished = summary.get("status") == "finished"
    if not finished and not (run.folder / "checkpoints").is_dir():
        return "new"
    if was not in ("", run.experiment.hash):
        return "changed"
    return "finished" if finished else "begun"


def recorded_hash(folder: Path) -> str:
    """`Experiment.hash` of the settings that a run folder was made under; "" where they cannot be known."""
    try:
        # Read anew: a setting that came since, with its default, changes nothing.
        return Experiment.parse((folder / "experiment.yaml").read_text(encoding="utf-8")).hash
    except (OSError, ValidationError, YAMLError):
        return str(read_summary(folder).get("experiment_hash", ""))
