"""What a person did wrong, said in one line: what is wrong, where, and what to do. And the statuses a run ends with."""

import difflib
import errno
from collections.abc import Iterable

EXIT_USER_ERROR = 2  # something to mend first; nothing was started, or nothing was lost
EXIT_STOPPED = 75  # stopped by a signal after saving: the same command goes on from there (EX_TEMPFAIL of sysexits.h)

# What the system says of a path that somebody gave: such an error is theirs to mend, any other is a bug.
OF_A_PATH = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EROFS, errno.ENOSPC}


class UserError(Exception):
    """A mistake in a command, a file or the surroundings. Commands print it without a traceback and exit with 2."""


class SampleError(ValueError):
    """One sample cannot be used; training continues with a substitute.

    The message is the cause, the same for every sample that is broken in this way: causes are counted.
    """


def did_you_mean(word: str, words: Iterable[object]) -> str:
    """` (did you mean 'x'?)` with the closest of `words`, or an empty string when none is close."""
    candidates = [str(w) for w in words]
    lower = {w.lower(): w for w in candidates}
    close = difflib.get_close_matches(str(word).lower(), list(lower), n=1, cutoff=0.5)
    return f" (did you mean '{lower[close[0]]}'?)" if close else ""


def format_error(error: UserError | OSError) -> str:
    """The line to tell of an error, or an empty string when it is a bug and wants its traceback."""
    if isinstance(error, UserError):
        return str(error)
    return f"{str(error.filename)[:100]}: {error.strerror}" if error.filename and error.errno in OF_A_PATH else ""
