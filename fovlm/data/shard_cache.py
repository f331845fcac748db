"""Remote shards in a folder of limited size, which the processes of a node and several runs share.

A shard is fetched whole into `.part`, which a killed process leaves for the next to go on with, checked against the
checksum of its index, and renamed. One process fetches, the others wait for it. Who reads a shard, or will need it
next (`fetch_ahead.py`), holds a shared lock on its file; what nobody holds is removed, the least recently used first,
to make room.
"""

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fovlm.config.schema import DataSettings
from fovlm.data.remote_fs import RemoteFile, read_range
from fovlm.errors import DISK_ERRORS, UserError
from fovlm.fileio import digest, digest_file, locked, try_lock
from fovlm.paths import cache_root

CHUNK = 1 << 24  # bytes of one request
POLL = 0.1  # seconds between two looks at what another process fetches
PART = ".part"


class Stat(NamedTuple):
    """What of a shard's `os.stat_result` identifies its content; here the time stands for the version."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True)
class ShardCache:
    """A folder and how many bytes of shards it may hold; those in use may exceed it."""

    folder: Path
    limit: int

    def make_room(self) -> bool:
        """Remove what nobody holds until the limit is kept; whether it is. Of what is being fetched all bytes count."""
        with locked(self.folder):
            files = []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):  # renamed meanwhile
                    files += [(entry.stat().st_mtime, _size(entry.name), entry.path)] if entry.is_file() else []
            total = sum(size for _, size, _ in files)
            for _, size, path in sorted(files):
                if total > self.limit and (file := try_lock(Path(path))):
                    with file:
                        os.unlink(path)
                    total -= size
        return total <= self.limit


def shard_cache(data: DataSettings) -> ShardCache:
    """The cache that the settings of a run name."""
    return ShardCache(Path(data.cache_dir) if data.cache_dir else cache_root() / "shards", int(data.cache_gb * 1e9))


@dataclass(frozen=True)
class RemoteShard:
    """A shard behind a URL, with as much of a Path as reading needs: name, stat, open."""

    file: RemoteFile
    cache: ShardCache

    def __str__(self) -> str:
        return self.file.url

    @property
    def name(self) -> str:
        """The file's name at its server."""
        return self.file.name

    @property
    def path(self) -> Path:
        """Its place in the cache, whether it is there or not."""
        return self.cache.folder / f"{digest(self.file.url + self.file.version, 8)}-{self.file.size}-{self.name}"

    def resolve(self) -> "RemoteShard":
        """Itself."""
        return self

    def stat(self) -> Stat:
        """What identifies its content at the server."""
        return Stat(self.file.size, int(digest(self.file.version, 7), 16))

    def known_as(self, checksum: str) -> "RemoteShard":
        """The same shard with the checksum in its index."""
        return replace(self, file=replace(self.file, checksum=checksum))

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file, fetched if it is not in the cache. It stays there until it is closed. Raises UserError."""
        while (file := self.hold()) is None:
            if not self.fetch(must=True):
                time.sleep(POLL)
        return file

    def hold(self) -> BinaryIO | None:
        """The file, if it is in the cache; it stays there until it is closed."""
        if file := try_lock(self.path, shared=True):
            with suppress(PermissionError):  # of another user
                os.utime(file.fileno())  # used now
        return file

    def fetch(self, on_progress: Callable[[int], None] = lambda done: None, must: bool = False) -> bool:
        """Fetch the file. False where another process is fetching it, or, unless it `must` be, there is no room. Raises
        UserError for what cannot be fetched, is not what its index says, or a full disk."""
        part = self.path.with_name(self.path.name + PART)
        try:
            self.cache.folder.mkdir(parents=True, exist_ok=True)
            if (file := try_lock(part, make=True)) is None:
                return False
            with file:
                if self.path.exists():  # another process was faster
                    part.unlink()
                elif not self.cache.make_room() and not must:
                    part.unlink()
                    return False
                else:
                    self._download(file, part, on_progress)
                    os.replace(part, self.path)
        except OSError as error:
            if error.errno not in DISK_ERRORS | {errno.EACCES, errno.EPERM}:
                raise
            raise UserError(
                f"{self.file.url} cannot be written to {self.cache.folder} ({error.strerror}): free some space, lower "
                f"data.cache_gb, or set data.cache_dir to another folder; then the same command resumes"
            ) from error
        return True

    def _download(self, file: BinaryIO, part: Path, on_progress: Callable[[int], None]) -> None:
        for _ in range(2):  # bytes may be damaged on the way
            done = file.seek(0, os.SEEK_END)
            while done < self.file.size:
                data = memoryview(read_range(self.file, done, min(done + CHUNK, self.file.size)))
                data = data[done:] if len(data) == self.file.size else data  # a server without ranges
                done += len(data)
                while data:
                    data = data[file.write(data) :]
                on_progress(done)
            if self.file.checksum in ("", digest_file(part)):
                return
            file.truncate(0)
        part.unlink()
        raise UserError(
            f"{self.file.url} is not what its index or manifest says (twice {self.file.size} bytes with another "
            "checksum): it has changed at its server, or the server is damaged; start again to index what is there now"
        )


Shard = Path | RemoteShard


def _size(name: str) -> int:
    """The size in the name of a file of the cache."""
    number = name.partition("-")[2].partition("-")[0]
    return int(number) if number.isdigit() else 0
