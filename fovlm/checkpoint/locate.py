"""What a run saved, found by the run's name or folder or the checkpoint's own, and checked before anything is read."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fovlm.checkpoint import store
from fovlm.checkpoint.store import ENGINE, UNIVERSAL, Checkpoints
from fovlm.config.schema import Experiment
from fovlm.errors import UserError, did_you_mean
from fovlm.paths import run_root


@dataclass
class SavedRun:
    """A checkpoint, the experiment that made it, and the run it belongs to (its own parent, when it stands alone)."""

    path: Path
    run: Path
    experiment: Experiment
    state: store.State


def find(source: Path, which: str | None = None) -> SavedRun:
    """The checkpoint meant by `source` (a run's folder or name, or a checkpoint's folder), whole. Raises UserError."""
    folder = next((f for f in (source, run_root() / source) if f.is_dir()), None)
    if folder is None:
        there = [f.name for f in run_root().iterdir() if f.is_dir()] if run_root().is_dir() else []
        raise UserError(f"{source}: no such folder, nor a run below {run_root()}{did_you_mean(source.name, there)}")
    if folder.name == "checkpoints":
        folder = folder.parent
    if (folder / store.MANIFEST).is_file():
        if which:
            raise UserError(f"{folder} is one checkpoint: --step {which} is for a run's folder")
        path = folder
    elif (folder / "checkpoints").is_dir():
        path = _of_run(folder, which)
    else:
        problem = "neither a run (no checkpoints/ in it) nor a checkpoint"
        if (folder / "config.json").is_file():
            problem = "a model already, not a run"
        elif (folder / ENGINE).is_dir():
            problem = "a checkpoint without its manifest.json, so its save never ended"
        raise UserError(f"{folder}: {problem}; give the folder of a run, or one below its checkpoints/")
    if (path / UNIVERSAL).is_dir():
        raise UserError(f"{path} is in DeepSpeed's universal form already: convert the run that it came from")
    with steps() as bar:
        task = bar.add_task("checking the shards", total=None)
        if problem := store.verify(path):
            raise UserError(f"{path}: {problem}; {_others(path)}")
        bar.remove_task(task)
    state = store.read_state(path)
    try:
        experiment = Experiment.parse((path / "experiment.yaml").read_text(encoding="utf-8"))
    except (OSError, ValidationError, ValueError) as error:
        raise UserError(f"{path / 'experiment.yaml'}: {' '.join(str(error).split())[:160]}") from error
    run = path.resolve().parent.parent if path.resolve().parent.name == "checkpoints" else path
    return SavedRun(path, run, experiment, state)


def _of_run(run: Path, which: str | None) -> Path:
    own = Checkpoints(run)
    names = own.names()
    if not names:
        raise UserError(f"{run}: a run without a complete checkpoint: train on, or wait for its first save")
    if which in (None, "best", "latest"):
        name = own.pointed("best") if which != "latest" else None
        if which == "best" and name is None:
            raise UserError(f"{run}: no checkpoint is marked as best; --step latest takes the newest")
        return own.folder / (name or own.pointed("latest") or names[-1])
    steps = {str(int(name.removeprefix("step-"))): name for name in names}
    wanted = str(which).removeprefix("step-").lstrip("0") or "0"
    if wanted not in steps:
        raise UserError(f"{run}: no checkpoint of step {which}; there are best, latest, {', '.join(steps)}")
    return own.folder / steps[wanted]


def _others(path: Path) -> str:
    """What else could be converted, in place of a damaged checkpoint."""
    others = [str(int(p.parent.name.removeprefix("step-"))) for p in path.parent.glob(f"step-*/{store.MANIFEST}")]
    others = [step for step in sorted(others, key=int) if step != path.name.removeprefix("step-").lstrip("0")]
    return f"--step {others[-1]} is another" if others else "there is no other checkpoint beside it"


def steps() -> Progress:
    """A bar for each step of what is done with a checkpoint, gone when they are done."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=30), TimeRemainingColumn(), console=Console(stderr=True),
        transient=True,
    )  # fmt: skip
