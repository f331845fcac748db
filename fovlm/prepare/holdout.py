"""`fovlm prepare val`: draw a fixed evaluation set from prepared shards.

Each stratum (kind and source) is sorted by a hash of seed and content, and its first samples are drawn. So the set
depends on the samples and not on their shards. `fovlm check --against` finds overlap with other shards, and `--repair`
removes it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fovlm.data.sample_format import read_members
from fovlm.data.shards import write_shard
from fovlm.errors import UserError
from fovlm.fileio import digest, digest_file
from fovlm.prepare.check import SampleEntry, ShardScan, list_shards, scan_shards
from fovlm.prepare.manifest import Manifest, ShardEntry, exclusive, load_manifest, resume_or_new

PER_SHARD = 1000
Drawn = tuple[str, ShardScan, SampleEntry]  # hash of seed and content, shard, sample


def draw(
    pattern: str, out: Path, name: str, samples: int, seed: int, workers: int, log: Callable[[str], None] = print
) -> Manifest:
    """Write OUT/NAME-KIND-00000.tar ..., stratified by kind and source. The hash of the manifest identifies the set.

    An existing set is verified and stays as it is. Raises UserError when it was drawn with other settings or has
    changed, and for an unreadable shard.
    """
    paths = [path for path in list_shards([pattern]) if path.parent.resolve() != out.resolve()]
    if not paths:
        raise UserError(f"'{pattern}' names no shards outside {out}")
    scans = scan_shards(paths, workers, False)
    if bad := next((scan for scan in scans if scan.cause), None):
        raise UserError(f"{bad.path}: {bad.cause}; make it again, or leave it out of the pattern")
    settings = {"source": "val", "samples": samples, "seed": seed, "name": name}
    inputs = [{"file": scan.path.name, "checksum": scan.checksum} for scan in scans]
    with exclusive(out):
        before = load_manifest(out)  # resume_or_new leaves out shards that are gone
        manifest = resume_or_new(out, settings, inputs)
        if before is not None and before.complete:
            _verify(before, out)
            log("this set exists already, unchanged")
            return before
        _draw(scans, out, manifest)
    return manifest


def _draw(scans: list[ShardScan], out: Path, manifest: Manifest) -> None:
    """Draw and write the set of the manifest's settings."""
    samples, seed, name = (manifest.settings[key] for key in ("samples", "seed", "name"))
    strata = _strata(scans, seed)
    shares = allocate({stratum: len(drawn) for stratum, drawn in strata.items()}, samples)
    chosen = {stratum: drawn[: shares[stratum]] for stratum, drawn in strata.items()}
    for kind in sorted({kind for kind, _ in chosen}):
        some = sorted((d for (k, _), drawn in chosen.items() if k == kind for d in drawn), key=lambda d: d[0])
        for number, start in enumerate(range(0, len(some), PER_SHARD)):
            part = some[start : start + PER_SHARD]
            path = out / f"{name}-{kind}-{number:05d}.tar"
            write_shard(path, map(_content, part))
            frames, size = sum(entry.frames for _, _, entry in part), path.stat().st_size
            manifest.shards[path.name] = ShardEntry(path.name, len(part), len(part), frames, size, digest_file(path))
    manifest.strata = {f"{kind} {source}": len(drawn) for (kind, source), drawn in sorted(chosen.items())}
    manifest.complete = True
    manifest.save(out)


def allocate(counts: dict[Any, int], samples: int) -> dict[Any, int]:
    """Distribute `samples` in proportion to `counts`, at least one each, exact in total (largest remainders). Raises
    UserError when `samples` is not below the total, or below the number of strata."""
    total = sum(counts.values())
    if samples >= total:
        raise UserError(f"--samples {samples}: there are {total}, and an evaluation set must leave some to train on")
    if samples < len(counts):
        raise UserError(f"--samples {samples}: there are {len(counts)} kinds of sources, and each needs one sample")
    shares = {stratum: max(1, samples * count // total) for stratum, count in counts.items()}
    order = sorted(counts, key=lambda s: (-(samples * counts[s] % total), str(s)))
    while (left := samples - sum(shares.values())) != 0:
        if left > 0:
            for stratum in [s for s in order if shares[s] < counts[s]][:left]:
                shares[stratum] += 1
        else:
            shares[max(shares, key=lambda s: (shares[s], str(s)))] -= 1
    return shares


def _strata(scans: list[ShardScan], seed: int) -> dict[tuple[str, str], list[Drawn]]:
    """(kind, source) -> its good samples, each content once, sorted by hash."""
    strata: dict[tuple[str, str], list[Drawn]] = {}
    seen: set[str] = set()
    for scan in scans:
        for entry in scan.good:
            if entry.sample not in seen:
                seen.add(entry.sample)
                key = digest(f"{seed}/{entry.sample}")
                strata.setdefault((entry.kind, entry.source), []).append((key, scan, entry))
    return {stratum: sorted(drawn, key=lambda d: d[0]) for stratum, drawn in strata.items()}


def _content(drawn: Drawn) -> dict[str, Any]:
    """A sample for `write_shard`. Its key is the hash: keys of different shards may be equal."""
    key, scan, entry = drawn
    with open(scan.path, "rb") as file:
        file.seek(entry.offset)
        files = read_members(file.read(entry.length))
    return {"__key__": key, **{member.extension: data for member, data in files.items()}}


def _verify(manifest: Manifest, out: Path) -> None:
    """Raises UserError when a shard of the set has changed."""
    for name, shard in manifest.shards.items():
        if not (out / name).is_file() or digest_file(out / name) != shard.checksum:
            raise UserError(f"{out / name} is not what was drawn: restore it, or draw a new set into another folder")
