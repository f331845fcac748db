"""The settings of one `fovlm prepare`, and the interface of sources."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fovlm.data.tables import Row
from fovlm.errors import SampleError
from fovlm.fileio import digest

Record = dict[str, Any]


@dataclass(frozen=True)
class SceneSettings:
    """What is drawn for the source `scenes`."""

    samples: int = 10_000  # scenes
    objects: str = "1,3,9"  # pictures in a scene: one of these numbers
    grid: int = 3  # cells on a side
    frames: int = 1  # of a scene
    ask: str = "name"  # the question
    held_out: bool = False  # with the films, names and pictures that only validation has
    pictures: int | None = None  # of a name, and another one for validation; None: one, for both


@dataclass(frozen=True)
class Job:
    """Everything that decides the content of the shards; sent to the workers."""

    source: str  # a name of SOURCES
    raw: Path  # a folder, or the table itself
    out: Path
    name: str = "train"  # shards are OUT/NAME-00000.tar ...
    seed: int = 0
    per_shard: int = 1000  # rows per shard
    size: int = 224  # pixels of a frame's sides
    max_frames: int = 64  # of a video
    quality: int = 90  # of JPEG
    media: Path | None = None  # folder of the videos and pictures, when not with the table
    columns: tuple[tuple[str, str], ...] = ()  # table: (video, image, question or answer, its column)
    ratings: tuple[tuple[str, float], ...] = ()  # cauldron: (rating, least)
    max_bad: float = 1.0  # share of the rows that may be rejected
    stage: int = 0  # 1, 2, 3: that third of the conversations; 0: all
    skip_missing: bool = False  # benchmarks: skip questions whose video or picture is missing
    scenes: SceneSettings | None = None

    @property
    def folder(self) -> Path:
        """The folder of the raw data; paths in tables and reports are relative to it."""
        return self.raw if self.raw.is_dir() else self.raw.parent


@dataclass
class NewSample:
    """A record and its JPEGs: the frames of a video, one picture (`still`), or none.

    `rejected` are (line, cause) of rows of which nothing is in the record. An empty record is no sample.
    """

    record: Record
    pictures: list[bytes] = field(default_factory=list)
    still: bool = False
    rejected: list[tuple[int, SampleError]] = field(default_factory=list)


@dataclass(frozen=True)
class RawSource:
    """A kind of raw data. `make` turns a row into a sample, in the workers; it raises SampleError."""

    name: str
    kind: str  # video, image, text, preference, mixed
    formats: tuple[str, ...]  # of its tables; the first one present is read
    required: tuple[tuple[str, ...], ...]  # columns, each with its alternative names
    columns: tuple[str, ...]  # that are read from parquet files
    make: Callable[[Row, Job], NewSample]
    prompt: str = ""  # the question of samples without one
    same: tuple[str, ...] = ()  # columns: rows with the same values there are made together (`data/tables.py`)
    max_bad: float = 1.0
    rows: Callable[[Job], list[Row]] | None = None  # instead of tables: all rows
    finish: Callable[[Job], None] = lambda job: None  # after the shards
    complete: str = ""  # the table or folder whose rows are repeated by others beside it


def content_hashes(record: Record, pictures: list[bytes]) -> tuple[str, str]:
    """(hash of texts and pictures, hash of the pictures alone or "" without any); the key of the sample has no effect.

    White space between words does not count.
    """
    hashed = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        hashed.update(hashlib.blake2b(picture, digest_size=16).digest())
    of_pictures = hashed.hexdigest() if pictures else ""
    texts = [" ".join(str(record.get(part) or "").split()) for part in ("user", "assistant", "chosen", "rejected")]
    texts += [json.dumps(record[part]) for part in ("turns", "messages", "conversations") if part in record]
    if not any(texts[1:]):
        texts.append(str(record.get("token_ids")))
    return digest("\0".join([*texts, of_pictures]).encode("utf-8", "replace")), of_pictures
