"""The order of a run: position -> (source, epoch, shard, row), as pure functions of numbers. Only numpy.

Two parts. `MixtureSampler` decides which source a position belongs to: Tijdeman's chairman assignment rule keeps every
source within one sample of its exact share in every prefix of the run. `ShardShuffle` decides which sample of that
source it is: each epoch visits the shards in a new order, a few at a time, and the rows of those few in a new order; so
reads stay close together on disk, and every epoch reads every sample exactly once.

Random numbers are raw Philox words, which are the same in all releases of numpy, under keys hashed from their purpose;
nothing here has a state that must be saved.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import lcm

import numpy as np

from fovlm.errors import UserError

LONGEST_PERIOD = 100_000
BLOCK = 8  # shards whose rows are shuffled together


class MixtureSampler:
    """Which source each position of the run belongs to, by weight and per sample.

    Weights are taken as the decimal fractions in the YAML, so the pattern is exact and periodic: the source of a
    position, and its number among that source's samples, are looked up in one period. Ahead of the mixture come `first`
    samples of some of its sources. Raises UserError when the period would be longer than LONGEST_PERIOD samples.
    """

    def __init__(self, weights: dict[str, float], first: dict[str, int] | None = None):
        exact = {name: Fraction(str(weight)) for name, weight in weights.items() if weight > 0}
        if not exact:
            raise UserError("data.mixture: no source has a weight above 0")
        total = sum(exact.values())
        shares = [weight / total for weight in exact.values()]
        period = lcm(*(share.denominator for share in shares))
        if period > LONGEST_PERIOD:
            raise UserError(
                f"data.mixture: the weights {', '.join(map(str, weights.values()))} have no common period below "
                f"{LONGEST_PERIOD:,} samples: use at most four decimals and a sum of 1"
            )
        self.names = list(exact)
        self.counts = np.array([int(share * period) for share in shares])
        self.pattern = np.array(spread_evenly(self.counts.tolist()))  # [period]: the source of each position
        self.number = np.empty(period, np.int64)  # [period]: which one of its source's samples it is
        self.places = [np.flatnonzero(self.pattern == source) for source in range(len(exact))]  # [count] each
        for places in self.places:
            self.number[places] = np.arange(len(places))
        self.first = np.array([(first or {}).get(name, 0) for name in self.names])

    def __call__(self, position: int) -> tuple[int, int]:
        """Position -> (source, number among the samples of that source), both from 0."""
        source, number = self.window(position, position + 1)
        return int(source[0]), int(number[0])

    def position(self, source: int, number: int) -> int:
        """The position of a source's sample: the inverse of a call."""
        if number < self.first[source]:
            return int(self.first[:source].sum()) + number
        period, number = divmod(number - int(self.first[source]), int(self.counts[source]))
        return int(self.first.sum()) + period * len(self.pattern) + int(self.places[source][number])

    def before(self, source: int, position: int) -> int:
        """How many samples of a source come before a position."""
        return bisect_left(range(position), position, key=lambda number: self.position(source, number))

    def window(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for the positions from `start` to before `stop` -> i64 [n] each."""
        positions, ahead = np.arange(start, stop), self.first.cumsum()
        early = np.searchsorted(ahead, positions[positions < ahead[-1]], side="right")
        period, at = np.divmod(positions[len(early) :] - ahead[-1], len(self.pattern))
        late = self.pattern[at]
        number = self.first[late] + period * self.counts[late] + self.number[at]
        return np.concatenate([early, late]), np.concatenate(
            [positions[: len(early)] - (ahead - self.first)[early], number]
        )


def spread_evenly(counts: list[int]) -> list[int]:
    """A sequence of sum(counts) numbers, each i counts[i] times; of the first n, n * share are i, within less than 1.

    R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): of the numbers that are due, the
    most urgent comes next. Integers throughout: `owed` is n * count - period * (turns so far).
    """
    k, period = len(counts), sum(counts)
    if k == 1:
        return [0] * period
    urgency = [lcm(*counts) // count for count in counts]
    owed = [0] * k
    order = []
    for _ in range(period):
        owed = [o + count for o, count in zip(owed, counts, strict=True)]
        ready = [i for i in range(k) if (2 * k - 2) * owed[i] >= period]
        chosen = min(ready, key=lambda i: ((2 * k - 3) * period - (2 * k - 2) * owed[i]) * urgency[i])
        owed[chosen] -= period
        order.append(chosen)
    return order


class ShardShuffle:
    """The order of one source's samples, epoch after epoch. `rows` are the samples of each shard."""

    def __init__(self, rows: list[int], seed: int, source: str, block: int = BLOCK):
        self.rows = np.array(rows, np.int64)
        self.total = int(self.rows.sum())
        self.seed, self.source, self.block = seed, source, block
        self._cache: dict[tuple, tuple] = {}  # the last results of _epoch and _block

    def window(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards and rows i64 [n] of the source's samples from number `start` to before `stop`."""
        found = []
        while start < stop:
            epoch, number = divmod(start, self.total)
            _, ends = self._cached(self._epoch, epoch)
            block = int(np.searchsorted(ends, number, side="right"))
            first = int(ends[block - 1]) if block else 0
            shard, row = self._cached(self._block, epoch, block)
            some = slice(number - first, number - first + stop - start)
            found.append((shard[some], row[some]))
            start += len(shard[some])
        return np.concatenate([s for s, _ in found]), np.concatenate([r for _, r in found])

    def blocks(self, number: int) -> Iterator[tuple[int, list[int]]]:
        """(the number of its first sample, its shards) of the block with sample `number`, and of all behind it."""
        epoch, at = divmod(number, self.total)
        while True:
            shards, ends = self._epoch(epoch)
            for block in range(int(np.searchsorted(ends, at, side="right")), len(ends)):
                first = int(ends[block - 1]) if block else 0
                yield epoch * self.total + first, shards[block * self.block : (block + 1) * self.block].tolist()
            epoch, at = epoch + 1, 0

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(the shards in the epoch's order, the number of samples up to the end of each block)."""
        shards = permutation(len(self.rows), self.seed, self.source, epoch)
        firsts = np.arange(0, len(shards), self.block)
        return shards, np.add.reduceat(self.rows[shards], firsts).cumsum()

    def _block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards, rows) of the block's samples in their order."""
        shards = self._cached(self._epoch, epoch)[0][block * self.block : (block + 1) * self.block]
        shard = np.repeat(shards, self.rows[shards])
        row = np.concatenate([np.arange(n) for n in self.rows[shards]])
        order = permutation(len(shard), self.seed, self.source, epoch, block)
        return shard[order], row[order]

    def _cached(self, make: Callable[..., tuple], *key: int) -> tuple:
        if key not in self._cache:
            if len(self._cache) >= 8:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = make(*key)
        return self._cache[key]


def permutation(n: int, *key: object) -> np.ndarray:
    """The numbers 0 .. n - 1 in an order that depends on the key alone, in every release of numpy."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(n)
    return np.argsort(words, kind="stable")
