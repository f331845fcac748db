"""`fovlm check`: read shards completely and find everything that training would reject.

Each sample gets two hashes, of its whole content and of its pictures (`job.content_hashes`). Duplicates, and overlap of
training and evaluation data, are found by these hashes, whatever the keys and shards.
"""

import glob
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from fovlm.data.chat import conversations, turns_of, weight_of
from fovlm.data.index import make_index, stored_indices
from fovlm.data.sample_format import contents, parse_json, printable, read_members
from fovlm.data.workers import each
from fovlm.errors import SampleError, UserError, did_you_mean_path
from fovlm.media.decode import decode_media
from fovlm.paths import cache_root
from fovlm.prepare.job import content_hashes
from fovlm.prepare.manifest import load_manifest
from fovlm.progress import track

SIZE = 32  # pixels of decoded pictures: the whole file is decoded, with little resampling


@dataclass
class SampleEntry:
    """One sample of a shard: its byte range, content hashes, and the cause if it is bad."""

    key: str
    offset: int
    length: int
    kind: str
    source: str = ""
    frames: int = 0
    sample: str = ""  # hash of texts and pictures
    pictures: str = ""  # hash of the pictures
    cause: str = ""


@dataclass
class ShardScan:
    """One shard. `cause` is a problem of the whole shard."""

    path: Path
    checksum: str = ""
    entries: list[SampleEntry] = field(default_factory=list)
    cause: str = ""

    @property
    def good(self) -> list[SampleEntry]:
        """The samples without a problem."""
        return [entry for entry in self.entries if not entry.cause]


def check_shards(patterns: list[str], against: list[str], workers: int, decode: bool) -> list[ShardScan]:
    """Scan the shards of the patterns, without those of `against`; sorted by path. Raises UserError for a pattern that
    matches nothing, and for an unreadable shard of `against`."""
    others = list_shards(against)
    resolved = {path.resolve() for path in others}
    paths = [path for path in list_shards(patterns) if path.resolve() not in resolved]
    if not paths:
        raise UserError("--against names the same shards: nothing is left to check")
    held_out = scan_shards(others, workers, False)
    if bad := next((scan for scan in held_out if scan.cause), None):
        raise UserError(f"--against {bad.path}: {bad.cause}, so overlap with it cannot be checked")
    known = {h for scan in held_out for e in scan.entries for h in (e.sample, e.pictures)}
    scans = scan_shards(paths, workers, decode)
    seen: set[str] = set()
    for entry in (entry for scan in scans for entry in scan.good):
        if entry.sample in seen:
            entry.cause = "duplicate"
        elif entry.sample in known:
            entry.cause = "in the evaluation set"
        elif entry.pictures and entry.pictures in known:
            entry.cause = "pictures of the evaluation set"
        seen.add(entry.sample)
    return scans


def problems(scans: list[ShardScan]) -> int:
    """The number of problems of shards and samples."""
    return sum(bool(scan.cause) + len(scan.entries) - len(scan.good) for scan in scans)


def list_shards(patterns: Iterable[str]) -> list[Path]:
    """The files of patterns with braces and wildcards, sorted. Raises UserError for a pattern without a file."""
    found: set[Path] = set()
    for pattern in patterns:
        try:
            names = list(braceexpand(pattern))
        except ValueError:
            raise UserError(f"'{pattern}' has an unbalanced brace") from None
        for name in names:
            files = [Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file()]
            if not files:
                path = Path(name)
                near = "" if glob.has_magic(str(path.parent)) else did_you_mean_path(path)
                hint = f": it is a folder, take '{path / '*.tar'}'" if path.is_dir() else near
                raise UserError(f"no shard '{name}'{hint}")
            found.update(files)
    return sorted(found)


def scan_shards(paths: list[Path], workers: int, decode: bool) -> list[ShardScan]:
    """Scan shards in parallel; in the order of `paths`."""
    done = each(scan_shard, [(path, decode) for path in paths], workers)
    return sorted(track(done, "checking shards", len(paths)), key=lambda scan: scan.path)


def scan_shard(path: Path, decode: bool) -> ShardScan:
    """Read one shard completely; with `decode`, decode its pictures and videos."""
    try:
        index = make_index(path)
    except (UserError, OSError) as error:
        repeated = "follow each other" in str(error)
        return ShardScan(path, cause="two samples of one name" if repeated else "not a readable tar")
    scan = ShardScan(path, index.checksum)
    manifest = load_manifest(path.parent)
    if manifest and path.name in manifest.shards and manifest.shards[path.name].checksum not in ("", index.checksum):
        scan.cause = "not the checksum of the manifest"
    indexed = next((before for before in stored_indices(path, cache_root()) if before.size == index.size), index)
    if indexed.checksum != index.checksum:
        scan.cause = scan.cause or f"not the checksum of its index; if it was written anew, delete {path.name}.index"
    checksums = dict(zip(indexed.key, indexed.crc32.tolist(), strict=True))
    with open(path, "rb") as file:
        for row, key in enumerate(index.key):
            entry = SampleEntry(key, int(index.offset[row]), int(index.length[row]), index.kind(row))
            scan.entries.append(entry)
            changed = checksums.get(key, index.crc32[row]) != index.crc32[row]
            entry.cause = "checksum mismatch" if changed else index.broken.get(row, "")
            if entry.cause:
                continue
            file.seek(entry.offset)
            try:
                _check_sample(entry, file.read(entry.length), int(index.frames[row]), decode)
            except SampleError as error:
                entry.cause = str(error)
    return scan


def _check_sample(entry: SampleEntry, data: bytes, frames: int, decode: bool) -> None:
    """Fill in an entry from the sample's bytes; `frames` as the index counts them. Raises SampleError."""
    files = read_members(data)
    _, pictures = contents(list(files))
    record = parse_json(next(content for member, content in files.items() if member.extension == "json"))
    entry.source, entry.frames = printable(str(record.get("source") or "")), len(pictures)
    entry.sample, entry.pictures = content_hashes(record, [files[member] for member in pictures])
    for conversation in conversations(record):
        _check_record(conversation)
    if decode:
        media = [(member.extension.rpartition(".")[2], files[member]) for member in pictures]
        decode_media(media, frames, SIZE, most=max(64, len(pictures)))


def _check_record(record: dict[str, Any]) -> None:
    """Raises SampleError for a record that training cannot use."""
    weight_of(record)
    if "token_ids" in record:
        ids, mask = record["token_ids"], record.get("loss_mask")
        if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
            raise SampleError("loss_mask is not one 0 or 1 for each of token_ids")
        if not any(mask):
            raise SampleError("empty answer")
        return
    if "chosen" not in record and "rejected" not in record:
        turns_of(record, "?")
    elif not all(isinstance(record.get(name), str) and record[name].strip() for name in ("chosen", "rejected")):
        raise SampleError("empty answer")
