"""Which rows go into which shard: a function of the tables and the seed, decided before anything is decoded.

Blocks are shuffled by the seed and divided into windows of about eight shards; the rows of a window are divided among
them at random. So a shard draws from many places, no row group is read more often than a window has shards, and any
worker can make any shard independently, with one block in memory. Within a shard rows have the order of the blocks:
training shuffles them.
"""

from dataclasses import dataclass

import numpy as np

from fovlm.data.sampling import permutation
from fovlm.data.tables import Block

WINDOW = 8  # shards whose rows are shuffled together


@dataclass(frozen=True)
class ShardTask:
    """One shard: the rows of each block (i64, ascending, within the block)."""

    number: int
    parts: tuple[tuple[Block, np.ndarray], ...]

    @property
    def rows(self) -> int:
        return sum(len(rows) for _, rows in self.parts)


def plan_shards(blocks: list[Block], per_shard: int, seed: int) -> list[ShardTask]:
    """Distribute all rows of the blocks over shards of about `per_shard` rows."""
    if not blocks:
        return []
    order = permutation(len(blocks), seed, "blocks")
    rows = np.array([blocks[at].rows for at in order])
    windows = max(1, int(rows.sum()) // (WINDOW * per_shard))
    window_of = (rows.cumsum() - rows) * windows // rows.sum()
    tasks: list[ShardTask] = []
    for n in np.unique(window_of):
        window = [blocks[at] for at in order[window_of == n]]
        tasks += _distribute(window, int(rows[window_of == n].sum()), per_shard, seed, len(tasks))
    return tasks


def _distribute(window: list[Block], total: int, per_shard: int, seed: int, first: int) -> list[ShardTask]:
    """The shards of one window with `total` rows, of equal sizes to within one row."""
    block = np.repeat(np.arange(len(window)), [b.rows for b in window])
    row = np.concatenate([np.arange(b.rows) for b in window])
    order = permutation(total, seed, "rows", first)
    tasks = []
    for number, chosen in enumerate(np.array_split(order, -(-total // per_shard)), start=first):
        at = np.sort(chosen)  # reading order: block by block
        parts = tuple((window[b], row[at[block[at] == b]]) for b in np.unique(block[at]))
        tasks.append(ShardTask(number, parts))
    return tasks
