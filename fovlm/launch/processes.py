"""The processes of a run on this machine: started, signalled, and waited for to the last."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from fovlm.errors import say
from fovlm.paths import ROOT

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GRACE = 5.0  # seconds for the ranks to end after their launcher


def on_signals(handler: Callable[[int, FrameType | None], object]) -> None:
    """Handle SIGNALS; under nohup, SIGHUP stays ignored."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


class Run:
    """A started launcher in a session of its own, so that a signal reaches the ranks once, from here.

    Ranks save and stop on SIGTERM; the deepspeed launcher would leave them behind. `through_srun`: srun passes signals
    on. `announce`: say that a signal has come.
    """

    def __init__(self, command: list[str], env: dict[str, str], through_srun: bool = False, announce: bool = True):
        self.through_srun, self.announce = through_srun, announce
        self.stop_asked = self.killed = False
        early: list[int] = []
        on_signals(lambda number, frame: early.append(number))
        if not through_srun:
            env = {**env, "FOVLM_LAUNCHER": str(os.getpid())}  # whose end the ranks notice
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
            self.kill()
            return
        self.stop_asked = True
        if self.announce:
            say("saving, then stopping" + (" (again: stop at once)" if number == signal.SIGINT else ""))
        passed = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM
        if self.through_srun:
            with suppress(ProcessLookupError):
                self.launcher.send_signal(passed)
        elif not self._signal_ranks(passed):
            self._signal_group(signal.SIGTERM)

    def kill(self) -> None:
        """End every process at once."""
        self.killed = True
        self._signal_group(signal.SIGKILL)

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
