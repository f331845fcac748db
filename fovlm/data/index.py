"""The index of a tar shard, made once: the byte range, checksum, kind and number of frames of every sample.

With it samples are read by position instead of in tar order. It is a line of JSON behind its digest, in a file beside
the shard, or in the cache where the shard is remote or its folder read-only. It is written atomically, so several
processes may make it at the same time, and made again when it is damaged, or the shard's size or modification time (of
a remote one, its version) has changed.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fovlm.data.record import record_members, record_of
from fovlm.data.sample_format import OWN, Fields, Member, TarError, contents, list_members
from fovlm.data.shard_cache import Shard
from fovlm.errors import SampleError, UserError
from fovlm.fileio import digest, sealed, unsealed, write_atomically
from fovlm.media import decode as media
from fovlm.progress import track

VERSION = 4  # of the file format; an index of another version is made again
MEDIA = ("text", "image", "video")
ARRAYS = {
    "offset": np.int64,
    "length": np.int64,
    "crc32": np.uint32,
    "record_offset": np.int64,
    "record_length": np.int64,
    "frames": np.int32,
    "media": np.uint8,
    "preference": np.bool_,
    "media_id": np.int64,
}


@dataclass
class Index:
    """One shard of n samples, in tar order.

    `checksum` is the shard's BLAKE2b. `offset` and `length` [n] are the byte range of a sample's members, headers
    included, and `crc32` [n] that range's checksum; `record_offset`, `record_length` [n] are the range of those with
    its record. `frames` [n] counts its pictures, or a video's seconds, before any limit. `media` [n] numbers MEDIA.
    `media_id` [n] are equal where the bytes of pictures and videos are, and 0 without any. `broken` names the cause for
    each unusable sample. `damaged_at` is the byte from which on the tar could not be read.
    """

    path: Shard
    size: int
    mtime_ns: int
    checksum: str
    key: list[str]
    offset: np.ndarray
    length: np.ndarray
    crc32: np.ndarray
    record_offset: np.ndarray
    record_length: np.ndarray
    frames: np.ndarray
    media: np.ndarray
    preference: np.ndarray
    media_id: np.ndarray
    broken: dict[int, str]
    damaged_at: int | None = None

    def __len__(self) -> int:
        return len(self.key)

    def kind(self, row: int) -> str:
        """text, image, video or preference."""
        return "preference" if self.preference[row] else MEDIA[self.media[row]]

    @property
    def warning(self) -> str:
        """What is lost of a damaged shard, or nothing."""
        lost = "damaged from byte {} on; the samples after it are lost"
        return "" if self.damaged_at is None else f"{self.path}: {lost.format(self.damaged_at)}"


def open_index(shard: Shard, cache: Path, fields: Fields = OWN) -> Index:
    """The shard's index, read from its file or made now; `fields` as of its source. Raises UserError for a file that is
    not a tar."""
    stat = shard.stat()
    for index in stored_indices(shard, cache, fields):
        if (index.size, index.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
            return index
    index = make_index(shard, fields)
    _write(index, _places(shard, cache, fields))
    return index


def stored_indices(shard: Shard, cache: Path, fields: Fields = OWN) -> Iterator[Index]:
    """The undamaged indices that were written for a shard, whatever became of it since, best first."""
    return (index for file in _places(shard, cache, fields) if (index := _read(file, shard)))


def open_indices(shards: list[Shard], cache: Path, fields: Fields = OWN) -> list[Index]:
    """The indices of a set of shards, with a progress bar when it takes long."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        indices = pool.map(lambda shard: open_index(shard, cache, fields), shards)
        return list(track(indices, "indexing shards", len(shards)))


def make_index(shard: Shard, fields: Fields = OWN) -> Index:
    """Read the whole shard once. Raises UserError when it is not a tar, or a sample's members are not contiguous."""
    stat = shard.stat()
    samples, damaged_at = _scan(shard)
    keys, rows, broken = [], [], {}
    hashed = hashlib.blake2b(digest_size=16)
    with shard.open("rb") as file:
        for row, members in enumerate(samples):
            start, length = members[0].start, members[-1].end - members[0].start
            _hash_until(file, start, hashed)
            data = file.read(length)
            hashed.update(data)
            texts = record_members(members, fields)
            where = (texts[0].start, texts[-1].end - texts[0].start) if texts else (0, 0)
            try:
                what = describe(members, data, fields)
            except SampleError as error:
                broken[row], what = str(error), ("text", 0, False, 0)
            keys.append(members[0].key)
            rows.append((start, length, zlib.crc32(data), *where, what[1], MEDIA.index(what[0]), *what[2:]))
        _hash_until(file, stat.st_size, hashed)
    if damaged_at is not None and keys:  # files of the last sample may be lost too
        broken[len(keys) - 1] = "truncated tar"
    table = np.array(rows, dtype=np.int64).reshape(-1, len(ARRAYS)).T
    arrays: dict[str, Any] = {name: table[i].astype(kind) for i, (name, kind) in enumerate(ARRAYS.items())}
    facts = (shard, stat.st_size, stat.st_mtime_ns, hashed.hexdigest(), keys)
    return Index(*facts, broken=broken, damaged_at=damaged_at, **arrays)


