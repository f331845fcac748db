"""`fovlm prepare`: plan the shards, have workers make those that are missing, keep the books."""

import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fovlm.data.chat import load_tokenizer, template
from fovlm.data.tables import LINES, Block, blocks_of, find_tables, refuse_twice, sidecar_blocks
from fovlm.data.workers import each
from fovlm.errors import UserError
from fovlm.fileio import UNFINISHED, digest_file, remove_unfinished, write_atomically
from fovlm.prepare import manifest as books
from fovlm.prepare.frames import NO_VIDEO, video_folders
from fovlm.prepare.job import Job, RawSource
from fovlm.prepare.manifest import Manifest, Shard
from fovlm.prepare.registry import source_of
from fovlm.prepare.shard_plan import Task, plan
from fovlm.prepare.write_shard import Rejected, all_rows, excluded, make_shard, shard_path

WITHOUT_EFFECT = (
    "raw",
    "out",
    "videos",
    "exclude",
    "tokenizer",
    "skip_missing",
)  # where things lie doesn't change what is made


def prepare(job: Job, workers: int, console: Console) -> Manifest:
    """Make the shards of a job that are not there yet. Raises UserError.

    A killed run leaves whole shards and a manifest that names them; the same call goes on from there.
    """
    source = source_of(job.source)
    job = replace(job, prompt=job.prompt or source.prompt)
    _check(job, source)
    blocks = _blocks(job, source)
    with books.alone(job.out):
        return _make(job, blocks, workers, console)


def _make(job: Job, blocks: list[Block], workers: int, console: Console) -> Manifest:
    manifest = books.open_or_new(job.out, _settings(job), _inputs(job, blocks))
    # A download that went on meanwhile: shards that had none of their videos are made again.
    manifest.shards = {name: shard for name, shard in manifest.shards.items() if not _without_videos(shard)}
    tasks = plan(blocks, job.per_shard, job.seed)
    missing = [task for task in tasks if shard_path(job, task.number).name not in manifest.shards]
    if len(missing) < len(tasks):
        console.print(f"{len(tasks) - len(missing)} of {len(tasks)} shards are there already and are kept")
    manifest.complete = not missing
    remove_unfinished(job.out / "*")
    rejected_file = job.out / books.REJECTED
    kept = _kept(rejected_file, manifest)
    _write(rejected_file, kept)
    with rejected_file.open("a", encoding="utf-8") as log, _Bar(console, missing, job.out) as bar:
        for shard, rejected in each(make_shard, [(job, task) for task in missing], workers):
            if _without_videos(shard):
                console.print(f"{shard.name}: none of its {shard.rows} videos is there")
            log.write(_lines(rejected))  # ahead of the manifest: lines of a shard that it doesn't name are dropped
            log.flush()
            kept += rejected
            manifest.shards[shard.name] = shard
            manifest.save(job.out)
            bar.show(shard, manifest)
    if not manifest.total("samples"):
        rows, other = manifest.total("rows"), f"they are of other stages than {job.stage}" if job.stage else "nothing"
        cause = next(iter(manifest.rejected), other if rows else "there are no rows")
        told = f"no sample could be made of the {rows} rows in {job.raw}; mostly: {cause}"
        if cause == NO_VIDEO:
            where = ", ".join(str(folder) for folder in video_folders(job))
            told = f"none of the {manifest.rejected[cause]} videos is there (looked in {where}): give --videos DIR"
        manifest.shards.clear()  # once that is mended, all are made again
        manifest.save(job.out)
        raise UserError(told)
    _write(rejected_file, kept)
    manifest.complete = True
    manifest.save(job.out)
    return manifest


def _without_videos(shard: Shard) -> bool:
    return not shard.samples and set(shard.rejected) == {NO_VIDEO}


