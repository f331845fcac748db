"""The checkpoint that a run resumes from, and when it must not resume. All ranks decide together."""

from collections.abc import Callable
from pathlib import Path

from fovlm import distributed
from fovlm.checkpoint import store
from fovlm.checkpoint.locate import find_checkpoint
from fovlm.checkpoint.store import Checkpoints
from fovlm.config.schema import Experiment
from fovlm.distributed import SharedError
from fovlm.errors import UserError


def find(experiment: Experiment, data_hash: str) -> Path | None:
    """The checkpoint that `train.resume` asks for, verified and of this experiment; None for a fresh start. Raises
    SharedError when it is missing or damaged, or was made with other settings or other data."""
    path = _wanted(experiment)
    if path is None:
        return None
    state = store.read_state(path)
    if state.experiment_hash != experiment.hash:
        raise SharedError(
            f"{path} was made by another experiment (its settings are in experiment.yaml there): undo the change, give "
            "this run another name with name=..., or start from its weights with model.init_from"
        )
    if state.data_hash != data_hash:
        raise SharedError(
            f"{path} was trained on other shards, so its position in the data is invalid: restore the shards, or start "
            "from its weights with model.init_from under another name=..."
        )
    return path


def check_named(experiment: Experiment) -> None:
    """For the dry run: raises UserError when `train.resume` names no checkpoint. Its files are not verified."""
    if experiment.train.resume not in ("auto", "none"):
        _named(experiment.train.resume, lambda path: "")


def _wanted(experiment: Experiment) -> Path | None:
    wanted, own = experiment.train.resume, Checkpoints(experiment.run_folder)
    if wanted == "auto":
        found = own.first_whole(verify=verify_together)
        if found is None and own.names():
            raise SharedError(
                f"{experiment.run_folder}: all its checkpoints are damaged, and a fresh start would overwrite them: "
                "restore one, remove the folder, or give this run another name with name=..."
            )
        return found
    if wanted == "none":
        if own.names():
            raise SharedError(
                f"{experiment.run_folder} has checkpoints, which train.resume=none would overwrite: remove the folder, "
                "or give this run another name with name=..."
            )
        return None
    return _named(wanted, verify_together)


def _named(wanted: str, verify: Callable[[Path], str]) -> Path:
    try:
        return find_checkpoint(wanted, "newest", verify)
    except UserError as error:
        raise SharedError(f"train.resume={wanted}: {error}") from error


def verify_together(path: Path) -> str:
    """`store.verify` with the files divided among the ranks: "" on every rank when all are good."""
    return next((p for p in distributed.gather(store.verify(path, distributed.rank(), distributed.world())) if p), "")
