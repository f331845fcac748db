"""When a checkpoint is saved, which one is the best, and which are deleted."""

from collections.abc import Callable

from fovlm import distributed
from fovlm.checkpoint.reference import ReferenceBatch
from fovlm.checkpoint.store import Checkpoints, State
from fovlm.config.schema import TrainSettings
from fovlm.train.engine import Engine


class CheckpointSaver:
    """Saves the run by the settings of `train`. Every rank calls it alike.

    `experiment` is the run's YAML, `reference` the batch whose nll a checkpoint records, `saved_step` the step of the
    checkpoint the run resumes from (-1: none). Raises UserError when the disk cannot hold a checkpoint.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        train: TrainSettings,
        engine: Engine,
        experiment: str,
        reference: ReferenceBatch | None,
        saved_step: int,
    ):
        self.checkpoints, self.train, self.engine = checkpoints, train, engine
        self.experiment, self.reference = experiment, reference
        self.saved_step = saved_step
        self.losses: list[float] = []  # of the steps since the last checkpoint
        distributed.collective_call(lambda: checkpoints.need_room(engine.checkpoint_bytes()))

    def due(self, step: int) -> bool:
        """Whether `train.save_every` asks for a checkpoint at this step."""
        return self.train.save_every > 0 and step % self.train.save_every == 0

    def save(self, state: State, validate: Callable[[], float | None]) -> str:
        """Write a checkpoint of `state` -> a message for the log.

        It is the best when its metric is the lowest so far: the mean training loss since the last checkpoint, or what
        `validate` returns (None: it has no metric), as `train.best` says.
        """
        if self.train.best == "train_loss":
            state.metric = sum(self.losses) / len(self.losses) if self.losses else None
        else:
            state.metric = validate()
        best = state.metric is not None and (state.best is None or state.metric < state.best)
        state.best = state.metric if best else state.best
        self.losses, self.saved_step = [], state.step
        path = self.engine.save(self.checkpoints, state, self.experiment, best, self.reference)
        if distributed.rank() == 0:
            self.checkpoints.prune(self.train.keep_last, self.train.keep_best)
        return f"saved {path.name}" + (f", the best so far ({self.train.best} {state.metric:.4f})" if best else "")
