"""Ends a run in which a step takes too long, and names the rank that hangs: one that waits for others is not it."""

import faulthandler
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable

import torch.distributed as dist

from fovlm import distributed
from fovlm.errors import EXIT_FAILED, say

GRACE = 10.0  # seconds for all ranks to say where they are


class Watchdog:
    """From `restart` on, this process has `seconds` until the next `restart` or `stop`.

    Past that each rank tells the others where it is, rank 0 (or the first that answers) prints it, and then all end.
    """

    def __init__(self, seconds: float):
        self.seconds, self.deadline = seconds, math.inf
        self.hosts = distributed.gather(socket.gethostname())
        self.main = threading.main_thread().ident
        threading.Thread(target=self._watch, daemon=True).start()

    def restart(self) -> None:
        self.deadline = time.monotonic() + self.seconds
        # Also where C code holds Python's lock, and no thread runs.
        faulthandler.dump_traceback_later(self.seconds + 2 * GRACE, exit=True)

    def stop(self) -> None:
        self.deadline = math.inf
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while time.monotonic() < self.deadline:
            time.sleep(min(1.0, self.seconds / 10))
        places = self._exchange("place", self._place(), range(distributed.world()))
        speaker = min(rank for rank, place in enumerate(places) if place)
        if speaker == distributed.rank():
            for rank, place in enumerate(places):
                say(f"rank {rank} on {self.hosts[rank]} {place or 'does not answer'}")
            say(f"a step took longer than {self.seconds / 60:g} minutes (train.hang_minutes): ending")
        self._exchange("printed", "yes", [speaker])  # a rank that ends before may take the speaker with it
        faulthandler.dump_traceback()
        os._exit(EXIT_FAILED)

    def _place(self) -> str:
        """Where the main thread is."""
        stack = traceback.extract_stack(sys._current_frames()[self.main or 0])
        if any("torch/distributed/" in frame.filename for frame in stack):
            return "waits for the others"
        return f"hangs in {stack[-1].name} ({stack[-1].filename}:{stack[-1].lineno})"

    def _exchange(self, topic: str, message: str, ranks: Iterable[int]) -> list[str]:
        """Tells all ranks `message`, and returns what `ranks` say on this topic: "" for one that does not answer in
        time or can no longer be asked."""
        messages = [""] * distributed.world()
        messages[distributed.rank()] = message
        if not dist.is_initialized():
            return messages
        try:
            store = dist.PrefixStore(f"hang {topic}", dist.distributed_c10d._get_default_store())
            store.set(str(distributed.rank()), message)
            until = time.monotonic() + GRACE
            while (missing := [rank for rank in ranks if not messages[rank]]) and time.monotonic() < until:
                for rank in missing:
                    if store.check([str(rank)]):
                        messages[rank] = store.get(str(rank)).decode()
                time.sleep(0.1)
        except RuntimeError:  # the node of rank 0, which holds the store, is gone
            pass
        return messages
