"""One shard, made by one worker: rows -> samples -> a tar, and the report of what was left out."""

import functools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fovlm.data import chat
from fovlm.data.shards import write_shard
from fovlm.data.tables import Row, read_block
from fovlm.errors import SampleError, UserError
from fovlm.fileio import digest, digest_file
from fovlm.prepare.job import Job, Made, fingerprints
from fovlm.prepare.manifest import Shard
from fovlm.prepare.registry import source_of
from fovlm.prepare.shard_plan import Task

Rejected = list[dict[str, Any]]
TOKENIZE = {"stage1": chat.tokenize_stage1, "sft": chat.tokenize_sft}


def make_shard(job: Job, task: Task) -> tuple[Shard, Rejected]:
    """Write one shard; what it holds, and what was left out as {shard, file, row, cause}. Same task, same bytes."""
    path = shard_path(job, task.number)
    rejected: Rejected = []
    counts: Counter[str] = Counter()

    def samples() -> Iterator[dict[str, Any]]:
        for file, number, row in _rows(job, task):
            try:
                if isinstance(row, str):
                    raise SampleError(row)
                made = list(source_of(job.source).make(row, job))
            except SampleError as error:
                rejected.append({"shard": path.name, "file": file, "row": number, "cause": str(error)})
                continue
            for turn, one in enumerate(made):
                key = f"{_safe(file)}-{number:08d}" + (f"-{turn}" if len(made) > 1 else "")
                try:
                    yield _finished(key, one, job)
                    counts.update(samples=1, frames=len(one.pictures))
                except SampleError as error:
                    where = {"file": file, "row": number} | ({"turn": turn} if len(made) > 1 else {})
                    rejected.append({"shard": path.name, **where, "cause": str(error)})

    write_shard(path, samples())
    causes = dict(sorted(Counter(one["cause"] for one in rejected).items()))
    if not counts["samples"]:
        path.unlink()  # a shard without samples is no use to anybody
        return Shard(path.name, task.rows, 0, 0, 0, "", causes), rejected
    checksum = digest_file(path)
    return Shard(
        path.name, task.rows, counts["samples"], counts["frames"], path.stat().st_size, checksum, causes
    ), rejected


def shard_path(job: Job, number: int) -> Path:
    return job.out / f"{job.name}-{number:05d}.tar"


def _rows(job: Job, task: Task) -> Iterator[tuple[str, int, Row | str]]:
    """(table, number in it, row or what is wrong with it) of each row, in the shard's order."""
    source = source_of(job.source)
    rows: list[tuple[str, int, Row | str]] = []
    for block, taken in task.parts:
        if source.rows is not None:
            found = all_rows(job.source, job.raw, job.skip_missing)[block.first : block.first + block.rows]
        else:
            found = read_block(block, source.reads)
        file = str(block.file.relative_to(job.folder)) if block.file.is_file() else job.source
        rows += [(file, block.first + int(n), found[n] if n < len(found) else "the table has changed") for n in taken]
    for at in task.order:
        yield rows[at]


def _finished(key: str, made: Made, job: Job) -> dict[str, Any]:
    """A sample ready to be written. Raises BadSample."""
    record = dict(made.record)
    answers = [name for name in ("assistant", "chosen", "rejected") if name in record]
    if not all(record[name].strip() for name in answers):
        raise SampleError("empty answer")
    if any("\ud800" <= letter <= "\udfff" for name in ("user", *answers) for letter in record[name]):
        raise SampleError("text is not Unicode")
    if not made.pictures and not record["user"].strip():
        raise SampleError("no question")
    if job.exclude is not None:
        whole, looks = fingerprints(record, made.pictures)
        if whole in (taken := excluded(job.exclude)) or looks in taken:
            raise SampleError("in the evaluation set")
    if job.tokenize:
        record |= TOKENIZE[job.tokenize](record, _tokenizer(job.tokenizer), job.prompt)
    if made.still:
        return {"__key__": key, "json": record, "jpg": made.pictures[0]}
    return {"__key__": key, "json": record} | {f"{n:03d}.jpg": frame for n, frame in enumerate(made.pictures)}


@functools.lru_cache(maxsize=1)
def all_rows(source: str, raw: Path, skip_missing: bool) -> list[Row | str]:
    """The rows of a source without tables, read once by each process."""
    rows = source_of(source).rows
    assert rows is not None
    return list(rows(raw, skip_missing))


@functools.lru_cache(maxsize=1)
def excluded(file: Path) -> frozenset[str]:
    """The hashes in a taken.jsonl: of whole samples, and of their pictures. Raises UserError."""
    try:
        with open(file, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return frozenset(h for row in rows for h in (row["sample"], row["pictures"]) if h)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--exclude {file} is not the taken.jsonl of an evaluation set ({error})") from error


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    return chat.load_tokenizer(name)


def _safe(file: str) -> str:
    """A table's path as the start of keys: without dots, which would end a key, and never the same for two tables."""
    stem = file.rpartition(".")[0] or file
    plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in stem)
    return plain if plain == stem else f"{plain}-{digest(file, 2)}"
