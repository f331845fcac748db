"""Several runs of `fovlm.train` in one process, since a start takes seconds: their losses, statuses and last words."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fovlm.data.packing import Batch
from fovlm.train import trainer
from fovlm.train.engine import Engine, StepResult
from fovlm.train.losses import Loss
from helpers.forked import Forked
from helpers.training import environment


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


def record(forked: Forked, home: Path, runs: dict[str, Any]) -> dict[str, Any]:
    """What became of runs, given by name as {"arguments": [...], "spoilt": [steps, from 1]}."""
    (home / "runs.json").write_text(json.dumps(runs))
    forked.run(1, [str(home)], environment(home), main=f"{__name__}:main")
    return json.loads((home / "found.json").read_text())


def main(arguments: list[str]) -> int:
    home, found = Path(arguments[0]), {}
    trainer.Engine = Recorded
    for name, run in json.loads((home / "runs.json").read_text()).items():
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
    (home / "found.json").write_text(json.dumps(found))
    return 0
