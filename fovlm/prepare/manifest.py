"""The manifest of a folder of prepared shards: manifest.json, and rejected.jsonl beside it.

The manifest is rewritten after every shard and lists exactly the complete ones; resuming needs nothing else. Its
content depends neither on time and place nor on the number of workers.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from fovlm.errors import UserError
from fovlm.fileio import digest, locked, write_atomically
from fovlm.paths import versions

MANIFEST, REJECTED = "manifest.json", "rejected.jsonl"
Rejected = list[dict[str, Any]]  # {shard, file, row, cause}, and what it is `about`
NAMED = 5  # rejected rows that are named for each cause
VERSION = 2  # of the manifest; folders of another version are not resumed
PACKAGES = ("av", "pillow", "simplejpeg", "pyarrow", "webdataset")  # other versions may give other bytes


@dataclass
class ShardEntry:
    """One complete shard. `checksum` is its BLAKE2b, as in its index; `rejected` counts rejected rows by cause."""

    name: str
    rows: int
    samples: int
    frames: int
    bytes: int
    checksum: str
    rejected: dict[str, int] = field(default_factory=dict)


@dataclass
class Manifest:
    """The `settings` and `inputs` of a folder, and its shards by name."""

    settings: dict[str, Any]
    inputs: list[dict[str, Any]]
    complete: bool = False
    shards: dict[str, ShardEntry] = field(default_factory=dict)
    strata: dict[str, int] = field(default_factory=dict)  # of an evaluation set: samples by kind and source
    version: int = VERSION

    @property
    def hash(self) -> str:
        """Identifies the content of all shards in order."""
        return digest("\n".join(self.shards[name].checksum for name in self.filled))

    @property
    def filled(self) -> list[str]:
        """The names of the shards with samples, sorted."""
        return sorted(name for name, shard in self.shards.items() if shard.samples)

    @property
    def rejected(self) -> dict[str, int]:
        """Rejected rows by cause, the most frequent first."""
        causes = sum((Counter(shard.rejected) for shard in self.shards.values()), Counter())
        return dict(sorted(causes.items(), key=lambda item: (-item[1], item[0])))

    def total(self, what: str) -> int:
        """The sum of rows, samples, frames or bytes."""
        return sum(getattr(shard, what) for shard in self.shards.values())

    def save(self, folder: Path) -> None:
        """Write manifest.json atomically."""
        content = {
            "version": self.version,
            "complete": self.complete,
            "hash": self.hash,
            **{what: self.total(what) for what in ("rows", "samples", "frames", "bytes")},
            "rejected": self.rejected,
            "strata": self.strata,
            "settings": self.settings,
            "inputs": self.inputs,
            "versions": versions(PACKAGES),
            "shards": [asdict(self.shards[name]) for name in sorted(self.shards)],
        }
        write_atomically(folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, None without one. Raises UserError when it cannot be read."""
    file = folder / MANIFEST
    try:
        found = json.loads(file.read_bytes())
        shards = {shard["name"]: ShardEntry(**shard) for shard in found["shards"]}
        parts = (found["settings"], found["inputs"], found["complete"], shards, found["strata"])
        return Manifest(*parts, version=found.get("version", 1))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it, and all shards are made again") from error


def read_rejected(folder: Path, manifest: Manifest) -> Rejected:
    """The rejected rows of complete shards."""
    file = folder / REJECTED
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []  # a killed run leaves half a last line
    return [row for row in map(json.loads, lines) if row["shard"] in manifest.shards]


def describe_rejected(rejected: Rejected, rows: int) -> list[str]:
    """A line for each cause, the most frequent first: how many of so many rows, and the first ones by name."""
    lines = []
    for cause, count in Counter(row["cause"] for row in rejected).most_common():
        first = islice((row for row in rejected if row["cause"] == cause), NAMED)
        names = [" of ".join(filter(None, (row.get("about"), f"row {row['row']}", row["file"]))) for row in first]
        lines.append(f"{count} of {rows} rows: {cause} ({', '.join(names)}{', ...' if count > NAMED else ''})")
    return lines


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a folder against other commands; it is made if needed. Raises UserError while another command has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False))
        except BlockingIOError:
            raise UserError(f"another command is writing into {folder}: wait for it, or take another folder") from None
        yield


def resume_or_new(folder: Path, settings: dict[str, Any], inputs: list[dict[str, Any]]) -> Manifest:
    """The folder's manifest without shards that are gone, or a new one. Raises UserError when the folder holds shards
    of other settings, of other input, or of an older version."""
    found = load_manifest(folder)
    if found is None:
        return Manifest(settings, inputs)
    if found.version != VERSION:
        raise UserError(f"{folder} holds shards of manifest version {found.version}, not {VERSION}: take another OUT")
    for name in sorted({*settings, *found.settings}):
        if settings.get(name) != found.settings.get(name):
            new, old = settings.get(name), found.settings.get(name)
            raise UserError(f"{folder} holds shards made with {name} {old!r}, not {new!r}: take another folder for OUT")
    if inputs != found.inputs:
        raise UserError(f"{folder} holds shards of an input that has changed since: take another folder for OUT")
    found.shards = {n: s for n, s in found.shards.items() if not s.samples or _exists(folder / n, s.bytes)}
    return found


def _exists(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size
