"""`fovlm check --repair OUT`: copies of the shards without the bad samples.

Good samples are copied byte for byte; the original shards do not change.
"""

import json
import os
from collections import Counter
from pathlib import Path

from fovlm.fileio import digest_file, open_atomically, write_atomically
from fovlm.prepare.check import ShardScan
from fovlm.prepare.manifest import REJECTED, Manifest, ShardEntry, load_manifest
from fovlm.progress import track

END_OF_TAR = bytes(1024)  # two empty blocks


def repair(scans: list[ShardScan], out: Path) -> int:
    """Write the shards into `out`, in folders relative to their common parent; returns the number of samples."""
    base = Path(os.path.commonpath([scan.path.parent.resolve() for scan in scans]))
    folders: dict[Path, list[ShardScan]] = {}
    for scan in track(scans, "repairing shards"):
        folder = out / scan.path.parent.resolve().relative_to(base)
        folders.setdefault(folder, []).append(scan)
        if scan.good:
            _copy(scan, folder / scan.path.name)
    return sum(_write_manifest(folder, of) for folder, of in folders.items())


def _copy(scan: ShardScan, path: Path) -> None:
    with open(scan.path, "rb") as source, open_atomically(path) as copy:
        for entry in scan.good:
            source.seek(entry.offset)
            copy.write(source.read(entry.length))
        copy.write(END_OF_TAR)


def _write_manifest(folder: Path, scans: list[ShardScan]) -> int:
    """Write manifest and rejected.jsonl of one folder; returns its number of samples."""
    before = load_manifest(scans[0].path.parent)
    settings = {"repaired": True} | (before.settings if before else {})
    manifest = Manifest(settings, before.inputs if before else [], complete=True)
    lines = []
    for scan in scans:
        causes = dict(sorted(Counter(entry.cause for entry in scan.entries if entry.cause).items()))
        if scan.cause and not scan.entries:
            causes[scan.cause] = 1
        path = folder / scan.path.name
        size, checksum = (path.stat().st_size, digest_file(path)) if scan.good else (0, "")
        counts = (len(scan.entries), len(scan.good), sum(entry.frames for entry in scan.good))
        manifest.shards[path.name] = ShardEntry(path.name, *counts, size, checksum, causes)
        lines += [{"shard": path.name, "key": e.key, "cause": e.cause} for e in scan.entries if e.cause]
    write_atomically(folder / REJECTED, "".join(json.dumps(line) + "\n" for line in lines))
    manifest.save(folder)
    return manifest.total("samples")
