"""The steps of a run: consecutive samples -> packs -> this rank's batches, decoded by worker processes.

A step takes the samples from the cursor on and deals them to its packs (`packing.pack_samples`); pack j goes to rank
j % world. The samples of a step depend on the cursor alone: not on ranks, nor on workers, nor on what turns out broken.
So the cursor, one integer, is all that a resumed run needs, on any number of ranks. Ranks that do not divide
`packs_per_step` share a few packs more, so that all of them have the same number.

Workers start from a fork server: a plain fork would copy the locks of CUDA's, gloo's and the tokenizer's threads in
whatever state they are in. They leave signals to their parent, which has a checkpoint to save first.
"""

import atexit
import multiprocessing.forkserver
import shutil
import signal
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch.utils.data

from fovlm.data.dataset import Dataset
from fovlm.data.fetch_ahead import FetchAhead
from fovlm.data.handover import FrameBuffers, Handed, buffer_bytes
from fovlm.data.packing import Batch, PackBudget, collate, pack_samples, round_up
from fovlm.data.workers import follow_parent
from fovlm.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
WINDOW = 16  # samples for each pack that are looked at to plan a step; twice as many where they do not fill it


@dataclass
class StepPlan:
    """One step: the positions in each pack, and the first position behind the step."""

    packs: list[list[int]]
    cursor: int


@dataclass
class StepBatches:
    """This rank's share of one step; `samples` counts those of all ranks, `cursor` is where the next step starts."""

    batches: list[Batch]
    cursor: int
    samples: int


