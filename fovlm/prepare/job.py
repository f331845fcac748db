"""What one `fovlm prepare` is asked to do, what a source is, and what a source makes."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fovlm.data.tables import Row
from fovlm.fileio import digest

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Everything that decides what the shards hold; travels to the workers."""

    source: str  # a name of SOURCES
    raw: Path  # a folder, or the table itself
    out: Path
    name: str = "train"  # shards are OUT/NAME-00000.tar ...
    seed: int = 0
    per_shard: int = 1000  # rows that a shard is made of
    size: int = 224  # pixels of a frame's sides
    most: int = 64  # frames of a video
    quality: int = 90  # of JPEG
    videos: Path | None = None  # where the videos are, when not with the table
    turns: str = "first"  # "first" exchange of a conversation, or "each" as a sample of its own
    stage: int = 0  # 1, 2, 3: that third of the conversations; 0: all
    tokenize: str = ""  # "stage1", "sft", or not ahead of time
    tokenizer: str = ""
    prompt: str = ""  # asked, when tokenizing, where a row has no question
    exclude: Path | None = None  # taken.jsonl of an evaluation set
    skip_missing: bool = False  # benchmarks: leave out questions whose video or picture is not there

    @property
    def folder(self) -> Path:
        """Where the raw data lies; paths in tables and reports are relative to it."""
        return self.raw if self.raw.is_dir() else self.raw.parent


@dataclass
class Made:
    """One sample: its record, and its JPEGs: frames of a video, one picture (`still`), or none."""

    record: Record
    pictures: list[bytes] = field(default_factory=list)
    still: bool = False


@dataclass(frozen=True)
class RawSource:
    """One kind of raw data. `make` turns a row into samples and raises BadSample; it runs in the workers."""

    name: str
    kind: str  # video, image, text, preference
    formats: tuple[str, ...]  # of its tables, the first that is there
    needs: tuple[tuple[str, ...], ...]  # columns it must have, each with other names it goes by
    reads: tuple[str, ...]  # columns that are read of parquet files
    make: Callable[[Row, Job], Iterator[Made]]
    prompt: str = ""  # asked of samples without a question
    turns: str = "first"
    rows: Callable[[Path, bool], list[Row]] | None = None  # in place of tables: (where, skip missing files) -> all rows
    whole: str = ""  # the table or folder that has all rows which others beside it have again
    sidecars: bool = False  # a JSON beside each video will do in place of a table


def fingerprints(record: Record, pictures: list[bytes]) -> tuple[str, str]:
    """What a sample says and shows, whatever its key: (hash of texts and pictures, hash of the pictures alone).

    The second is empty for text. White space between words does not count.
    """
    seen = hashlib.blake2b(digest_size=16)
    for picture in pictures:
        seen.update(hashlib.blake2b(picture, digest_size=16).digest())
    looks = seen.hexdigest() if pictures else ""
    said = [" ".join(str(record.get(part) or "").split()) for part in ("user", "assistant", "chosen", "rejected")]
    if not any(said[1:]):
        said.append(str(record.get("token_ids")))
    return digest("\0".join([*said, looks]).encode("utf-8", "replace")), looks
