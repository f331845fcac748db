"""Runs of `fovlm.train` in forked processes: everything is imported once, so ranks start in a second, not in five.

`python -m helpers.forked` is the server, which imports and forks; `Forked` starts it and talks to it in lines of JSON.
What a rank calls is a function of its arguments, the trainer's `main` by default; it ends with what that returns.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from helpers import ROOT

TRAIN = "fovlm.train.trainer:main"


class Ranks:
    """The processes of one run, in the order of ranks."""

    def __init__(self, server: "Forked", pids: list[int], logs: list[Path]):
        self.server, self.pids, self.logs = server, pids, logs

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        for pid in self.pids if rank is None else [self.pids[rank]]:
            os.kill(pid, number)

    def ended(self) -> list[int | None]:
        """The exit status of each rank, -N after signal N; None: it runs."""
        return self.server.ask(poll=self.pids)

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit statuses of all; ranks that have not ended by then are killed, and count as -SIGKILL."""
        until = time.monotonic() + seconds
        while None in (statuses := self.ended()):
            if time.monotonic() > until:
                for pid, status in zip(self.pids, statuses, strict=True):
                    if status is None:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        return statuses

    def said(self, rank: int = 0) -> str:
        return self.logs[rank].read_text(errors="replace")


class Forked:
    """A server of forked runs. Use as a context manager."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.forked"], env=env, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / "server.txt").open("w"),
        )  # fmt: skip

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(
        self, world: int, arguments: list[str], env: dict[str, str], hook: str = "", main: str = TRAIN, **options: Any
    ) -> Ranks:
        """Start `world` ranks of `main` ("module:function"). `hook` is called in each before, with the options."""
        self.count += 1
        logs = [self.folder / f"run-{self.count:03d}-{rank}.txt" for rank in range(world)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = self.ask(
            start=arguments, env=env, port=port, logs=[str(log) for log in logs], hook=hook, main=main, options=options
        )  # fmt: skip
        return Ranks(self, pids, logs)

    def run(self, world: int, arguments: list[str], env: dict[str, str], status: int = 0, **options: Any) -> str:
        """A run to its end: what rank 0 printed. Fails when a rank ends with another status."""
        ranks = self.start(world, arguments, env, **options)
        assert ranks.wait() == [status] * world, "\n".join(map(ranks.said, range(world)))
        return ranks.said()


def _serve() -> None:
    gc.disable()  # in imports it takes a second
    import fovlm.train.trainer  # noqa: F401

    gc.freeze()  # or a collection in a fork copies all of the server's memory
    gc.enable()
    replies, ended = os.fdopen(os.dup(1), "w"), {}
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if pids := request.get("poll"):
            for pid in pids:
                if pid not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    ended[pid] = os.waitstatus_to_exitcode(found[1])
            reply = [ended.get(pid) for pid in pids]
        else:
            reply = [_fork(request, rank) for rank in range(len(request["logs"]))]
        print(json.dumps(reply), file=replies, flush=True)


def _fork(request: dict[str, Any], rank: int) -> int:
    if pid := os.fork():
        return pid
    status = 1
    try:
        log = os.open(request["logs"][rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for number in (1, 2):
            os.dup2(log, number)
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(request["logs"]), "MASTER_PORT": request["port"]}
        os.environ.update({key: str(value) for key, value in where.items()} | request["env"])
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        if request["hook"]:
            _function(request["hook"])(rank=rank, **request["options"])
        _function("fovlm.train.process:keep_running_without_output")()
        status = _function(request["main"])(request["start"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    finally:
        if sys.exc_info()[0]:
            traceback.print_exc()
        _function("fovlm.train.process:exit_at_once")(status)


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    _serve()
