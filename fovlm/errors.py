"""User-facing errors (what is wrong, where, how to fix it), errors of samples, and process exit codes."""

import difflib
import errno
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

EXIT_FAILED = 1  # a fault that is not the user's
EXIT_USER_ERROR = 2  # something to fix first; nothing was started, or nothing was lost
EXIT_STOPPED = 75  # stopped by a signal, nothing lost: the same command resumes (EX_TEMPFAIL of sysexits.h)

# System errors that a path from the user can cause; any other is a bug.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
PATH_ERRORS = {errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR}
PATH_ERRORS |= DISK_ERRORS


class UserError(Exception):
    """A mistake in a command, a file or the environment, in one line. Commands print it and exit with status 2."""


class SampleError(ValueError):
    """One sample cannot be used; training continues with a substitute.

    The message is the cause, the same for every sample that is broken in this way: causes are counted. `about` names
    what it is about, such as a file.
    """

    def __init__(self, cause: str, about: str = ""):
        super().__init__(cause)
        self.about = about


def did_you_mean(word: str, words: Iterable[object]) -> str:
    """` (did you mean 'x'?)` with the closest of `words`; empty when none is close."""
    candidates = [str(w) for w in words]
    lower = {w.lower(): w for w in candidates}
    close = difflib.get_close_matches(str(word).lower(), list(lower), n=1, cutoff=0.5)
    return f" (did you mean '{lower[close[0]]}'?)" if close else ""


def did_you_mean_path(path: Path) -> str:
    """The same for a path that does not exist, or `: no folder x` and the same for the first folder that is missing."""
    missing = next(p for p in (path, *path.parents) if p.parent.is_dir())
    where = f": no folder {missing}" if missing != path else ""
    others = {p.name for p in missing.parent.iterdir()} - {missing.name}  # it may be a file, or a link to nothing
    return where + did_you_mean(missing.name, sorted(others))


@contextmanager
def needs(what: str, *packages: str) -> Iterator[None]:
    """Turn an import within that fails into a UserError: `what` needs these packages."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what} needs more packages: pip install {shlex.join(packages)} ({error})") from error


def few(names: Sequence[str], most: int = 3) -> str:
    """`a, b, c and 4 more`: at most `most` of the names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def say(text: str) -> None:
    """Print a line on stderr; a terminal that is gone is no error."""
    with suppress(OSError):
        print(f"fovlm: {text}", file=sys.stderr, flush=True)


def format_error(error: UserError | OSError) -> str:
    """The line to print for an error; empty when it is a bug and needs its traceback."""
    if isinstance(error, UserError):
        return str(error)
    if error.filename:
        return f"{str(error.filename)[:100]}: {error.strerror}" if error.errno in PATH_ERRORS else ""
    return str(error.strerror) if error.errno in DISK_ERRORS else ""
