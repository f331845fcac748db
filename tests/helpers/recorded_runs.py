"""Several runs of `fovlm.train` in one process, since a start takes seconds: their losses, statuses and last words.

python -m helpers.recorded_runs RUNS OUT     RUNS: JSON of name -> {"arguments": [...], "spoilt": [steps, from 1]}
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fovlm.data.packing import Batch
from fovlm.train import trainer
from fovlm.train.engine import Engine, StepResult
from fovlm.train.losses import Loss


class Recorded(Engine):
    """An engine that keeps what its steps gave. In the steps that are to be spoilt, no loss is a number."""

    steps: list[Callable[[], StepResult]]
    spoilt: list[int]

    def _loss(self, batch: Batch) -> Loss:
        loss = super()._loss(batch)
        return replace(loss, total=loss.total * float("nan")) if len(self.steps) + 1 in self.spoilt else loss

    def step(self, batches: list[Batch]) -> Callable[[], StepResult]:
        done = super().step(batches)
        self.steps.append(done)
        return done


def main() -> None:
    found = {}
    trainer.Engine = Recorded
    for name, run in json.loads(Path(sys.argv[1]).read_text()).items():
        Recorded.steps, Recorded.spoilt = [], run.get("spoilt", [])
        with tempfile.TemporaryFile("w+") as said:
            with contextlib.redirect_stderr(said):
                status = trainer.main(run["arguments"])
            said.seek(0)
            last_words = said.read()
        results = [read() for read in Recorded.steps]
        found[name] = {
            "losses": [step.loss for step in results],
            "parts": [step.parts for step in results],
            "status": status,
            "said": last_words,
        }
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
