"""`./launch.sh NAME ...`: check the run, start its ranks, pass signals on, report how it ended."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from fovlm.config import experiments
from fovlm.errors import EXIT_STOPPED, EXIT_USER_ERROR, UserError
from fovlm.launch.commands import command_of
from fovlm.launch.request import Request, parse
from fovlm.launch.resources import find_resources
from fovlm.paths import INSTALLED, ROOT, TRAIN

# Starts a run. launch.sh makes the environment first; an installed package has one.
COMMAND = (sys.executable, "-m", "fovlm", "train") if INSTALLED else (str(ROOT / "launch.sh"),)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GRACE = 5.0  # seconds for the ranks to end after their launcher


class Stopped(Exception):
    """A signal came before the ranks were started."""


def say(text: str) -> None:
    """A line on stderr; a terminal that is gone is no error."""
    with suppress(OSError):
        print(f"fovlm: {text}", file=sys.stderr, flush=True)


def on_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    """Handle SIGNALS; under nohup, SIGHUP stays ignored."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


class Run:
    """A started launcher in a session of its own, so that a signal reaches the ranks once, from here.

    Ranks save and stop on SIGTERM. The deepspeed launcher would leave them behind on one node, and kill them after
    30 seconds on several.
    """

    def __init__(self, command: list[str], env: dict[str, str], remote: bool):
        self.remote, self.stop_asked, self.killed = remote, False, False
        early: list[int] = []
        on_signals(lambda number, frame: early.append(number))
        self.launcher = subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
        on_signals(self._pass_on)
        if early:
            self._pass_on(early[0], None)

    def wait(self) -> int:
        """Wait until every process has ended; returns the exit status as a shell counts it (128 + signal)."""
        status = self.launcher.wait()
        until = time.monotonic() + GRACE
        while (left := self._left_behind()) and time.monotonic() < until:
            time.sleep(0.2)
        if left:
            self._signal_group(signal.SIGKILL)
            if status == 0:
                say("the launcher ended before its ranks, which were killed")
                return 1
        if status >= 192:  # deepspeed's 256 - signal
            status -= 256
        return 128 - status if status < 0 else status

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.stop_asked:
            self.killed = True
            self._signal_group(signal.SIGKILL)
            return
        self.stop_asked = True
        say("saving, then stopping" + (" (again: stop at once)" if number == signal.SIGINT else ""))
        passed = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
        if self.remote:
            with suppress(ProcessLookupError):
                self.launcher.send_signal(passed)
        elif not self._signal_ranks(passed):
            self._signal_group(signal.SIGTERM)

    def _signal_ranks(self, number: signal.Signals) -> bool:
        """Send a signal to the ranks, which are the children of the launcher's children. False: there is none yet."""
        import psutil

        try:
            ranks = [rank for node in psutil.Process(self.launcher.pid).children() for rank in node.children()]
        except psutil.Error:
            return False
        for rank in ranks:
            with suppress(psutil.Error):
                rank.send_signal(number)
        return bool(ranks)

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.launcher.pid, number)

    def _left_behind(self) -> bool:
        """Whether a process of the session lives. Zombies do not count: a container may have nobody to reap them."""
        import psutil

        try:
            os.killpg(self.launcher.pid, 0)
        except ProcessLookupError:
            return False
        for process in psutil.process_iter():
            with suppress(ProcessLookupError, PermissionError, psutil.Error):
                if os.getpgid(process.pid) == self.launcher.pid and process.status() != psutil.STATUS_ZOMBIE:
                    return True
        return False


def last_line(request: Request, status: int, killed: bool = False) -> str:
    """What to say after a run that ended with `status`; empty when the run said everything itself.

    `killed`: by a second Ctrl-C.
    """
    words = [word for word in request.words if not word.startswith("train.resume=")]  # what is saved now is newer
    again = f"to resume: {TRAIN} {shlex.join(words)}"
    if status in (0, EXIT_USER_ERROR):
        return ""
    if status == EXIT_STOPPED:
        return f"{words[0]} saved and stopped; {again}"
    if killed:
        return f"{words[0]} stopped at once; from the last good checkpoint, {again}"
    cause = ": a rank was killed by signal 9, often because memory ran out" if status == 137 else ", see above"
    return f"{words[0]} failed (status {status}){cause}; from the last good checkpoint, {again}"


def launch(request: Request) -> int:
    """Check a run and train it to its end; returns the exit status. Raises UserError before anything starts."""
    from fovlm.config import deepspeed, schema

    where = find_resources(request.chooses)
    deepspeed.resolve(schema.load(request.words[0], list(request.words[1:])), where.world, where.device)
    if where.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    if request.dry_run:
        os.environ["WORLD_SIZE"] = str(where.world)
        os.execv(sys.executable, [sys.executable, "-m", "fovlm.train", *request.words, "--dry-run"])
    run = Run(*command_of(request, where), remote=where.slurm or bool(where.hostfile))
    status = run.wait()
    if run.stop_asked and not run.remote and status - 128 in SIGNALS:  # the ranks had no handler yet
        raise Stopped
    if line := last_line(request, status, run.killed):
        say(line)
    return status


def main(words: list[str] | None = None) -> int:
    """Returns the exit status: 2 for a mistake that one line explains, 75 when a signal stopped the run."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped

    words = sys.argv[1:] if words is None else words
    try:
        request = parse(words)
        if request.list_runs:
            notes = experiments.names().items()
            with suppress(BrokenPipeError):  # a reader that has seen enough, like `head`
                print("\n".join(f"{run:{max(len(run) for run, _ in notes)}}  {note}" for run, note in notes))
            return 0
        on_signals(stop)
        return launch(request)
    except Stopped:
        say(f"{request.words[0]} stopped before the first step; the same command starts it again")
        return EXIT_STOPPED
    except UserError as error:
        say(str(error))
        return EXIT_USER_ERROR
