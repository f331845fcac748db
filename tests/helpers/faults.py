"""What the rows of the scorecard of faults share: how trials are counted, and the run that nothing disturbed."""

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fovlm.checkpoint import store
from fovlm.checkpoint.store import ENGINE, Checkpoints
from fovlm.checkpoint.zero_reader import ZeroWeights
from helpers.forked import Forked, Ranks
from helpers.training import arguments, environment, rows

STEPS, SAVE = 6, 3
QUIET = ["data.workers=0", "data.val=[]", "data.mixture={video: 86, words: 14}", "train.eval_every=0",
         "train.best=train_loss", f"train.steps={STEPS}", f"train.save_every={SAVE}", "train.keep_last=5"]  # fmt: skip

SLOW = 20.0  # seconds for one small file: more is a hang


class Row:
    """A kind of fault: how often it was tried, and what did not hold."""

    def __init__(self, name: str, meaning: str, scale: float):
        self.name, self.meaning, self.scale, self.full = name, meaning, scale, scale > 0
        self.tried, self.failed, self.began, self.seconds = 0, [], time.time(), 0.0
        self.random = random.Random(0)

    def times(self, short: int, full: int) -> range:
        if not (short or self.full):
            pytest.skip("its short form is among the tests of fovlm.train, fovlm.data or launch.sh")
        return range(max(1, short, round(full * self.scale)))

    def each(self, counts: list[int], short: int) -> list[tuple[int, int]]:
        """(rank, place) of all places of every rank, every fourth at a quarter of the scale; in the short form the
        middle one of rank `short`."""
        if not self.full:
            return [(short, counts[short] // 2)]
        return [(rank, at) for rank, n in enumerate(counts) for at in range(0, n, max(1, round(1 / self.scale)))]

    def check(self, held: bool, what: str) -> None:
        """Count a trial; `what` says more if it did not hold."""
        self.tried += 1
        if not held:
            self.failed.append(what)


class Reference:
    """A run of two ranks to its end, and runs of the same experiment to compare with it."""

    def __init__(self, home: Path, forked: Forked):
        self.home, self.forked, self.env = home, forked, environment(home)
        began = time.monotonic()
        folder, hook = self.run("whole"), "helpers.disk_faults:install"
        ranks = forked.start(2, self.words("whole"), self.env, hook, folder=str(folder), step=STEPS)
        statuses, said = ranks.wait(), ranks.said()
        self.seconds = time.monotonic() - began
        assert statuses == [0, 0], said
        self.changes = [int((folder / f"changes-{rank}").read_text()) for rank in range(2)]  # of the disk, in a save
        self.weights = {int(p.name[5:]): weights(p) for p in folder.glob("checkpoints/step-*")}
        self.losses = [row["loss"] for row in rows(home, "whole")]

    def run(self, name: str) -> Path:
        return self.home / "runs" / name

    def words(self, name: str, *more: str) -> list[str]:
        return arguments(self.home, name, *QUIET, *more)

    def start(self, name: str, *more: str, world: int = 2, **hook: Any) -> Ranks:
        return self.forked.start(world, self.words(name, *more), self.env, **hook)

    def state(self, name: str) -> str:
        """What is wrong with the newest whole checkpoint of a run, "" if it has the weights of this one's step."""
        found = Checkpoints(self.run(name)).first_whole(verify=store.verify)
        if found is None:
            return "no whole checkpoint"
        step = store.read_state(found).step
        return "" if weights(found) == self.weights[step] else f"other weights at step {step}"

    def resumes(self, name: str, world: int = 2) -> str:
        """Resume a run to its end -> what went wrong; "" if it ends as this one did, to the bit."""
        ranks = self.start(name, world=world)
        if ranks.wait() != [0] * world:
            return f"the resume ended with {ranks.ended()}: {ranks.said()[-500:]}"
        if [row["loss"] for row in rows(self.home, name)] != self.losses:
            return "other losses"
        final = self.run(name) / "checkpoints" / f"step-{STEPS:08d}"
        return "" if weights(final) == self.weights[STEPS] else "other weights at the end"


def weights(checkpoint: Path) -> str:
    """A hash of all weights in a checkpoint."""
    stored, digest = ZeroWeights(checkpoint / ENGINE), hashlib.sha256()
    for name in sorted(stored.shapes):
        digest.update(name.encode() + stored.read(name).detach().float().numpy().tobytes())
    return digest.hexdigest()


def flipped(data: bytes, random: random.Random) -> bytes:
    """The bytes with one bit changed."""
    bit = random.randrange(8 * len(data))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def survives(work: Callable[[], object], *errors: type[Exception]) -> str:
    """What went wrong: another exception than these, or too long; "" if nothing."""
    began, problem = time.monotonic(), ""
    try:
        work()
    except errors:
        pass
    except Exception as error:  # noqa: BLE001  any other is what this looks for
        problem = f"{type(error).__name__}: {error}"
    return problem or ("too long" if time.monotonic() - began > SLOW else "")
