"""`fovlm prepare`: plan the shards, let workers make the missing ones, and keep the manifest."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fovlm.data.tables import LINES, Block, blocks_of, find_tables, refuse_twice
from fovlm.data.workers import each
from fovlm.errors import UserError, did_you_mean_path
from fovlm.fileio import remove_unfinished, write_atomically
from fovlm.prepare.frames import NO_VIDEO, media_folders
from fovlm.prepare.job import Job, RawSource
from fovlm.prepare.manifest import (
    REJECTED,
    Manifest,
    Rejected,
    ShardEntry,
    describe_rejected,
    exclusive,
    read_rejected,
    resume_or_new,
)
from fovlm.prepare.shard_plan import plan_shards
from fovlm.prepare.sources import source_of
from fovlm.prepare.write_shard import all_rows, make_shard, shard_path
from fovlm.progress import track

# Settings without an effect on the content of the shards.
WITHOUT_EFFECT = {"raw", "out", "media", "skip_missing", "max_bad"}


def prepare(job: Job, workers: int, log: Callable[[str], None] = print) -> Manifest:
    """Make the shards of a job that are missing. Raises UserError.

    A killed run leaves complete shards and a manifest that lists them; the same call resumes.
    """
    source = source_of(job)
    _check(job, source)
    blocks = _blocks(job, source)
    with exclusive(job.out):
        manifest = _make(job, blocks, workers, log)
        source.finish(job)
        return manifest


def _make(job: Job, blocks: list[Block], workers: int, log: Callable[[str], None]) -> Manifest:
    manifest = resume_or_new(job.out, _settings(job), _inputs(job, blocks))
    remove_unfinished(job.out / "*")
    # Shards without any of their videos are made again (the download may have continued), and of a job that was not
    # completed those with too many rejected rows (--media may have been wrong).
    for name, shard in [*manifest.shards.items()]:
        too_many = not manifest.complete and sum(shard.rejected.values()) > job.max_bad * shard.rows
        if too_many or _without_videos(shard):
            del manifest.shards[name]
    tasks = plan_shards(blocks, job.per_shard, job.seed)
    missing = [task for task in tasks if shard_path(job, task.number).name not in manifest.shards]
    if len(missing) < len(tasks):
        log(f"{len(tasks) - len(missing)} of {len(tasks)} shards exist already")
    manifest.complete = not missing
    rejected_file = job.out / REJECTED
    rejected = read_rejected(job.out, manifest)
    _write_rejected(rejected_file, rejected)
    _check_rejected(job, manifest, rejected, sum(block.rows for block in blocks))
    with rejected_file.open("a", encoding="utf-8") as file:
        results = each(make_shard, [(job, task) for task in missing], workers)
        for shard, rows in track(results, f"shards of {job.out.name}", len(missing)):
            if _without_videos(shard):
                log(f"{shard.name}: none of its {shard.rows} videos exists")
            file.write(_lines(rows))  # before the manifest: rows of shards that it does not list are dropped
            file.flush()
            rejected += rows
            manifest.shards[shard.name] = shard
            manifest.save(job.out)
            _check_rejected(job, manifest, rejected, sum(block.rows for block in blocks))
    if not manifest.total("samples"):
        message = _why_empty(job, manifest)
        manifest.shards.clear()  # the next run makes them again
        manifest.save(job.out)
        raise UserError(message)
    _write_rejected(rejected_file, rejected)
    manifest.complete = True
    manifest.save(job.out)
    return manifest


def _check_rejected(job: Job, manifest: Manifest, rejected: Rejected, planned: int) -> None:
    """Raise UserError when more rows are rejected than may be, of all or of those that were planned."""
    rows = manifest.total("rows")
    if len(rejected) > job.max_bad * max(rows, planned) and manifest.total("samples"):
        raise UserError(
            f"{len(rejected)} of {rows} rows are rejected, more than --max-bad {job.max_bad:g} of all: "
            f"{'; '.join(describe_rejected(rejected, rows))}; correct them, or --media, and give the command again"
        )


def _without_videos(shard: ShardEntry) -> bool:
    return not shard.samples and set(shard.rejected) == {NO_VIDEO}


def _why_empty(job: Job, manifest: Manifest) -> str:
    rows = manifest.total("rows")
    stages = f"they are of other stages than {job.stage}" if job.stage else "nothing"
    cause = next(iter(manifest.rejected), stages if rows else "there are no rows")
    if cause == NO_VIDEO:
        folders = ", ".join(str(folder) for folder in media_folders(job))
        return f"none of the {manifest.rejected[cause]} videos exists (looked in {folders}): give --media DIR"
    return f"no sample could be made of the {rows} rows in {job.raw}; mostly: {cause}"


def _check(job: Job, source: RawSource) -> None:
    """Refuse jobs that would fail in every worker or damage the raw data. Raises UserError."""
    if job.out.resolve() == job.folder.resolve():
        raise UserError(f"{job.out} holds the raw data: take another folder for OUT")
    if job.stage and source.name not in ("smoltalk", "messages"):
        raise UserError(f"--stage divides the conversations of messages and smoltalk; {source.name} has none")
    if job.media is not None and not job.media.is_dir():
        raise UserError(f"--media: no folder {job.media}{did_you_mean_path(job.media)}")


def _blocks(job: Job, source: RawSource) -> list[Block]:
    if source.rows is not None:
        rows = len(all_rows(job))
        return [Block(job.raw, "rows", n, min(LINES, rows - n)) for n in range(0, rows, LINES)]
    tables = find_tables(job.raw, source.formats)
    if source.complete:
        refuse_twice(tables, job.folder, source.complete)
    return [block for table in tables for block in blocks_of(table, source.required, source.same)]


def _settings(job: Job) -> dict[str, Any]:
    def given(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if name not in WITHOUT_EFFECT and value is not None}

    return json.loads(json.dumps(asdict(job, dict_factory=given)))  # as the manifest has them


def _inputs(job: Job, blocks: list[Block]) -> list[dict[str, Any]]:
    """The tables with their sizes and rows, which tell whether they have changed."""
    files: dict[Path, int] = {}
    for block in blocks:
        files[block.file] = files.get(block.file, 0) + block.rows
    sizes = {file: file.stat().st_size if file.is_file() else 0 for file in files}
    return [
        {"file": str(f.relative_to(job.folder)), "bytes": sizes[f], "rows": rows} for f, rows in sorted(files.items())
    ]


def _write_rejected(file: Path, rejected: Rejected) -> None:
    rejected.sort(key=lambda row: (row["shard"], row["file"], row["row"]))
    write_atomically(file, _lines(rejected))


def _lines(rejected: Rejected) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
