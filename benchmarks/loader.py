"""What the data loader costs: frames per CPU-second, and the memory of a table of many samples.

    python -m benchmarks.loader                        packs of clips of 8 frames, 224 pixels, from shards to batches
    python -m benchmarks.loader --samples 10000000     a made-up table of so many samples, mapped by 8 processes
    PYTHONPATH=/tmp/base python benchmarks/loader.py   the first, of another version's worktree

Process time of this process (one thread), and of one worker, which hands its batches over in shared memory. Pictures
are smooth noise, JPEG at quality 90 and of 16 kB, as photographs are at this size.
"""

import argparse
import multiprocessing
import os
import pickle
import re
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fovlm.config.schema import DataSource
from fovlm.data import dataset as dataset_module
from fovlm.data.chat import ChatTokenizer
from fovlm.data.dataloader import PackLoader, plan_steps
from fovlm.data.dataset import Dataset
from fovlm.data.packing import PackBudget
from fovlm.data.shards import write_shards
from fovlm.data.tokenizers import word_tokenizer
from fovlm.media.encode import encode_jpeg

CLIPS, FRAMES, SIZE, PER_SHARD = 400, 8, 224, 1000
BUDGET = PackBudget(2400, 32)
RECORD = {"user": "what is this ?", "assistant": "it is red " * 20}
SOURCES = {"clips": DataSource(shards="clips-*.tar", kind="video")}


def picture(random: np.random.Generator) -> bytes:
    """A JPEG of smooth noise, mostly in brightness."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE))) + 1 / SIZE
    noise = np.fft.ifft2(np.fft.fft2(random.standard_normal((3, SIZE, SIZE))) / frequency**1.8).real
    noise /= noise.std((1, 2), keepdims=True)
    return encode_jpeg((128 + 45 * (noise[0] + 0.1 * noise)).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def open_clips() -> Dataset:
    """The data set of the shards in FOVLM_DATA."""
    chat = ChatTokenizer(word_tokenizer(" ".join(RECORD.values()).split()), "before_frames", "answer", 200)
    return Dataset(SOURCES, {"clips": 1.0}, chat, frame_size=SIZE)


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of processes so far (proc(5), fields 14 and 15)."""
    stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")


def write_clips(folder: Path, clips: int, frames: int) -> None:
    """Shards of so many clips."""
    random = np.random.default_rng(0)
    pictures = [picture(random) for _ in range(64)]
    media = [{f"{n:03d}.jpg": pictures[(7 * i + n) % 64] for n in range(frames)} for i in range(clips)]
    write_shards(
        folder / "clips-%02d.tar", [{"__key__": f"c{i}", "json": RECORD, **m} for i, m in enumerate(media)], 100
    )


def frames_a_second(rounds: int) -> None:
    """Print frames per CPU-second of both ways, in turns."""
    write_clips(Path(os.environ["FOVLM_DATA"]), CLIPS, FRAMES)
    data = open_clips()
    here, worker = iter(PackLoader(data, BUDGET, 8)), iter(PackLoader(data, BUDGET, 8, workers=1))
    for steps in (here, worker):
        next(steps)
    ways = {"here": (here, os.getpid()), "worker": (worker, multiprocessing.active_children()[0].pid)}
    for _ in range(rounds):
        for name, (steps, pid) in ways.items():
            began, clock = cpu_seconds([pid]), time.process_time()
            frames = sum(batch.used.frames for step in islice(steps, 12) for batch in step.batches)
            spent = time.process_time() - clock if name == "here" else cpu_seconds([pid]) - began
            print(f"{name:8}{frames / spent:8.0f} frames per CPU-second")


def make_table(samples: int, folder: Path) -> Dataset:
    """A data set whose table has so many samples, without shards."""
    from fovlm.data.sample_table import ROW, SampleTable

    random, shards = np.random.default_rng(0), samples // PER_SHARD
    with open(folder / "many.rows", "wb") as file:
        for _ in range(shards):
            rows = np.zeros(PER_SHARD, ROW)
            rows["frames"], rows["media"] = random.integers(1, 17, PER_SHARD), 2
            rows["texts"], rows["text"] = 1, random.integers(40, 300, PER_SHARD)
            file.write(rows.tobytes())
    hashes = [f"{n:032x}" for n in range(shards)]
    facts: dict[str, Any] = {"checksums": hashes, "token_files": [f"{name}.tokens" for name in hashes]}
    facts |= {"counts": [PER_SHARD] * shards, "several": [False] * shards, "broken": {}, "warnings": []}
    paths = [folder / f"clips-{n:05d}.tar" for n in range(shards)]
    dataset_module.find_shards = lambda *_: paths
    dataset_module.open_table = lambda *_: SampleTable(folder / "many.rows", paths, facts)
    return open_clips()


def memory() -> dict[str, int]:
    """Of this process, in MB: Pss shares what several map by their number, Private is its alone (proc(5))."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.findall(r"(Rss|Pss|Private_\w+): +(\d+)", text)
    sizes = {
        name: sum(int(kb) for key, kb in found if key.startswith(name)) >> 10 for name in ("Rss", "Pss", "Private")
    }
    return sizes


def use_table(data: bytes, begin: Any, end: Any, out: Any) -> None:
    """A rank: open the table, look at every row, plan steps; then say what memory that took."""
    before = memory()
    begin.wait()
    dataset = pickle.loads(data)
    dataset.check_fits(BUDGET)
    steps = plan_steps(dataset, BUDGET, 8, cursor=0)
    for _ in range(50):
        next(steps)
    end.wait()
    after = memory()
    out.put({name: after[name] - before[name] for name in after})
    end.wait()


def table_memory(samples: int, processes: int = 8) -> None:
    """Print what a table takes in each of several processes, and in all of them together."""
    folder = Path(os.environ["FOVLM_DATA"])
    data = pickle.dumps(make_table(samples, folder))
    context = multiprocessing.get_context("spawn")
    begin, end, out = context.Barrier(processes), context.Barrier(processes), context.Queue()
    ranks = [context.Process(target=use_table, args=(data, begin, end, out)) for _ in range(processes)]
    for rank in ranks:
        rank.start()
    found = [out.get() for _ in ranks]
    for rank in ranks:
        rank.join()
    size = (folder / "many.rows").stat().st_size
    print(f"{samples:,} samples: a file of {size >> 20} MB, {size / samples:.0f} bytes a sample")
    for name in found[0]:
        each = [one[name] for one in found]
        print(f"{name:8} MB more in each of {processes} processes: {each}, together {sum(each)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"FOVLM_DATA": scratch, "FOVLM_CACHE": f"{scratch}/cache"}
        table_memory(options.samples) if options.samples else frames_a_second(options.rounds)
