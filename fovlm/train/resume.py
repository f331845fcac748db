"""Which checkpoint a run goes on from, and when it must not. Decided by all ranks together."""

from pathlib import Path

from fovlm import distributed
from fovlm.checkpoint import store
from fovlm.checkpoint.locate import find_checkpoint
from fovlm.checkpoint.store import Checkpoints
from fovlm.config.schema import Experiment
from fovlm.distributed import SharedError
from fovlm.errors import UserError


def find(experiment: Experiment, data_hash: str) -> Path | None:
    """The checkpoint that `train.resume` asks for, whole and of this experiment; None to start anew.

    Raises SharedError when the one asked for is not there or damaged, or belongs to other settings or other data.
    """
    path = _wanted(experiment)
    if path is None:
        return None
    state = store.read_state(path)
    if state.experiment_hash != experiment.hash:
        raise SharedError(
            f"{path} is a checkpoint of another experiment (its settings are in experiment.yaml there): undo the "
            "change, give this run another name with name=..., or start from its weights with model.init_from"
        )
    if state.data_hash != data_hash:
        raise SharedError(
            f"{path} was trained on other shards than those of now, so its place in them means nothing: put the "
            "shards back, or start from its weights with model.init_from under another name=..."
        )
    return path


def _wanted(experiment: Experiment) -> Path | None:
    wanted, own = experiment.train.resume, Checkpoints(experiment.run_folder)
    if wanted == "auto":
        found = own.first_whole(verify=verify_together)
        if found is None and own.names():
            raise SharedError(
                f"{experiment.run_folder}: none of its checkpoints is whole, and starting anew would overwrite them: "
                "put one back, or remove the folder, or give this run another name with name=..."
            )
        return found
    if wanted == "none":
        if own.names():
            raise SharedError(
                f"{experiment.run_folder} has checkpoints, and train.resume=none would start over them: remove the "
                "folder, or give this run another name with name=..."
            )
        return None
    try:
        return find_checkpoint(wanted, "newest", verify_together)
    except UserError as error:
        raise SharedError(f"train.resume={wanted}: {error}") from error


def verify_together(path: Path) -> str:
    """`checkpoint.verify` with the files shared out over the ranks: "" when all are good, on every rank."""
    return next((p for p in distributed.gather(store.verify(path, distributed.rank(), distributed.world())) if p), "")
