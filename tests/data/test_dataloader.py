"""Steps: one order for any ranks and workers, exact resume, counted breakage, clear errors."""

import hashlib
import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest

from fovlm.config.schema import DataSource
from fovlm.data.chat import ChatTokenizer
from fovlm.data.dataloader import PackLoader, plan_steps
from fovlm.data.dataset import Dataset
from fovlm.data.packing import PackBudget, SampleIssue
from fovlm.data.shards import write_shards
from fovlm.errors import UserError
from helpers import ROOT, tiny

BUDGET = PackBudget(cost=240, frame=8)
PACKS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVLM_DATA", str(folder))
        patch.setenv("FOVLM_CACHE", str(folder / "cache"))
        tiny.clips(folder, "video", [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7] * 3, per_shard=4)
        tiny.clips(folder, "text", [0] * 9, per_shard=4)
        images = [{"__key__": f"i{i}", "json": tiny.conversation(), "jpg": tiny.picture(i)} for i in range(9)]
        images[4]["jpg"] = b"no picture"
        write_shards(folder / "image-%d.tar", images)
        sources = {
            "video": DataSource(shards="video-*.tar", kind="video"),
            "image": DataSource(shards="image-0.tar", kind="image"),
            "text": DataSource(shards="text-*.tar", kind="text"),
        }
        weights = {"video": 0.56, "image": 0.3, "text": 0.14}
        yield Dataset(sources, weights, ChatTokenizer(tiny.tokenizer(), "before_frames", "answer", 100), frame_size=16)


