"""What lies in a folder of prepared shards: manifest.json and rejected.jsonl.

The manifest is written anew after every shard, so it names exactly the shards that are complete; that is all that a
resume needs. Nothing in it depends on when, where, or on how many workers it was made.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from fovlm.errors import UserError
from fovlm.fileio import digest, locked, write_atomically

FILE, REJECTED = "manifest.json", "rejected.jsonl"
PACKAGES = ("av", "pillow", "simplejpeg", "pyarrow", "webdataset")  # other versions may give other bytes


@dataclass
class Shard:
    """One complete shard. `checksum` is its BLAKE2b, as in its index; `rejected` counts its rows left out by cause."""

    name: str
    rows: int
    samples: int
    frames: int
    bytes: int
    checksum: str
    rejected: dict[str, int] = field(default_factory=dict)


@dataclass
class Manifest:
    """What was asked (`settings`), what it was made of (`inputs`), and the shards by name."""

    settings: dict[str, Any]
    inputs: list[dict[str, Any]]
    complete: bool = False
    shards: dict[str, Shard] = field(default_factory=dict)
    strata: dict[str, int] = field(default_factory=dict)  # of an evaluation set: samples by kind and source

    @property
    def hash(self) -> str:
        """Names the content of all shards in order, as `fovlm.data.index.index_hash` does."""
        checksums = [self.shards[name].checksum for name in sorted(self.shards) if self.shards[name].samples]
        return digest("\n".join(checksums))

    def total(self, what: str) -> int:
        """The sum of rows, samples, frames or bytes."""
        return sum(getattr(shard, what) for shard in self.shards.values())

    @property
    def rejected(self) -> dict[str, int]:
        """How many rows were left out, by cause, most first."""
        causes = sum((Counter(shard.rejected) for shard in self.shards.values()), Counter())
        return dict(sorted(causes.items(), key=lambda item: (-item[1], item[0])))

    def save(self, folder: Path) -> None:
        """Write it whole."""
        totals = {what: self.total(what) for what in ("rows", "samples", "frames", "bytes")}
        told = {
            "complete": self.complete,
            "hash": self.hash,
            **totals,
            "rejected": self.rejected,
            "strata": self.strata,
            "settings": self.settings,
            "inputs": self.inputs,
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
            "shards": [asdict(self.shards[name]) for name in sorted(self.shards)],
        }
        write_atomically(folder / FILE, json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def load(folder: Path) -> Manifest | None:
    """The manifest of a folder; None when there is none. Raises UserError for one that cannot be read."""
    file = folder / FILE
    try:
        told = json.loads(file.read_bytes())
        shards = {shard["name"]: Shard(**shard) for shard in told["shards"]}
        return Manifest(told["settings"], told["inputs"], told["complete"], shards, told["strata"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it, and every shard is made again") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two commands must not write into one folder at the same time. Raises UserError while another one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise UserError(f"another command is writing into {folder}: wait for it, or take another folder") from None
        yield


def open_or_new(folder: Path, settings: dict[str, Any], inputs: list[dict[str, Any]]) -> Manifest:
    """The manifest to go on from: the folder's own when it was made in the same way, without what is gone since.

    Raises UserError when the folder holds shards of other settings or other input.
    """
    found = load(folder)
    if found is None:
        return Manifest(settings, inputs)
    for name in sorted({*settings, *found.settings}):
        if settings.get(name) != found.settings.get(name):
            asked, was = settings.get(name), found.settings.get(name)
            raise UserError(
                f"{folder} holds shards made with {name} {was!r}, not {asked!r}: take another folder for OUT"
            )
    if inputs != found.inputs:
        raise UserError(f"{folder} holds shards of an input that has changed since: take another folder for OUT")
    found.shards = {n: s for n, s in found.shards.items() if not s.samples or _there(folder / n, s.bytes)}
    return found


def _there(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
