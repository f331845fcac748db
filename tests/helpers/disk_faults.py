"""What `helpers.forked` calls in a rank: the n-th change of the disk in a save kills the rank, or fails.

Counted are the changes that Python makes in the run's folder, every fsync, and the files that torch writes: before,
half written, and behind.
"""

import errno
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fovlm.train.saving import CheckpointSaver

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate")


def install(rank: int, folder: str, step: int, target: int = 0, at: int | None = None, error: str = "") -> None:
    """At the `at`-th change of rank `target` in the save at `step`: SIGKILL, or `error` (ENOSPC ...) from then on.

    Without `at` the changes are only counted, into FOLDER/changes-RANK.
    """
    if at is not None and rank != target:
        return
    state = {"armed": False, "changes": 0}
    saver, save, fsync = CheckpointSaver.save, torch.save, os.fsync

    def due() -> bool:
        """Count a change -> whether the fault is due."""
        if not state["armed"]:
            return False
        state["changes"] += 1
        return at is not None and state["changes"] > at

    def change(what: object) -> None:
        if due():
            if not error:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)), str(what))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if written and not str(arguments[0]).startswith(folder):
            return
        if written or event in CHANGES:
            change(arguments[0])

    def saved(value: object, path: Any, *more: object, **named: object) -> None:
        change(path)
        save(value, path, *more, **named)
        if due():
            os.truncate(path, Path(path).stat().st_size // 2)
            if not error:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")  # as torch does
        change(path)

    def synced(handle: int) -> None:
        change("fsync")
        fsync(handle)

    def watched(self: CheckpointSaver, run: Any, validate: Any) -> str:
        state["armed"] = run.step == step
        try:
            return saver(self, run, validate)
        finally:
            state["armed"] = False
            if at is None and run.step == step:
                Path(folder, f"changes-{rank}").write_text(str(state["changes"]))

    CheckpointSaver.save, torch.save, os.fsync = watched, saved, synced
    sys.addaudithook(hook)


def limit_files(rank: int, after: int, size: int) -> None:
    """From the end of step `after` on, no file of this rank grows beyond `size` bytes: real writes fail."""
    import resource

    from fovlm.train.logger import Logger

    set_step = Logger.set_step

    def limited(self: Logger, step: int) -> None:
        set_step(self, step)
        if step == after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    Logger.set_step = limited


def spoil(rank: int, target: int, steps: list[int]) -> None:
    """In these steps no loss of rank `target` is a number."""
    from fovlm.train.engine import Engine

    loss, step, done = Engine._loss, Engine.step, [0]

    def spoiled(self: Engine, batch: Any) -> Any:
        whole = loss(self, batch)
        return replace(whole, total=whole.total * float("nan")) if done[0] in steps and rank == target else whole

    def counted(self: Engine, batches: list[Any]) -> Any:
        done[0] += 1
        return step(self, batches)

    Engine._loss, Engine.step = spoiled, counted


def hang(rank: int) -> None:
    """Minutes pass like seconds, and every step takes 0.6 s; on rank 1 the sixth never ends.

    Rank 0 is slow to print, as on a busy machine: no other rank may end before.
    """
    from fovlm.train.engine import Engine
    from fovlm.train.trainer import Watchdog

    step, steps, init, exchange = Engine.step, [], Watchdog.__init__, Watchdog._exchange

    def stuck(engine: Engine, batches: list[Any]) -> Any:
        steps.append(1)
        time.sleep(90 if len(steps) == 6 and rank == 1 else 0.6)
        return step(engine, batches)

    def slow(*arguments: Any) -> Any:
        answers = exchange(*arguments)
        time.sleep(1 if rank == 0 else 0)
        return answers

    Engine.step, Watchdog._exchange = stuck, slow
    Watchdog.__init__ = lambda watchdog, seconds: init(watchdog, seconds / 60)
