"""Whether a run folder that exists was made under the same settings. No torch: a change is reported at once."""

from fovlm.config import experiments
from fovlm.config.schema import Experiment
from fovlm.errors import UserError

MOST = 5  # differences that a message names


def check_same_settings(experiment: Experiment) -> None:
    """Raise UserError, with what differs, when a run would resume from a checkpoint of other settings."""
    newest = max((experiment.run_folder / "checkpoints").glob("step-*/experiment.yaml"), default=None)
    if newest is None or experiment.train.resume != "auto":
        return
    try:
        made = Experiment.parse(newest.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # damaged, or of another version: the run itself says so
        return
    if made.hash == experiment.hash:
        return
    before, now = (experiments.flat(e.model_dump()) for e in (made, experiment))
    hashed = {*made.differs_from(experiment), "train.seed", "deepspeed"}
    apart = [
        f"{key}={now.get(key)} (was {before.get(key)})" for key in sorted(hashed) if before.get(key) != now.get(key)
    ]
    more = f" and {len(apart) - MOST} more" if len(apart) > MOST else ""
    raise UserError(
        f"{experiment.run_folder} was made under other settings: {', '.join(apart[:MOST])}{more}: undo the change, "
        "give this run another name with name=..., or start from its weights with model.init_from"
    )