def fingerprint(batch) -> str:
    """A hash of everything a pack holds."""
    digest = hashlib.sha256(repr((batch.keys, batch.sources, batch.used)).encode())
    for tensor in (batch.frames, batch.tokens, batch.weight, batch.sequence.slot, batch.sequence.segment):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def steps(data, world: int, workers: int, n: int, cursor: int = 0):
    """n steps of all ranks -> (the packs' fingerprints in the order of the run, the keys of each step, the cursors)."""
    ranks = [
        list(islice(PackLoader(data, BUDGET, PACKS, rank=r, world=world, workers=workers, cursor=cursor), n))
        for r in range(world)
    ]
    prints, keys, cursors = [], [], []
    for same in zip(*ranks, strict=True):
        assert len({(step.cursor, step.samples) for step in same}) == 1
        batches = [same[j % world].batches[j // world] for j in range(PACKS)]
        prints += [fingerprint(batch) for batch in batches]
        keys.append([key for batch in batches for key in batch.keys])
        cursors.append(same[0].cursor)
    return prints, keys, cursors


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_order_is_one_over_ranks_and_workers(data):
    expected = steps(data, 1, 0, 2)
    for world, workers in [(2, 0), (3, 0), (4, 0), (1, 1), (2, 4)]:
        assert steps(data, world, workers, 2) == expected, (world, workers)


def test_every_sample_is_read_once_an_epoch_through_the_loader(data):
    loader = PackLoader(data, BUDGET, PACKS)
    keys: dict[str, list[str]] = {name: [] for name in data.samples}
    for step in islice(loader, 8):
        by_position = Counter()
        for batch in step.batches:
            by_position.update(batch.sources)
            for key, source in zip(batch.keys, batch.sources, strict=True):
                keys[source].append(key)
        assert by_position.total() == step.samples
    total = sum(map(len, keys.values()))
    for source, weight in (("video", 0.56), ("image", 0.3), ("text", 0.14)):
        assert abs(len(keys[source]) - weight * total) < 1
    # Within an epoch a step's packs hold samples in another order than their positions, so whole epochs are compared.
    counts = Counter(keys["text"])
    assert set(counts.values()) <= {len(keys["text"]) // 9, len(keys["text"]) // 9 + 1}
    assert len(counts) == 9


def test_a_run_resumes_from_its_cursor_on_other_ranks_and_workers(data):
    whole = steps(data, 1, 0, 4)
    first = steps(data, 2, 0, 2)
    second = steps(data, 3, 1, 2, cursor=first[2][-1])
    assert [a + b for a, b in zip(first, second, strict=True)] == list(whole)


def test_a_loader_that_is_iterated_again_continues(data):
    loader = PackLoader(data, BUDGET, PACKS)
    cursors = [step.cursor for step in islice(loader, 2)] + [step.cursor for step in islice(loader, 2)]
    assert cursors == [step.cursor for step in islice(PackLoader(data, BUDGET, PACKS), 4)]


def test_a_batch_names_its_broken_samples(data):
    ranks = [list(islice(PackLoader(data, BUDGET, PACKS, rank=rank, world=2), 8)) for rank in range(2)]
    issues = [issue for steps in ranks for step in steps for batch in step.batches for issue in batch.bad]
    assert set(issues) == {SampleIssue("undecodable picture", "image", "image-0.tar", "i4")}
    images = round(0.3 * sum(step.samples for step in ranks[0]))
    assert abs(len(issues) - images / 9) <= 1


def test_packs_keep_to_the_budget_and_waste_little(data):
    used = [batch.used for step in islice(PackLoader(data, BUDGET, PACKS), 4) for batch in step.batches]
    costs = [size.frames * BUDGET.frame + size.text for size in used]
    assert all(BUDGET.holds(size) for size in used)
    assert sum(costs) / len(costs) > 0.9 * BUDGET.cost
    assert max(costs) < 1.1 * sum(costs) / len(costs)


def test_an_epoch_of_validation_ends_with_the_same_steps_on_all_ranks(data):
    ranks = [list(PackLoader(data, BUDGET, PACKS, rank=r, world=4, stop=50)) for r in range(4)]
    assert len({len(steps) for steps in ranks}) == 1
    assert [step.cursor for step in ranks[0]][-1] == 50
    assert sum(len(batch.keys) for steps in ranks for step in steps for batch in step.batches) == 50
    assert all(len(step.batches) == PACKS // 4 for steps in ranks for step in steps)


@pytest.mark.parametrize("world", [5, 7, 8, 24])
def test_any_number_of_ranks_takes_the_same_steps_in_as_many_packs_each(data, world):
    """Also where the ranks do not divide the packs of a step: the samples of a step are those of one rank."""
    alone = list(islice(plan_steps(data, BUDGET, PACKS, 0), 5))
    shared = list(islice(plan_steps(data, BUDGET, PACKS, 0, world=world), 5))
    assert [step.cursor for step in shared] == [step.cursor for step in alone]
    for one, other in zip(alone, shared, strict=True):
        assert len(other.packs) % world == 0
        assert len(other.packs) - len(one.packs) < world
        assert sorted(p for pack in other.packs for p in pack) == sorted(p for pack in one.packs for p in pack)
    ranks = [list(islice(PackLoader(data, BUDGET, PACKS, rank=r, world=world), 2)) for r in range(world)]
    for same in zip(*ranks, strict=True):
        assert len({len(step.batches) for step in same}) == 1
        assert sum(len(batch.keys) for step in same for batch in step.batches) == same[0].samples


def test_the_plan_needs_no_decoding(data, monkeypatch):
    monkeypatch.setattr(data, "read", None)
    planned = list(islice(plan_steps(data, BUDGET, PACKS, 0), 3))
    positions = sorted(p for step in planned for pack in step.packs for p in pack)
    assert positions == list(range(planned[-1].cursor))


def test_a_sample_larger_than_a_pack_is_named(data):
    with pytest.raises(UserError, match=r"sample video5 in video-01.tar has 9 frames, .* raise data\.pack_cost=80"):
        data.check_fits(PackBudget(80, 8))
    data.check_fits(BUDGET)
    with pytest.raises(UserError, match=r"a sample of 9 frames .* more than a pack \(data.pack_cost=80"):
        next(plan_steps(data, PackBudget(80, 8), PACKS, 0))


def test_workers_leave_signals_to_their_parent(data):
    """A scheduler signals every process of a job; the run must still get its batches to save at a step's end."""
    loader = iter(PackLoader(data, BUDGET, PACKS, workers=1))
    next(loader)
    server = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    workers = [process.pid for process in multiprocessing.active_children()]
    assert workers
    for pid in (server, *workers):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(pid, number)
    assert len(list(islice(loader, 12))) == 12


def test_too_little_shared_memory_is_said_before_workers_die_of_it(data, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"workers of a rank need .* lower data\.workers"):
        PackLoader(data, BUDGET, PACKS, workers=1)


@pytest.mark.parametrize(("pin", "world", "buffers"), [(False, 1, 3 * 10), (False, 3, 3 * 5), (True, 1, 3 * 2)])
def test_shared_memory_is_enough_for_what_workers_and_the_main_process_hold(data, monkeypatch, pin, world, buffers):
    """Three workers with two packs each, and two steps of twelve packs over all ranks that a CPU reads in place."""
    needed = buffers * (64 + 30 * 3 * 16 * 16 * 5 // 4)
    for free in (needed - 1, needed):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(UserError) if free < needed else nullcontext():
            PackLoader(data, BUDGET, PACKS, workers=3, world=world, pin=pin)


@pytest.mark.parametrize("end", ["raise RuntimeError('it fails')", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_workers_end_with_a_run_that_fails_or_is_killed(tmp_path, end):
    """They ignore SIGTERM, with which multiprocessing would end them, and have the fork server for a parent."""
    script = f"""
        import multiprocessing, os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from fovlm.data.packing import PackBudget
        from fovlm.data.dataloader import PackLoader
        from helpers import tiny
        data = tiny.dataset(Path({str(tmp_path)!r}))
        steps = iter(PackLoader(data, PackBudget(240, 8), 2, workers=1))
        next(steps)
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        {end}
    """
    environment = os.environ | {"FOVLM_DATA": str(tmp_path), "FOVLM_CACHE": str(tmp_path)}
    with open(tmp_path / "out", "w") as out:  # not a pipe: its end would wait for workers that live on
        command = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(command, env=environment, timeout=120, stdout=out)
    assert done.returncode in (1, -signal.SIGKILL)
    (worker,) = map(int, (tmp_path / "out").read_text().split())
    for _ in range(100):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")
