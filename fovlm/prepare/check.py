"""`fovlm check`: read shards from end to end and say what training would stumble over.

Every sample gets two hashes, of all it says and shows and of its pictures alone (`job.fingerprints`); duplicates and
what train and evaluation have in common are told by these, whatever the keys and wherever the shards lie.
"""

import glob
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from rich.console import Console
from rich.progress import track

from fovlm.data.index import make_index
from fovlm.data.sample_format import Member, contents, list_members, parse_json
from fovlm.data.workers import each
from fovlm.errors import SampleError, UserError, did_you_mean
from fovlm.media import decode as media
from fovlm.prepare import manifest as books
from fovlm.prepare.job import fingerprints

LOOK = 32  # pixels at which pictures are decoded: the whole file is read, little is computed


@dataclass
class Entry:
    """One sample of a shard: its byte range, what it is, its hashes, and what is wrong with it, if anything."""

    key: str
    offset: int
    length: int
    kind: str
    source: str = ""
    frames: int = 0
    sample: str = ""
    pictures: str = ""
    cause: str = ""


@dataclass
class Scan:
    """One shard. `cause` is what is wrong with it as a whole."""

    path: Path
    checksum: str = ""
    entries: list[Entry] = field(default_factory=list)
    cause: str = ""


@dataclass
class Audit:
    """All shards in the order of their names, and the number of problems."""

    scans: list[Scan]

    @property
    def problems(self) -> int:
        return sum(bool(scan.cause) for scan in self.scans) + sum(bool(e.cause) for s in self.scans for e in s.entries)


def audit(patterns: list[str], against: list[str], workers: int, decode: bool, console: Console) -> Audit:
    """Scan the shards of the patterns, those of `against` left out.

    Raises UserError for a pattern without any, and for one of `against` that cannot be read.
    """
    other = shards_of(against) if against else []
    itself = {path.resolve() for path in other}
    paths = [path for path in shards_of(patterns) if path.resolve() not in itself]
    if not paths:
        raise UserError("--against names the same shards: nothing is left to check")
    others = scan_all(other, workers, False, console, "against")
    if bad := next((scan for scan in others if scan.cause), None):
        raise UserError(f"--against {bad.path}: {bad.cause}, so what is shared with it cannot be told")
    taken = {h for s in others for e in s.entries for h in (e.sample, e.pictures)}
    scans = scan_all(paths, workers, decode, console, "checking")
    first: set[str] = set()
    for scan in scans:
        for entry in scan.entries:
            if entry.cause:
                continue
            if entry.sample in first:
                entry.cause = "duplicate"
            elif entry.sample in taken:
                entry.cause = "in the evaluation set"
            elif entry.pictures and entry.pictures in taken:
                entry.cause = "pictures of the evaluation set"
            first.add(entry.sample)
    return Audit(scans)


def shards_of(patterns: list[str]) -> list[Path]:
    """The files that patterns with braces and wildcards stand for, sorted. Raises UserError for one without a file."""
    found: set[Path] = set()
    for pattern in patterns:
        try:
            names = list(braceexpand(pattern))
        except ValueError:
            raise UserError(f"'{pattern}' has a brace without its other half") from None
        for name in names:
            files = [Path(file) for file in glob.glob(name, recursive=True) if Path(file).is_file()]
            if not files:
                folder = Path(name).parent
                near = did_you_mean(Path(name).name, (p.name for p in folder.iterdir())) if folder.is_dir() else ""
                raise UserError(
                    f"no shard '{name}'{near}"
                    + ("" if folder.is_dir() or glob.has_magic(name) else f": no folder {folder}")
                )
            found.update(files)
    return sorted(found)


def scan_all(paths: list[Path], workers: int, decode: bool, console: Console, told: str) -> list[Scan]:
    """Scan shards in parallel; in the order of `paths`."""
    done = each(scan_shard, [(path, decode) for path in paths], workers)
    bar = track(done, told, len(paths), console=console, transient=True, disable=not console.is_terminal)
    return sorted(bar, key=lambda scan: scan.path)


def scan_shard(path: Path, decode: bool) -> Scan:
    """Read one shard from end to end; with `decode`, its pictures as well."""
    try:
        index = make_index(path)
    except (UserError, OSError) as error:
        return Scan(
            path, cause="two samples of one name" if "follow each other" in str(error) else "not a readable tar"
        )
    scan = Scan(path, index.checksum)
    listed = _listed(path)
    if listed and listed != index.checksum:
        scan.cause = "not the checksum of the manifest"
    with open(path, "rb") as file:
        for row, key in enumerate(index.key):
            entry = Entry(key, int(index.offset[row]), int(index.length[row]), index.kind(row))
            scan.entries.append(entry)
            if row in index.broken:
                entry.cause = index.broken[row]
                continue
            file.seek(entry.offset)
            try:
                _look_at(entry, file.read(entry.length), decode)
            except SampleError as error:
                entry.cause = str(error)
    return scan


def members_of(data: bytes) -> dict[Member, bytes]:
    """The files in a sample's byte range."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return {member: data[member.offset : member.offset + member.length] for member in list_members(tar)}


def _look_at(entry: Entry, data: bytes, decode: bool) -> None:
    """Fill in what the sample is. Raises BadSample."""
    files = members_of(data)
    _, pictures = contents(list(files))
    record = parse_json(next(content for member, content in files.items() if member.extension == "json"))
    entry.source, entry.frames = str(record.get("source") or ""), len(pictures)
    entry.sample, entry.pictures = fingerprints(record, [files[member] for member in pictures])
    _check_record(record)
    if decode:
        for _ in _decoded(pictures, files):
            pass


def _decoded(pictures: list[Member], files: dict[Member, bytes]) -> Iterator[Any]:
    for member in pictures:
        extension = member.extension.rpartition(".")[2]
        if extension in media.VIDEOS:
            seconds = media.video_seconds(files[member], extension)
            yield media.decode_video(files[member], extension, LOOK, seconds, most=64)
        else:
            yield media.decode_pictures([(extension, files[member])], LOOK)


def _check_record(record: dict[str, Any]) -> None:
    """Raises BadSample for a record that no training can use."""
    if "token_ids" in record:
        ids, mask = record["token_ids"], record.get("loss_mask")
        if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
            raise SampleError("loss_mask is not one 0 or 1 for each of token_ids")
        if not any(mask):
            raise SampleError("empty answer")
        return
    answers = ("chosen", "rejected") if "chosen" in record or "rejected" in record else ("assistant",)
    for name in answers:
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise SampleError("empty answer")


def _listed(path: Path) -> str:
    """The checksum that the manifest beside a shard has for it, or nothing."""
    manifest = books.load(path.parent)
    return manifest.shards[path.name].checksum if manifest and path.name in manifest.shards else ""
