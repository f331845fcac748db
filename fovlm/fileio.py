"""Files and folders that are complete or absent, their checksums, and locks between processes.

A file is written as `.NAME.RANDOM.unfinished` beside its place and renamed at the end: readers never see half of it,
and several processes may write the same file.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fovlm.errors import UserError

UNFINISHED = ".unfinished"
BLOCK = 1 << 22  # bytes read at once


@contextmanager
def open_atomically(path: Path, durable: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name `path` when the block ends; an exception removes it.

    Its folder is made if needed. `durable` flushes it to disk before the rename. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(handle)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def write_atomically(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write a whole file or nothing; text as UTF-8. See `open_atomically`."""
    with open_atomically(path, durable) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def staged_dir(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends; an exception removes it.

    `out` must be absent or empty by then. Raises UserError where no folder can be made, and for a full disk.
    """
    try:
        out.resolve().parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.resolve().parent, prefix=f".{out.name}.", suffix=UNFINISHED))
    except OSError as error:
        raise UserError(f"{out}: cannot make this folder ({error.strerror}); give another one") from error
    try:
        yield staging
        staging.chmod(0o755)
        if out.is_dir():
            out.rmdir()
        staging.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{out}: the disk is full, nothing was written: free some space or give another") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_occupied(out: Path) -> None:
    """Raise UserError when `out` is there and not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and not empty: remove it, or give another folder")


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes left of `path`, whose name may be a glob. Only where no other process writes it."""
    for left in path.parent.glob(f".{path.name}.*{UNFINISHED}"):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a power cut cannot undo what was reported as written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(content: str | bytes, size: int = 16) -> str:
    """BLAKE2b of bytes, or of text as UTF-8, in 2 * `size` hexadecimal digits."""
    return hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=size).hexdigest()


def digest_file(path: Path, size: int = 16) -> str:
    """BLAKE2b of a file's content, in 2 * `size` hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=size)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            hashed.update(block)
    return hashed.hexdigest()


def sealed(content: str) -> bytes:
    """One line of text behind its own digest, for `unsealed`."""
    return f"{digest(content)} {content}\n".encode()


def unsealed(line: bytes) -> str:
    """The text of a sealed line. Raises ValueError where any byte of it has changed."""
    stored, _, content = line.decode().partition(" ")
    if not content.endswith("\n") or digest(content[:-1]) != stored:
        raise ValueError("not the content that its digest says")
    return content[:-1]


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold a lock on a folder, or on a file that is made for it. It ends with the block, or with the process. Raises
    BlockingIOError when another process has it and `wait` is false. A file system without locks has no effect."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        os.close(handle)


def try_lock(path: Path, shared: bool = False, make: bool = False) -> BinaryIO | None:
    """The file at `path`, open and locked until it is closed; None where it is not there, or locked otherwise.

    `shared` opens it to read, together with others; `make` makes it where it is missing.
    """
    try:
        handle = os.open(path, os.O_RDONLY if shared else os.O_RDWR | (os.O_CREAT if make else 0), 0o644)
    except FileNotFoundError:
        return None
    file: BinaryIO = os.fdopen(handle, "rb") if shared else os.fdopen(handle, "r+b", buffering=0)
    try:
        with suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return None
        if os.path.samestat(os.fstat(handle), os.stat(path)):  # nobody has renamed or removed it meanwhile
            return file
    except FileNotFoundError:
        pass
    file.close()
    return None