def _check(job: Job, source: RawSource) -> None:
    """What would otherwise fail in every worker, or spoil what is there. Raises UserError."""
    if job.out.resolve() == job.folder.resolve():
        raise UserError(f"{job.out} holds the raw data: take another folder for OUT")
    if job.tokenize:
        if source.kind == "preference":
            raise UserError("--tokenize: a preference pair has two answers, which token_ids cannot hold; leave it out")
        if not job.tokenizer:
            raise UserError("--tokenize needs --tokenizer: a folder or Hugging Face id of the language model")
        template(load_tokenizer(job.tokenizer))
    if job.stage and source.name != "smoltalk":
        raise UserError(f"--stage divides the conversations of smoltalk; {source.name} has none")
    if job.videos is not None and not job.videos.is_dir():
        raise UserError(f"--videos: no folder {job.videos}")
    if job.exclude is not None:
        excluded(job.exclude)


def _blocks(job: Job, source: RawSource) -> list[Block]:
    if source.rows is not None:
        rows = len(all_rows(job.source, job.raw, job.skip_missing))
        return [Block(job.raw, "rows", n, min(LINES, rows - n)) for n in range(0, rows, LINES)]
    if source.sidecars and (blocks := sidecar_blocks(job.raw, source.formats)):
        return blocks
    tables = find_tables(job.raw, source.formats)
    if source.whole:
        refuse_twice(tables, job.folder, source.whole)
    return [block for table in tables for block in blocks_of(table, source.needs)]


def _settings(job: Job) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(job).items() if name not in WITHOUT_EFFECT}
    if job.tokenize:
        settings["tokens"] = load_tokenizer(job.tokenizer).name_or_path.rstrip("/").rpartition("/")[2]
    return settings | {"exclude": digest_file(job.exclude) if job.exclude else ""}


def _inputs(job: Job, blocks: list[Block]) -> list[dict[str, Any]]:
    """The tables with their sizes: enough to notice that they are others than before."""
    files: dict[Path, int] = {}
    for block in blocks:
        files[block.file] = files.get(block.file, 0) + block.rows
    sizes = {file: file.stat().st_size if file.is_file() else 0 for file in files}
    return [
        {"file": str(f.relative_to(job.folder)), "bytes": sizes[f], "rows": rows} for f, rows in sorted(files.items())
    ]


def _kept(file: Path, manifest: Manifest) -> Rejected:
    """What is known of rows left out of the shards that are complete."""
    if not file.is_file():
        return []
    kept = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.endswith("\n"):
                break  # the last line of a killed run
            one = json.loads(line)
            if one["shard"] in manifest.shards:
                kept.append(one)
    return kept


def _write(file: Path, rejected: Rejected) -> None:
    rejected.sort(key=lambda one: (one["shard"], one["file"], one["row"], one.get("turn", 0)))
    write_atomically(file, _lines(rejected))


def _lines(rejected: Rejected) -> str:
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rejected)


class _Growing(ProgressColumn):
    """How large the unfinished shards are by now: a shard of videos takes minutes, and should not look like a halt."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def render(self, task: Any) -> Text:
        size = 0
        for file in self.folder.glob(f".*.tar.*{UNFINISHED}"):
            with suppress(FileNotFoundError):  # finished meanwhile
                size += file.stat().st_size
        return Text(f"+ {size / 1e6:.1f} MB" if size else "")


class _Bar:
    """A bar where somebody looks, a line for each shard where nobody does."""

    def __init__(self, console: Console, tasks: list[Task], out: Path):
        self.console = console
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("rows {task.fields[shown]}"), _Growing(out))
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(TextColumn("preparing"), *columns, *times, console=console, refresh_per_second=2)
        self.task = self.progress.add_task("", total=sum(task.rows for task in tasks), shown="")
        self.left, self.live = len(tasks), console.is_terminal and bool(tasks)

    def __enter__(self) -> "_Bar":
        if self.live:
            self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.progress.stop()

    def show(self, shard: Shard, manifest: Manifest) -> None:
        """A shard is done."""
        rejected = sum(manifest.rejected.values())
        self.left -= 1
        self.progress.update(
            self.task, advance=shard.rows, shown=f"{manifest.total('samples')} samples, {rejected} rejected"
        )
        if not self.live:
            left_out = f", {sum(shard.rejected.values())} rejected" if shard.rejected else ""
            self.console.print(f"{shard.name}: {shard.samples} samples{left_out}; {self.left} shards to go")
