"""One shard, made by one worker: rows -> samples -> a tar, with the rows that were rejected."""

import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fovlm.data import chat
from fovlm.data.shards import write_shard
from fovlm.data.tables import Row, read_block
from fovlm.errors import SampleError
from fovlm.fileio import digest, digest_file
from fovlm.prepare.job import Job, NewSample
from fovlm.prepare.manifest import Rejected, ShardEntry
from fovlm.prepare.shard_plan import ShardTask
from fovlm.prepare.sources import source_of


def make_shard(job: Job, task: ShardTask) -> tuple[ShardEntry, Rejected]:
    """Write one shard and list its rejected rows. The same task gives the same bytes."""
    path, source = shard_path(job, task.number), source_of(job)
    rejected: Rejected = []
    counts: Counter[str] = Counter()

    def reject(error: SampleError, file: str, row: int) -> None:
        about = {"about": error.about} if error.about else {}
        rejected.append({"shard": path.name, "file": file, "row": row, "cause": str(error), **about})

    def samples() -> Iterator[dict[str, Any]]:
        for file, number, row in _rows(job, task):
            lines = [line for line, _ in row["rows"]] if source.same and isinstance(row, dict) else [number]
            counts["rows"] += len(lines)
            try:
                if isinstance(row, str):
                    raise SampleError(row)
                sample = source.make(row, job)
            except SampleError as error:
                for line in lines:
                    reject(error, file, line)
                continue
            for line, cause in sample.rejected:
                reject(cause, file, line)
            if sample.record:
                try:
                    yield _content(f"{_key_prefix(file)}-{number:08d}", sample)
                    counts.update(samples=1, frames=len(sample.pictures))
                except SampleError as error:
                    reject(error, file, number)

    write_shard(path, samples())
    causes = dict(sorted(Counter(row["cause"] for row in rejected).items()))
    if not counts["samples"]:
        path.unlink()
        return ShardEntry(path.name, counts["rows"], 0, 0, 0, "", causes), rejected
    size, checksum = path.stat().st_size, digest_file(path)
    return ShardEntry(path.name, counts["rows"], counts["samples"], counts["frames"], size, checksum, causes), rejected


def shard_path(job: Job, number: int) -> Path:
    return job.out / f"{job.name}-{number:05d}.tar"


def _rows(job: Job, task: ShardTask) -> Iterator[tuple[str, int, Row | str]]:
    """(table, row number, row or why it is unreadable) of each row of a shard."""
    source = source_of(job)
    for block, chosen in task.parts:
        if source.rows is not None:
            found = all_rows(job)[block.first : block.first + block.rows]
        else:
            found = read_block(block, source.columns)
        file = str(block.file.relative_to(job.folder)) if block.file.is_file() else job.source
        for n in chosen.tolist():
            yield file, block.first + n, found[n] if n < len(found) else "the table has changed"


def _content(key: str, sample: NewSample) -> dict[str, Any]:
    """A sample as `write_shard` takes it. Raises SampleError."""
    record, question = sample.record, "?" if sample.pictures else ""
    for one in chat.conversations(record):
        for answer in ("chosen", "rejected") if "chosen" in one else ("",):
            chat.turns_of(one | {"assistant": one[answer]} if answer else one, question)
    if sample.still:
        return {"__key__": key, "json": record, "jpg": sample.pictures[0]}
    return {"__key__": key, "json": record} | {f"{n:03d}.jpg": frame for n, frame in enumerate(sample.pictures)}


@functools.lru_cache(maxsize=1)
def all_rows(job: Job) -> list[Row | str]:
    """The rows of a source without tables, read once per process."""
    rows = source_of(job).rows
    assert rows is not None
    return list(rows(job))


def _key_prefix(file: str) -> str:
    """A table's path for keys: without dots, which would end a key, and different for every table."""
    stem = file.rpartition(".")[0] or file
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in stem)
    return plain if plain == stem else f"{plain}-{digest(file, 2)}"
