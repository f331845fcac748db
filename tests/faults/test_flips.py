"""Bits that change in any file: found before anything is read, skipped, or without effect."""

import os
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from fovlm.checkpoint import store
from fovlm.checkpoint.locate import find_checkpoint, open_run
from fovlm.checkpoint.reference import ReferenceOutputs
from fovlm.checkpoint.run_folder import read_metrics, read_summary, truncate_metrics
from fovlm.checkpoint.zero_reader import ZeroWeights
from fovlm.config.schema import DataSource, Experiment
from fovlm.data.chat import ChatTokenizer
from fovlm.data.dataloader import PackLoader
from fovlm.data.dataset import Dataset
from fovlm.data.packing import PackBudget
from fovlm.errors import UserError
from helpers import tiny
from helpers.faults import Reference, Row, flipped, survives


def copies(whole: Reference, folder: Path) -> Path:
    shutil.copytree(whole.run("whole"), folder / "run")
    return folder / "run"


def test_flips_in_checkpoints(row: Row, whole: Reference, tmp_path: Path):
    """A bit flipped in any file of a checkpoint, its manifest and pointers included.
    It is found before anything is read, and the checkpoint before it is taken; or the content is the same."""
    run = copies(whole, tmp_path)
    newest = run / "checkpoints" / "step-00000006"
    files = [*sorted(p for p in newest.rglob("*") if p.is_file()), run / "checkpoints" / "latest"]
    before = store.read_manifest(newest)
    for i in row.times(40, 2000):
        file = files[i % len(files)]
        content = file.read_bytes()
        file.write_bytes(flipped(content, row.random))
        found: list[Path] = []
        problem = survives(lambda found=found: found.append(find_checkpoint(run)))
        taken = newest.with_name("step-00000003") if store.verify(newest) else newest
        if not problem and (found != [taken] or (taken == newest and store.read_manifest(newest) != before)):
            problem = f"took {found}"
        row.check(not problem, f"{file.name}: {problem}")
        file.write_bytes(content)


def test_flips_in_run_folders(row: Row, whole: Reference, tmp_path: Path):
    """A bit flipped, or bytes cut off, in what a run says of itself: metrics, summary, settings, state, outputs.
    Readers skip the damage or end with one line."""
    run = copies(whole, tmp_path)
    newest = run / "checkpoints" / "step-00000006"
    readers: dict[Path, Callable[[Path], object]] = {
        run / "metrics.jsonl": lambda file: (read_metrics(file.parent), truncate_metrics(file.parent, 6)),
        run / "run_summary.json": lambda file: read_summary(file.parent),
        run / "experiment.yaml": lambda file: Experiment.parse(file.read_text(encoding="utf-8")),
        newest / "experiment.yaml": lambda file: open_run(newest),
        newest / "state.json": lambda file: store.read_state(newest),
        newest / "model.json": lambda file: open_run(newest).model_config(),
        newest / "reference.safetensors": lambda file: ReferenceOutputs.load(newest),
        newest / "engine" / "mp_rank_00_model_states.pt": lambda file: ZeroWeights(file.parent),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "verify", lambda *_: "")  # the readers themselves, without the checksums before them
        patch.setattr(find_checkpoint, "__defaults__", (None, store.verify))
        for i in row.times(48, 4000):
            file = list(readers)[i % len(readers)]
            content = file.read_bytes()
            file.write_bytes(
                content[: row.random.randrange(len(content))] if i % 5 == 0 else flipped(content, row.random)
            )
            problem = survives(lambda file=file: readers[file](file), UserError, ValueError)
            row.check(not problem, f"{file.name}: {problem}")
            file.write_bytes(content)


def samples(folder: Path) -> list[str]:
    """What a run reads of the shards in a folder: each sample's content, or that it is broken."""
    source = DataSource(shards=str(folder / "video-*.tar"), kind="video")
    chat = ChatTokenizer(tiny.tokenizer(), "before_frames", "answer", 100)
    data = Dataset({"video": source}, {"video": 1.0}, chat, frame_size=16)
    read = []
    for position in range(9):
        parts, issue = data.read(position)
        shown = [(s.key, s.frames.numpy().tobytes(), s.tokens.tolist(), s.weight.tolist()) for s in parts]
        read.append("broken" if issue else repr(shown))
    return read


def test_flips_in_shards_and_caches(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A bit flipped in a shard, or in what is cached about it: index, tokens, table.
    With a flipped cache every sample is the same; in a flipped shard it is the same, or named as broken."""
    monkeypatch.setenv("FOVLM_CACHE", str(tmp_path / "cache"))
    tiny.clips(tmp_path, "video", [3, 1, 4, 1, 5, 2, 6, 3, 2])
    expected = samples(tmp_path)
    shards = sorted(tmp_path.glob("video-*.tar"))
    cached = sorted(p for p in tmp_path.rglob("*") if p.is_file() and p not in shards)
    for i in row.times(20, 600):
        file = row.random.choice(shards if i % 2 else cached)
        content, stat = file.read_bytes(), file.stat()
        file.write_bytes(flipped(content, row.random))
        if i % 4 == 1:  # as a disk does it, without another time
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        read: list[str] = []
        problem = survives(lambda read=read: read.extend(samples(tmp_path)), UserError)
        if not problem and read and i % 2 == 0 and read != expected:
            problem = "other samples"
        if not problem and i % 4 == 1 and any(a not in (b, "broken") for a, b in zip(read, expected)):
            problem = "a sample changed in silence"
        row.check(not problem, f"{file.name}: {problem}")
        file.write_bytes(content)


def test_one_order_over_ranks_and_workers(row: Row, whole: Reference, monkeypatch: pytest.MonkeyPatch):
    """The order of samples on 1 to 4 ranks with 0 to 2 workers each.
    The packs of every step are the same, to the bit."""
    for name, value in whole.env.items():
        monkeypatch.setenv(name, value)
    sources = {
        "video": DataSource(shards="video-*.tar", kind="video"),
        "words": DataSource(shards="words-*.tar", kind="text"),
    }
    chat = ChatTokenizer(tiny.tokenizer(), "before_frames", "answer", 48)
    data = Dataset(sources, {"video": 80.0, "words": 20.0}, chat, frame_size=28, max_frames=4)
    budget, packs, expected = PackBudget(cost=300, frame=16), 12, None
    for i in row.times(0, 12):
        world, workers = 1 + i % 4, i // 4
        ranks = [
            list(islice(PackLoader(data, budget, packs, rank=r, world=world, workers=workers), 2)) for r in range(world)
        ]
        steps = [[same[j % world].batches[j // world] for j in range(packs)] for same in zip(*ranks, strict=True)]
        got = [[(b.keys, b.tokens.tolist(), b.frames.numpy().tobytes()) for b in step] for step in steps]
        expected = expected or got
        row.check(got == expected, f"{world} ranks, {workers} workers")
