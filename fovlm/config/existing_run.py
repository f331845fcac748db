"""Whether a run folder that exists was made under the same settings. No torch: a change is reported at once."""

from pathlib import Path

from fovlm.config import experiments
from fovlm.config.schema import Experiment
from fovlm.errors import UserError, few

MOST = 5  # differences that a message names


def recorded(run: Path) -> Experiment | None:
    """The settings of a run folder's newest checkpoint; None if there are none that this version reads."""
    newest = max((run / "checkpoints").glob("step-*/experiment.yaml"), default=run / "experiment.yaml")
    try:
        return Experiment.parse(newest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def settled(experiment: Experiment, precision: str) -> Experiment:
    """The experiment with this in place of `train.precision: auto`."""
    if experiment.train.precision != "auto":
        return experiment
    return experiment.model_copy(update={"train": experiment.train.model_copy(update={"precision": precision})})


def check_same_settings(experiment: Experiment) -> None:
    """Raise UserError, with what differs, when a run would resume from a checkpoint of other settings."""
    made = recorded(experiment.run_folder) if (experiment.run_folder / "checkpoints").is_dir() else None
    if made is None or experiment.train.resume != "auto":  # damaged, or of another version: the run itself says so
        return
    experiment = settled(experiment, made.train.precision)
    if made.hash == experiment.hash:
        return
    before, now = (experiments.flat(e.model_dump()) for e in (made, experiment))
    hashed = {*made.differs_from(experiment), "train.seed", "deepspeed"}
    apart = [
        f"{key}={now.get(key)} (was {before.get(key)})" for key in sorted(hashed) if before.get(key) != now.get(key)
    ]
    raise UserError(
        f"{experiment.run_folder} was made under other settings: {few(apart, MOST)}: undo the change, "
        "give this run another name with name=..., or start from its weights with model.init_from"
    )
