"""The process of a rank: the one that started it dies, its terminal closes, it ends."""

import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn, TextIO, cast

import psutil

from fovlm.errors import say

LAUNCHER = "FOVLM_LAUNCHER"  # the process of launch.sh, on one machine
LOOKS = 5.0  # seconds in which the launcher sees that a rank has ended; deepspeed's looks once a second


def stop_without_launcher() -> None:
    """From now on, SIGTERM reaches this process when its parent or its launcher is gone: it saves and stops."""
    parent, launcher = os.getppid(), int(os.environ.get(LAUNCHER, 0))

    def watch() -> None:
        while os.getppid() == parent and (not launcher or lives(launcher)):
            time.sleep(1)
        say("its launcher is gone: saving, then stopping")
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def wait_to_be_ended() -> None:
    """After the loss of another rank: wait until the launcher has seen that one end, whose status it reports, and ends
    this one. Returns without a launcher, or when it does not."""
    if os.environ.get(LAUNCHER):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(LOOKS)


def exit_at_once(status: int) -> NoReturn:
    """End this process without its clean-up, in which torch's threads may abort when another rank is gone: 134 would
    replace the status. What threads of the dataloader's queues still hold would be reported as leaked semaphores."""
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":  # multiprocessing's; torch closes its queues and waits for none
            thread.join(timeout=1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def lives(pid: int) -> bool:
    """Whether a process of this host lives. Zombies do not: a container may have nobody to reap them."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Output:
    """A text stream that outlives its reader: what cannot be written any more is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:  # a closed pipe, a terminal that is gone, a full disk
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Send all that follows nowhere, also what C code writes."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_running_without_output() -> None:
    """From now on a closed pipe (`| head`), a lost terminal, or none at all (`>&-`) ends no printing process."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the next file would get this number, and what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name) or os.fdopen(number, "w", closefd=False)
        setattr(sys, name, cast(TextIO, Output(stream)))
