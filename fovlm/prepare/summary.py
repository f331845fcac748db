"""The output of `fovlm prepare` and `fovlm check`, as lines of text."""

from collections import Counter
from pathlib import Path

from fovlm.paths import data_root
from fovlm.prepare.check import ShardScan, problems
from fovlm.prepare.job import RawSource
from fovlm.prepare.manifest import MANIFEST, REJECTED, Manifest, describe_rejected, read_rejected
from fovlm.tables import text_table

PROMPTS = {"video": "Describe the video.", "image": "Describe the picture."}  # for samples without a question
DECLARE = "below data.sources of an experiment:"


def summarize_job(out: Path, manifest: Manifest, source: RawSource) -> list[str]:
    """Totals, rejected rows by cause, and the YAML line that declares the source."""
    lines = _totals(out, manifest)
    if manifest.filled:
        lines += [DECLARE, _declaration(out.name, source.kind, out, manifest.filled, source.prompt)]
    return lines


def summarize_holdout(out: Path, manifest: Manifest) -> list[str]:
    """Totals and strata, the YAML lines that declare the set, and how to remove it from the training shards."""
    by_kind: dict[str, list[str]] = {}
    for name in manifest.filled:
        by_kind.setdefault(name.rsplit("-", 2)[1], []).append(name)
    return [
        *_totals(out, manifest),
        DECLARE,
        *(_declaration(f"{out.name}_{kind}", kind, out, names, PROMPTS.get(kind)) for kind, names in by_kind.items()),
        "the original shards still hold these samples; remove them before training: "
        f"fovlm check 'SHARDS' --against '{out}/*.tar' --repair FOLDER",
    ]


def _totals(out: Path, manifest: Manifest) -> list[str]:
    rejected = sum(manifest.rejected.values())
    counts = (len(manifest.filled), manifest.total("samples"), manifest.total("frames"))
    row = [*map(str, counts), f"{manifest.total('bytes') / 1e6:.1f}", str(rejected), manifest.hash[:12]]
    return [
        text_table([["shards", "samples", "frames", "MB", "rejected", "hash"], row], left=()),
        *(f"  rejected {line}" for line in describe_rejected(read_rejected(out, manifest), manifest.total("rows"))),
        *(f"  {count} of {stratum}" for stratum, count in manifest.strata.items()),
        f"contents: {out / MANIFEST}" + (f"; rejected rows: {out / REJECTED}" if rejected else ""),
    ]


def _declaration(name: str, kind: str, out: Path, shards: list[str], prompt: str | None) -> str:
    question = f", prompt: {prompt}" if prompt else ""
    where, data = out.resolve(), data_root().resolve()
    where = where.relative_to(data) if where.is_relative_to(data) else where
    return f'  {name.replace("-", "_")}: {{kind: {kind}, shards: "{where / pattern_of(shards)}"{question}}}'


def pattern_of(names: list[str]) -> str:
    """The pattern of shards NAME-00000.tar ...: a range when no number is missing."""
    if len(names) == 1:
        return names[0]
    stem = names[0].rpartition("-")[0]
    first, last = (name.rpartition("-")[2].removesuffix(".tar") for name in (names[0], names[-1]))
    return f"{stem}-{{{first}..{last}}}.tar" if int(last) - int(first) == len(names) - 1 else f"{stem}-*.tar"


def summarize_check(scans: list[ShardScan]) -> list[str]:
    """Samples by source and kind, and the problems by cause, each with an example."""
    samples: Counter[tuple[str, str]] = Counter()
    bad: Counter[tuple[str, str]] = Counter()
    frames: Counter[tuple[str, str]] = Counter()
    causes: Counter[str] = Counter()
    example: dict[str, str] = {}
    for scan in scans:
        found = [(scan.cause, str(scan.path))] if scan.cause else []
        for entry in scan.entries:
            group = (entry.source or "?", entry.kind)
            samples[group] += 1
            frames[group] += entry.frames
            if entry.cause:
                bad[group] += 1
                found.append((entry.cause, f"{scan.path}, sample {entry.key}"))
        for cause, where in found:
            causes[cause] += 1
            example.setdefault(cause, where)
    rows = [[*group, str(samples[group]), str(frames[group]), str(bad[group])] for group in sorted(samples)]
    lines = [text_table([["source", "kind", "samples", "frames", "bad"], *rows], left=(0, 1))]
    if causes:
        rows = [[cause, str(count), example[cause]] for cause, count in causes.most_common()]
        lines += ["", text_table([["problem", "count", "example"], *rows], left=(0, 2))]
    result = f"{problems(scans)} problems" if causes else "no problems"
    return [*lines, f"{len(scans)} shards, {samples.total()} samples: {result}"]