def describe(members: list[Member], data: bytes, fields: Fields) -> tuple[str, int, bool, int]:
    """(`text` | `image` | `video`, frames, is a preference pair, media_id) of the sample `data`. Raises SampleError."""

    def bytes_of(member: Member) -> bytes:
        start = member.offset - members[0].start
        return data[start : start + member.length]

    kind, pictures = contents(members, fields)
    record = record_of({m: bytes_of(m) for m in record_members(members, fields)}, fields)
    if record.get("text_only"):
        kind, pictures = "text", []
    if kind == "video" and pictures[0].extension in media.VIDEOS:
        frames = media.video_seconds(bytes_of(pictures[0]), pictures[0].extension)
    else:
        frames = len(pictures)
    data = b"".join(map(bytes_of, pictures))
    return kind, frames, "chosen" in record or "rejected" in record, len(data) % (1 << 31) << 32 | zlib.crc32(data)


def _scan(shard: Shard) -> tuple[list[list[Member]], int | None]:
    """The members of each sample, and the byte at which damage begins (None: undamaged)."""
    members: list[Member] = []
    damaged_at = None
    with shard.open("rb") as tar:
        try:
            for member in list_members(tar, shard.stat().st_size):
                members.append(member)
        except TarError as error:
            damaged_at = error.at
    if damaged_at is not None and not members:
        raise UserError(f"shard {shard} is not a plain tar: decompress it or write it again")
    samples = [list(group) for _, group in groupby(members, key=lambda m: m.key)]
    seen = set()
    for sample in samples:
        if sample[0].key in seen:
            raise UserError(
                f"shard {shard}: the files of sample '{sample[0].key}' do not follow each other, or two samples have "
                "this name: write the shard again with the files of each sample together"
            )
        seen.add(sample[0].key)
    return samples, damaged_at


def _hash_until(file: BinaryIO, end: int, digest) -> None:
    """Hash from the file's position up to `end`: headers of folders, the end mark, damaged parts."""
    while (left := end - file.tell()) > 0:
        if not (data := file.read(min(left, 1 << 20))):
            return
        digest.update(data)


def _places(shard: Shard, cache: Path, fields: Fields = OWN) -> list[Path]:
    """Possible paths of the index, best first."""
    place, way = digest(str(shard.resolve()), 8), digest(json.dumps(fields), 4) + "." if fields else ""
    beside = [shard.with_name(f"{shard.name}.{way}index")] if isinstance(shard, Path) else []
    return [*beside, cache / "index" / f"{shard.name}.{place}.{way}index"]


def _read(file: Path, shard: Shard) -> Index | None:
    """The index in `file`; None when there is none that this version can read, or it is damaged."""
    try:
        stored = json.loads(unsealed(file.read_bytes()))
    except (OSError, ValueError):
        return None
    if stored.pop("version") != VERSION:
        return None
    arrays: dict[str, Any] = {name: np.array(stored.pop(name), dtype=kind) for name, kind in ARRAYS.items()}
    broken = {int(row): cause for row, cause in stored.pop("broken").items()}
    return Index(shard, **stored, **arrays, broken=broken)


def _write(index: Index, places: list[Path]) -> None:
    """Write the index at the first writable place."""
    arrays = {name: getattr(index, name).tolist() for name in ARRAYS}
    facts = {name: getattr(index, name) for name in ("size", "mtime_ns", "checksum", "key", "broken", "damaged_at")}
    line = sealed(json.dumps({"version": VERSION, **facts, **arrays}))
    for file in places:
        try:
            write_atomically(file, line)
            return
        except OSError as error:
            problem = error
    raise UserError(f"no index can be written for shard {index.path} ({problem}): set FOVLM_CACHE to a writable folder")
