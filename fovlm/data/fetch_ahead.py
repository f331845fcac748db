"""Fetches the remote shards of a run ahead of need, in the order in which its plan reads them.

Every rank has one thread. It holds what the run needs next, up to half of the cache, and fetches what is missing there;
a shard that another rank is fetching is left to that.
"""

import heapq
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import BinaryIO, TypeVar

from fovlm.data.dataset import Dataset, SourceShards
from fovlm.data.sampling import BLOCK
from fovlm.data.shard_cache import RemoteShard
from fovlm.errors import UserError

AHEAD = 128  # shards at most, each an open file
PAUSE = 0.5  # seconds between two looks at what others fetch
PATIENCE = 10.0  # seconds of waiting before it is said, and between two times
T = TypeVar("T")
log = logging.getLogger(__name__)


def upcoming(dataset: Dataset, cursor: int, stop: int | None = None) -> Iterator[RemoteShard]:
    """The remote shards that positions from `cursor` to before `stop` read, in the order of need, each once."""

    def needs(which: int, source: SourceShards) -> Iterator[tuple[int, RemoteShard]]:
        for first, shards in source.order.blocks(dataset.mix.before(which, cursor)):
            position = dataset.mix.position(which, first)
            yield from ((position, s) for n in shards if isinstance(s := source.table.shards[n], RemoteShard))

    remote = [(which, source) for which, source in enumerate(dataset.sources) if source.remote]
    left = {shard for _, source in remote for shard in source.remote}
    for position, shard in heapq.merge(*(needs(*one) for one in remote), key=itemgetter(0)):
        if stop is not None and position >= stop:
            return
        if shard in left:
            left.remove(shard)
            yield shard
        if not left:
            return


class FetchAhead:
    """The shards of `dataset` from position `cursor` on, up to `stop`; `cursor` moves with the run."""

    def __init__(self, dataset: Dataset, cursor: int, stop: int | None):
        self.dataset, self.cursor, self.stop = dataset, cursor, stop
        self.held: dict[RemoteShard, BinaryIO] = {}
        self.failed: set[RemoteShard] = set()
        self.ended, self.moved = False, threading.Event()
        self.waiting_since: float | None = None
        self.said = 0.0

    def __enter__(self) -> "FetchAhead":
        if self.dataset.remote:
            self._warn()
            threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread, after the shard that it is fetching."""
        self.ended = True
        self.moved.set()

    def wait_for(self, step: Callable[[], T]) -> T:
        """The result of `step`, for which the run waits: a long wait is logged, with the shard."""
        self.waiting_since = time.monotonic()
        try:
            return step()
        finally:
            self.waiting_since = None

    def move(self, cursor: int) -> None:
        """The run now begins at `cursor`."""
        self.cursor = cursor
        self.moved.set()

    def wanted(self) -> list[RemoteShard]:
        """The shards that are needed next, in that order: as many as half of the cache holds, and one at least."""
        found: list[RemoteShard] = []
        size = 0
        for shard in islice(upcoming(self.dataset, self.cursor, self.stop), AHEAD):
            size += shard.file.size
            if found and size > shard.cache.limit // 2:
                break
            found.append(shard)
        return found

    def _warn(self) -> None:
        """Say so when the cache is too small for the shards that are shuffled together, at the start of a run."""
        sizes = [sorted((s.file.size for s in source.remote), reverse=True)[:BLOCK] for source in self.dataset.sources]
        need, limit = sum(map(sum, sizes)), next(s.remote[0] for s in self.dataset.sources if s.remote).cache.limit
        if need > limit and self.stop is None:
            text = "data.cache_gb=%g holds less than the %.2g GB of shards that are read at once: they exceed it"
            log.warning(f"{text}, or are fetched again and again; give twice as much", limit / 1e9, need / 1e9)

    def _work(self) -> None:
        while not self.ended:
            self.moved.clear()
            wanted = self.wanted()
            for shard in self.held.keys() - set(wanted):
                self.held.pop(shard).close()
            missing = [shard for shard in wanted if not self._hold(shard) and shard not in self.failed]
            for shard in missing:
                try:
                    if not shard.fetch(partial(self._say, shard)):
                        self._say(shard)
                except UserError as error:  # who reads the shard raises it
                    self.failed.add(shard)
                    log.warning("%s", error)
                self._hold(shard)
                if self.moved.is_set():
                    break
            self.moved.wait(PAUSE if missing else None)
        for file in self.held.values():
            file.close()

    def _hold(self, shard: RemoteShard) -> bool:
        if shard not in self.held and (file := shard.hold()):
            self.held[shard] = file
        return shard in self.held

    def _say(self, shard: RemoteShard, done: int = 0) -> None:
        since, now = self.waiting_since, time.monotonic()
        if since and now - since > PATIENCE and now - self.said > PATIENCE:
            self.said = now
            size = f"{done / 1e6:.0f} of {shard.file.size / 1e6:.0f} MB" if done else "another process fetches it"
            log.warning("waiting for data for %.0f s: %s (%s)", now - since, shard, size)
