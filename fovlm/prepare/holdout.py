"""`fovlm prepare val`: draw a frozen evaluation set out of prepared shards.

Drawn by hash: each stratum (kind and source) is put in the order of a hash of seed and content, and gives as many of
its first as its share. So the set depends on what the samples are, not on how they are sharded. `taken.jsonl` lists it,
for `fovlm prepare --exclude`; `fovlm check --against` finds what other shards share with it, and `--repair` removes it.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from fovlm.data.shards import write_shard
from fovlm.errors import UserError
from fovlm.fileio import digest, digest_file, write_atomically
from fovlm.prepare import manifest as books
from fovlm.prepare.check import Entry, Scan, members_of, scan_all, shards_of
from fovlm.prepare.manifest import Manifest, Shard

TAKEN = "taken.jsonl"
PER_SHARD = 1000
Drawn = tuple[str, Scan, Entry]  # rank, where it comes from, what it is


def draw(pattern: str, out: Path, name: str, samples: int, seed: int, workers: int, console: Console) -> Manifest:
    """Write OUT/NAME-KIND-00000.tar ..., stratified by kind and source; the manifest, whose hash names the set.

    A set that is there already is kept as it is, and checked. Raises UserError when it was drawn otherwise, when it is
    not what was drawn, and for a shard that cannot be read.
    """
    paths = [path for path in shards_of([pattern]) if path.parent.resolve() != out.resolve()]
    if not paths:
        raise UserError(f"'{pattern}' names no shards outside {out}")
    scans = scan_all(paths, workers, False, console, "reading")
    if bad := next((scan for scan in scans if scan.cause), None):
        raise UserError(f"{bad.path}: {bad.cause}; make it again, or leave it out of the pattern")
    settings = {"source": "val", "samples": samples, "seed": seed, "name": name}
    inputs = [{"file": path.name, "checksum": checksum} for path, checksum in ((s.path, s.checksum) for s in scans)]
    with books.alone(out):
        before = books.load(out)  # as it was left; what is opened below is without the shards that are gone
        manifest = books.open_or_new(out, settings, inputs)
        if before is not None and before.complete:
            _verify(before, out)
            console.print("this set is drawn already, and unchanged")
            return before
        _draw(scans, out, manifest)
    return manifest


def _draw(scans: list[Scan], out: Path, manifest: Manifest) -> None:
    """Draw as the manifest's settings say, and write it all."""
    samples, seed, name = (manifest.settings[key] for key in ("samples", "seed", "name"))
    strata = _strata(scans, seed)
    shares = allocate({stratum: len(drawn) for stratum, drawn in strata.items()}, samples)
    chosen = {stratum: drawn[: shares[stratum]] for stratum, drawn in strata.items()}
    taken: list[dict[str, Any]] = []
    for kind in sorted({kind for kind, _ in chosen}):
        some = sorted((d for (k, _), drawn in chosen.items() if k == kind for d in drawn), key=lambda d: d[0])
        for number, start in enumerate(range(0, len(some), PER_SHARD)):
            _write(out / f"{name}-{kind}-{number:05d}.tar", some[start : start + PER_SHARD], manifest, taken)
    manifest.strata = {f"{kind} {source}": len(drawn) for (kind, source), drawn in sorted(chosen.items())}
    write_atomically(out / TAKEN, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in taken))
    manifest.complete = True
    manifest.save(out)


def allocate(there: dict[Any, int], samples: int) -> dict[Any, int]:
    """Shares of `samples` in proportion to what is there, at least one of each, exact in total (largest remainders).

    Raises UserError when there are fewer samples than that, or fewer asked than strata.
    """
    total = sum(there.values())
    if samples >= total:
        raise UserError(f"--samples {samples}: there are {total}, and an evaluation set must leave some to train on")
    if samples < len(there):
        raise UserError(f"--samples {samples}: there are {len(there)} kinds of sources, which want one sample each")
    shares = {stratum: max(1, samples * count // total) for stratum, count in there.items()}
    order = sorted(there, key=lambda s: (-(samples * there[s] % total), str(s)))
    while (left := samples - sum(shares.values())) != 0:
        if left > 0:
            for stratum in [s for s in order if shares[s] < there[s]][:left]:
                shares[stratum] += 1
        else:
            shares[max(shares, key=lambda s: (shares[s], str(s)))] -= 1
    return shares


def _strata(scans: list[Scan], seed: int) -> dict[tuple[str, str], list[Drawn]]:
    """(kind, source) -> all good samples of it, each content once, in the order of their hashes."""
    strata: dict[tuple[str, str], list[Drawn]] = {}
    seen: set[str] = set()
    for scan in scans:
        for entry in scan.entries:
            if entry.cause or entry.sample in seen:
                continue
            seen.add(entry.sample)
            rank = digest(f"{seed}/{entry.sample}")
            strata.setdefault((entry.kind, entry.source), []).append((rank, scan, entry))
    return {stratum: sorted(drawn, key=lambda d: d[0]) for stratum, drawn in strata.items()}


def _write(path: Path, some: list[Drawn], manifest: Manifest, taken: list[dict[str, Any]]) -> None:
    """One shard; each sample named by its rank, since keys of different shards may be equal."""
    frames: Counter[str] = Counter()

    def samples():
        for rank, scan, entry in some:
            with open(scan.path, "rb") as file:
                file.seek(entry.offset)
                files = members_of(file.read(entry.length))
            frames[path.name] += entry.frames
            where = {"shard": str(scan.path), "was": entry.key, "kind": entry.kind, "source": entry.source}
            taken.append({"key": rank, **where, "sample": entry.sample, "pictures": entry.pictures})
            yield {"__key__": rank, **{member.extension: data for member, data in files.items()}}

    write_shard(path, samples())
    size, checksum = path.stat().st_size, digest_file(path)
    manifest.shards[path.name] = Shard(path.name, len(some), len(some), frames[path.name], size, checksum)


def _verify(manifest: Manifest, out: Path) -> None:
    """A frozen set must be what it was. Raises UserError."""
    for name, shard in manifest.shards.items():
        if not (out / name).is_file() or digest_file(out / name) != shard.checksum:
            raise UserError(f"{out / name} is not what was drawn: restore it, or draw a new set into another folder")
