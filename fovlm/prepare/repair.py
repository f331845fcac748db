"""`fovlm check --repair OUT`: the shards again, without the samples that have something wrong.

Good samples are copied byte for byte; the old shards are not touched.
"""

import json
import os
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import track

from fovlm.fileio import digest_file, open_atomically, write_atomically
from fovlm.prepare import manifest as books
from fovlm.prepare.check import Audit, Scan
from fovlm.prepare.manifest import Manifest, Shard

END = bytes(1024)  # two empty blocks end a tar


def repair(found: Audit, out: Path, console: Console) -> int:
    """Write the shards of an audit into `out`, below the folder that they have in common; the samples written."""
    base = Path(os.path.commonpath([scan.path.parent.resolve() for scan in found.scans]))
    folders: dict[Path, list[Scan]] = {}
    for scan in track(found.scans, "repairing", console=console, transient=True, disable=not console.is_terminal):
        folder = out / scan.path.parent.resolve().relative_to(base)
        folders.setdefault(folder, []).append(scan)
        if any(not entry.cause for entry in scan.entries):
            _copy(scan, folder / scan.path.name)
    return sum(_book(folder, scans) for folder, scans in folders.items())


def _copy(scan: Scan, path: Path) -> None:
    with open(scan.path, "rb") as source, open_atomically(path) as copy:
        for entry in scan.entries:
            if not entry.cause:
                source.seek(entry.offset)
                copy.write(source.read(entry.length))
        copy.write(END)


def _book(folder: Path, scans: list[Scan]) -> int:
    """Manifest and list of what was left out, of one folder; the samples in it."""
    before = books.load(scans[0].path.parent)
    settings = {"repaired": True} | (before.settings if before else {})
    manifest = Manifest(settings, before.inputs if before else [], complete=True)
    lines = []
    for scan in scans:
        good = [entry for entry in scan.entries if not entry.cause]
        causes = dict(sorted(Counter(entry.cause for entry in scan.entries if entry.cause).items()))
        if scan.cause and not scan.entries:
            causes[scan.cause] = 1
        path = folder / scan.path.name
        size, checksum = (path.stat().st_size, digest_file(path)) if good else (0, "")
        frames = sum(entry.frames for entry in good)
        manifest.shards[path.name] = Shard(path.name, len(scan.entries), len(good), frames, size, checksum, causes)
        lines += [{"shard": path.name, "key": e.key, "cause": e.cause} for e in scan.entries if e.cause]
    write_atomically(folder / books.REJECTED, "".join(json.dumps(line) + "\n" for line in lines))
    manifest.save(folder)
    return manifest.total("samples")
