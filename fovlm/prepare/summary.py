"""What `fovlm prepare` and `fovlm check` print when they are done."""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from fovlm.prepare import manifest as books
from fovlm.prepare.check import Audit
from fovlm.prepare.job import RawSource
from fovlm.prepare.manifest import Manifest

PROMPTS = {"video": "Describe the video.", "image": "Describe the picture."}  # of samples without a question


def print_manifest(console: Console, out: Path, manifest: Manifest, source: RawSource | None = None) -> None:
    """Totals, what was rejected, and the line that declares the source."""
    shards = sorted(name for name, shard in manifest.shards.items() if shard.samples)
    table = Table("shards", "samples", "frames", "MB", "rejected", "hash")
    megabytes, rejected = f"{manifest.total('bytes') / 1e6:.1f}", sum(manifest.rejected.values())
    totals = (len(shards), manifest.total("samples"), manifest.total("frames"), megabytes, rejected, manifest.hash[:12])
    table.add_row(*map(str, totals))
    console.print(table)
    for cause, count in manifest.rejected.items():
        console.print(f"  rejected {count}: {cause}", markup=False)
    for stratum, count in manifest.strata.items():
        console.print(f"  {count} of {stratum}", markup=False)
    console.print(
        f"{out / books.FILE} says what is in the shards" + (f", {out / books.REJECTED} what is not" if rejected else "")
    )
    if source is not None and shards:
        prompt = f", prompt: {source.prompt}" if source.prompt else ""
        told = source.name.replace("-", "_")
        console.print("as a line under data.sources of an experiment (the path is below FOVLM_DATA):")
        line = f'  {told}: {{kind: {source.kind}, shards: "{out.name}/{pattern_of(shards)}"{prompt}}}'
        console.print(line, markup=False)


def print_holdout(console: Console, out: Path, manifest: Manifest) -> None:
    """What `fovlm prepare val` has drawn, the lines that declare it, and that training must be kept apart from it."""
    print_manifest(console, out, manifest)
    by_kind: dict[str, list[str]] = {}
    for name in sorted(manifest.shards):
        by_kind.setdefault(name.rpartition("-")[0].rpartition("-")[2], []).append(name)
    console.print("as lines under data.sources of an experiment (the path is below FOVLM_DATA):")
    for kind, shards in by_kind.items():
        prompt = f", prompt: {PROMPTS[kind]}" if kind in PROMPTS else ""
        line = f'  {out.name}_{kind}: {{kind: {kind}, shards: "{out.name}/{pattern_of(shards)}"{prompt}}}'
        console.print(line, markup=False)
    console.print(
        f"the shards it was drawn from still hold these samples: before training on them, "
        f"fovlm check 'SHARDS' --against '{out}/*.tar' --repair FOLDER",
        markup=False,
    )


def pattern_of(names: list[str]) -> str:
    """The pattern of shards NAME-00000.tar ...: numbered when there are no gaps."""
    stem = names[0].rpartition("-")[0]
    first, last = (name.rpartition("-")[2].removesuffix(".tar") for name in (names[0], names[-1]))
    if len(names) == 1:
        return names[0]
    return f"{stem}-{{{first}..{last}}}.tar" if int(last) - int(first) == len(names) - 1 else f"{stem}-*.tar"


def print_check(console: Console, found: Audit) -> None:
    """What there is by source, and what is wrong with it, each cause with an example."""
    good: Counter[tuple[str, str]] = Counter()
    bad: Counter[tuple[str, str]] = Counter()
    frames: Counter[tuple[str, str]] = Counter()
    causes: Counter[str] = Counter()
    example: dict[str, str] = {}
    for scan in found.scans:
        if scan.cause:
            causes[scan.cause] += 1
            example.setdefault(scan.cause, str(scan.path))
        for entry in scan.entries:
            what = (entry.source or "?", entry.kind)
            frames[what] += entry.frames
            (bad if entry.cause else good)[what] += 1
            if entry.cause:
                causes[entry.cause] += 1
                example.setdefault(entry.cause, f"{scan.path}, sample {entry.key}")
    table = Table("source", "kind", "samples", "frames", "bad")
    for what in sorted(good.keys() | bad.keys()):
        table.add_row(*what, str(good[what] + bad[what]), str(frames[what]), str(bad[what]))
    console.print(table)
    if causes:
        table = Table("problem", "count", Column("for example", overflow="fold"))
        for cause, count in causes.most_common():
            table.add_row(cause, str(count), example[cause])
        console.print(table)
    total = good.total() + bad.total()
    console.print(
        f"{len(found.scans)} shards, {total} samples: " + (f"{found.problems} problems" if causes else "nothing wrong")
    )
