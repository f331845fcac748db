"""One writer for a run folder: `run.lock` in it names the process that trains there.

On one machine, and on network disks that have locks, the system's lock decides, which ends with its process. Elsewhere
the file decides: its holder changes it every few seconds, and a holder on another host that has been silent for a
minute is taken for dead. So a lock that was left behind never has to be removed by hand.
"""

import fcntl
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fovlm import distributed
from fovlm.errors import EXIT_FAILED, UserError, say
from fovlm.train.process import lives

log = logging.getLogger("fovlm")

NAME = "run.lock"
BEAT = 5.0  # seconds between two signs of life
SILENT = 60.0  # seconds without one after which a holder on another host is dead
LINGER = 15.0  # seconds that the workers of a killed process may hold its lock


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Rank 0 locks the run folder; every rank must call it. Raises SharedError when another process trains there."""
    lock = distributed.collective_call(lambda: RunLock(folder) if distributed.rank() == 0 else None)
    try:
        check_shared(folder)
        yield
    finally:
        if lock:
            lock.release()


def check_shared(folder: Path) -> None:
    """Raise SharedError that names the hosts which do not see what rank 0 writes into `folder`."""
    probe = folder / distributed.broadcast(f".{secrets.token_hex(8)}")
    distributed.collective_call(lambda: probe.touch() if distributed.rank() == 0 else None)
    seen = probe.exists()
    try:
        distributed.check_same(seen, f"{folder} is not that of the first node: all must share FOVLM_RUNS")
    finally:
        if distributed.rank() == 0:
            probe.unlink()


class RunLock:
    """A locked run folder, which is made if needed. Raises UserError that names the other process."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.name = folder / NAME, f"{socket.gethostname()}:{os.getpid()}"
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self.released = threading.Event()
        try:
            self._acquire()
        except BaseException:
            os.close(self.handle)
            raise
        self._write(0)
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Unlock; the file stays, empty."""
        self.released.set()
        with suppress(OSError):
            os.ftruncate(self.handle, 0)
        os.close(self.handle)

    def _acquire(self) -> None:
        until = time.monotonic() + LINGER
        while (locked := self._lock()) is False:
            if self._lives() or time.monotonic() > until:
                raise self._in_use()
            time.sleep(0.2)
        holder, seen = self._holder(), self._read()
        elsewhere = holder and holder[0] != socket.gethostname()
        # Without the system's lock the number may be that of another process by now, also after a container's restart.
        if holder and (elsewhere or (locked is None and self._lives())):
            log.warning("%s: %s on %s held it last: waiting for a sign of life", self.path, holder[1], holder[0])
            until = time.monotonic() + SILENT
            while time.monotonic() < until:
                time.sleep(min(BEAT, SILENT / 4))
                if self._read() not in (seen, ""):
                    raise self._in_use()

    def _lock(self) -> bool | None:
        """Whether the system's lock is ours now; None on a file system that has none."""
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def _read(self) -> str:
        """The file's content, read anew: opening it is what makes a network disk look."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _holder(self) -> tuple[str, int] | None:
        """Host and process in the file; None when it is empty."""
        host, _, pid = self._read().partition(" ")[0].rpartition(":")
        return (host, int(pid)) if host and pid.isdecimal() and len(pid) < 9 else None

    def _lives(self) -> bool:
        """Whether the holder is a process of this host that lives, or one of another host."""
        holder = self._holder()
        return holder is not None and (holder[0] != socket.gethostname() or lives(holder[1]))

    def _in_use(self) -> UserError:
        host, pid = self._holder() or ("an unknown host", 0)
        return UserError(
            f"{self.path.parent}: process {pid} on {host} trains there already: wait until it ends or stop it, or give "
            f"this run another name with name=... (if no such process exists, remove {NAME})"
        )

    def _write(self, beat: int) -> None:
        with suppress(OSError):  # a full disk
            text = f"{self.name} {beat}\n".encode()
            os.pwrite(self.handle, text, 0)
            os.ftruncate(self.handle, len(text))
            os.fsync(self.handle)

    def _beat(self) -> None:
        """Give signs of life, and end this process if another one has taken the folder: it must not write there."""
        beat = 0
        while not self.released.wait(BEAT):
            if (text := self._read()) and not text.startswith(f"{self.name} "):
                say(f"{self.path} was taken by {text.split()[0]}: ending")
                os._exit(EXIT_FAILED)
            self._write(beat := beat + 1)