def packs_of_each(packs: int, world: int) -> int:
    """How many packs of a step each of `world` ranks has."""
    return -(-packs // world)


def plan_steps(
    dataset: Dataset, budget: PackBudget, packs: int, cursor: int, stop: int | None = None, world: int = 1
) -> Iterator[StepPlan]:
    """The steps from `cursor` on, without end, or up to the position `stop` (the last step may then hold less)."""
    deal_to, ahead = world * packs_of_each(packs, world), packs * WINDOW
    sizes = dataset.sizes(cursor, cursor)  # from the cursor on; most of them were looked up for the step before
    while stop is None or cursor < stop:
        end = cursor + ahead if stop is None else min(cursor + ahead, stop)
        sizes = np.concatenate([sizes, dataset.sizes(cursor + len(sizes), end)])
        if budget.of(sizes).sum() <= packs * budget.cost and len(sizes) == ahead:
            ahead *= 2  # the step goes beyond them
            continue
        contents, taken = pack_samples(sizes, packs, budget, deal_to)
        yield StepPlan([[cursor + number for number in pack] for pack in contents], cursor + taken)
        cursor, sizes = cursor + taken, sizes[taken:]


def samples_that_fill(packs: int, dataset: Dataset, budget: PackBudget) -> int:
    """How many samples, from the first on and each at most once, fill so many packs."""
    once = min(dataset.samples.values()) * len(dataset.samples)
    return next(plan_steps(dataset, budget, packs, 0, once)).cursor


class PackLoader:
    """Iterates over the steps of a run from `cursor`, as rank `rank` of `world`.

    `packs` are all packs of a step, over all ranks. `pin` puts batches into page-locked memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        budget: PackBudget,
        packs: int,
        *,
        rank: int = 0,
        world: int = 1,
        cursor: int = 0,
        stop: int | None = None,
        workers: int = 0,
        tokens_per_look: int = 1,
        pin: bool = False,
    ):
        self.dataset, self.budget, self.packs = dataset, budget, packs
        self.rank, self.world, self.cursor, self.stop = rank, world, cursor, stop
        self.workers, self.tokens_per_look, self.pin = workers, tokens_per_look, pin
        if workers:
            frames = round_up(budget.cost // budget.frame)
            held = 0 if pin else 2 * packs_of_each(packs, world)  # of a step, and of the one before it
            _check_shared_memory(workers, buffer_bytes(frames * 3 * dataset.frame_size**2), held)
            _start_server()  # it imports torch meanwhile

    def __iter__(self) -> Iterator[StepBatches]:
        planned: deque[StepPlan] = deque()  # the steps that workers were asked for and that were not yet handed out

        def packs_of_rank() -> Iterator[list[int]]:
            for step in plan_steps(self.dataset, self.budget, self.packs, self.cursor, self.stop, self.world):
                planned.append(step)
                yield from step.packs[self.rank :: self.world]

        others = multiprocessing.active_children()
        with _unseen_main():
            batches = iter(self._batches(packs_of_rank()))
        # multiprocessing ends daemons with a SIGTERM, which ours ignore, and then waits for them for ever.
        atexit.register(_kill, [process for process in multiprocessing.active_children() if process not in others])
        share = packs_of_each(self.packs, self.world)
        with FetchAhead(self.dataset, self.cursor, self.stop) as fetch:
            while found := fetch.wait_for(lambda: list(islice(batches, share))):
                for problem in (batch for batch in found if isinstance(batch, UserError)):
                    raise problem
                mine, step = cast(list[Batch], found), planned.popleft()
                samples, self.cursor = step.cursor - self.cursor, step.cursor
                fetch.move(step.cursor)
                yield StepBatches(mine, step.cursor, samples)

    def _batches(self, packs: Iterator[list[int]]) -> torch.utils.data.DataLoader:
        options: dict[str, Any] = {}
        if self.workers:
            options = {"multiprocessing_context": "forkserver", "worker_init_fn": _follow_parent}
        return torch.utils.data.DataLoader(
            _Packs(self.dataset, self.tokens_per_look, FrameBuffers() if self.workers else None),
            sampler=packs,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=self.workers,
            pin_memory=self.pin,
            **options,
        )


@dataclass
class _Packs(torch.utils.data.Dataset):
    """The positions in a pack -> the pack as a Batch, or why its shards cannot be fetched."""

    dataset: Dataset
    tokens_per_look: int
    buffers: FrameBuffers | None  # with workers: each has its own copy

    def __getitem__(self, positions: list[int]) -> Batch | Handed | UserError:
        samples, bad = [], []
        try:
            with self.dataset.hold(positions):
                for position in positions:
                    found, problem = self.dataset.read(position)
                    samples += found
                    bad += [problem] if problem else []
        except UserError as error:  # torch would put the worker's traceback into its message
            return error
        pack = samples, self.dataset.frame_size, self.tokens_per_look, bad
        return Handed(collate(*pack, take=self.buffers.take)) if self.buffers else collate(*pack)


def _as_is(batch: Any) -> Any:
    return batch


def _follow_parent(worker: int) -> None:
    """torch watches a worker's parent by its process number, which is the fork server's here."""
    follow_parent(*SIGNALS)


def _kill(workers: list[BaseProcess]) -> None:
    for process in workers:
        process.kill()


def _check_shared_memory(workers: int, buffer: int, held: int) -> None:
    """Workers hand packs over in shared buffers of `buffer` bytes at most; when memory is full, the system kills them
    unheard. Of each worker two are in work or ready (torch's `prefetch_factor`), and its share of `held` is read."""
    memory, needed = Path("/dev/shm"), workers * (2 + -(-held // workers)) * buffer
    if memory.is_dir() and (free := shutil.disk_usage(memory).free) < needed:
        raise UserError(
            f"{memory} has {free >> 20} MB free, and {workers} workers of a rank need {needed >> 20}: lower "
            "data.workers (0 needs none) or give the container more (docker run --shm-size)"
        )


@contextmanager
def _unseen_main() -> Iterator[None]:
    """Processes started meanwhile do not import the main module again: a worker needs no DeepSpeed."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_server() -> None:
    """Start the fork server, deaf to signals that are meant for the run: what is ignored at its start stays so."""
    multiprocessing.set_forkserver_preload([__name__])
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in SIGNALS]
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for number, handler in before:
            signal.signal(number, handler)
