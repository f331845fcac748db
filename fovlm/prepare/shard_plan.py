"""Which rows go into which shard: a function of the tables and the seed alone, decided before anything is decoded.

Blocks are put in an order drawn from the seed and taken some at a time; the rows of those are shuffled and dealt out
to the shards. So a shard draws from many places, no row group is read more often than that window has shards, and any
worker can make any shard by itself.
"""

from dataclasses import dataclass

import numpy as np

from fovlm.data.sampling import permutation
from fovlm.data.tables import Block

WINDOW = 8  # shards whose rows are shuffled together


@dataclass(frozen=True)
class Task:
    """One shard: of each block the rows that it takes, i64 within the block, and how all of them are ordered."""

    number: int
    parts: tuple[tuple[Block, np.ndarray], ...]
    order: np.ndarray  # i64 [rows]: which of the parts' rows, one part behind the other, comes first, second ...

    @property
    def rows(self) -> int:
        return len(self.order)


def plan(blocks: list[Block], per_shard: int, seed: int) -> list[Task]:
    """Deal all rows of the blocks into shards of about `per_shard` rows."""
    if not blocks:
        return []
    order = permutation(len(blocks), seed, "blocks")
    rows = np.array([blocks[at].rows for at in order])
    windows = max(1, int(rows.sum()) // (WINDOW * per_shard))
    number = (rows.cumsum() - rows) * windows // rows.sum()  # of the window that each block falls into
    tasks: list[Task] = []
    for n in np.unique(number):
        window = [blocks[at] for at in order[number == n]]
        tasks += _deal(window, int(rows[number == n].sum()), per_shard, seed, len(tasks))
    return tasks


def _deal(window: list[Block], held: int, per_shard: int, seed: int, first: int) -> list[Task]:
    """The shards of one window, of equal sizes to within one row."""
    block = np.repeat(np.arange(len(window)), [b.rows for b in window])
    row = np.concatenate([np.arange(b.rows) for b in window])
    order = permutation(held, seed, "rows", first)
    tasks = []
    for number, taken in enumerate(np.array_split(order, -(-held // per_shard)), start=first):
        at = np.sort(taken)  # reading order: block by block
        parts = tuple((window[b], row[at[block[at] == b]]) for b in np.unique(block[at]))
        tasks.append(Task(number, parts, np.searchsorted(at, taken)))
    return tasks
