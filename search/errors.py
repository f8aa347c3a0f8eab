"""What a user can put right: every message says what is wrong, what was given, what is allowed and how to fix it."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class BitplanError(Exception):
    """A problem the user can fix; the command line prints it without a stack trace."""


class ConfigError(BitplanError):
    """A setting that is unknown, of the wrong kind, or contradicts another."""


class DataError(BitplanError):
    """Data or a file that is missing, damaged, or belongs to something else."""


class InfeasibleError(BitplanError):
    """A budget that no policy of the space can meet."""


class UnsupportedError(BitplanError):
    """Something a backend, a device or a model cannot do."""


class FileError(BitplanError):
    """A file or folder that the operating system refuses to write or read, for a reason that the user can remove."""


DAMAGED = (BitplanError, OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a file raises that is cut short, of another version, or not what its name says."""

SPACE = "free some space there"
ELSEWHERE = "choose another folder"
REFUSALS = {
    errno.ENOSPC: ("no space is left on its file system", SPACE),
    errno.EDQUOT: ("the quota of its file system is used up", SPACE),
    errno.EFBIG: ("it grew larger than a file may be", f"raise the limit (ulimit -f), or {ELSEWHERE}"),
    errno.EROFS: ("its file system is read-only", f"mount it writable, or {ELSEWHERE}"),
    errno.EACCES: ("permission is missing", f"have it granted, or {ELSEWHERE}"),
    errno.EPERM: ("the operation is not permitted", f"have it permitted, or {ELSEWHERE}"),
    errno.ENOENT: ("it, or a folder that it is in, does not exist", "see whether it was moved or deleted"),
    errno.ENOTDIR: ("a part of its path is a file, not a folder", f"move that file away, or {ELSEWHERE}"),
    errno.EEXIST: ("a file is in the way", f"move that file away, or {ELSEWHERE}"),
    errno.EISDIR: ("a folder is in its place", f"move that folder away, or {ELSEWHERE}"),
    errno.ENAMETOOLONG: ("its name is too long", "choose a shorter one"),
    errno.ELOOP: ("its symbolic links lead in a circle", "put them right"),
    errno.EIO: ("the device failed", "see whether it is broken (dmesg)"),
    errno.ESTALE: ("the file server no longer knows it", "mount its file system again"),
    errno.ETIMEDOUT: ("the file server does not answer", "see whether it is up"),
    errno.EMFILE: ("this process has too many files open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("this machine has too many files open", "end other programs"),
}
"""Why the operating system refuses files, by error number, and what helps."""


def file_error(error: OSError, path: str | Path | None = None) -> FileError | None:
    """What an error of the operating system means for a file; None where it is not about one.

    Args:
        error: The error.
        path: The file at hand; the operating system does not name it where writing failed.
    """
    named = path or error.filename
    if error.errno not in REFUSALS or named is None:
        return None
    reason, remedy = REFUSALS[error.errno]
    return FileError(f"{named} cannot be used: {reason}; {remedy}")


@contextmanager
def file_errors(path: str | Path | None = None) -> Iterator[None]:
    """Turns what the operating system refuses inside the block into a `FileError`; see `file_error`."""
    try:
        yield
    except OSError as error:
        explained = file_error(error, path)
        if explained is None:
            raise
        raise explained from error


def one_line(error: BaseException) -> str:
    """What an error says, on one line; a file that cannot be used is named with the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip())


def closest(name: str, known: Iterable[str]) -> str:
    """Returns ` (did you mean 'x'?)` for the known name nearest to `name`, or nothing where none is near."""
    by_case = {candidate.lower(): candidate for candidate in known}
    begun = [candidate for candidate in by_case if len(name) > 2 and candidate.startswith(name.lower())]
    found = begun or difflib.get_close_matches(name.lower(), by_case, n=1, cutoff=0.5)
    return f" (did you mean {by_case[found[0]]!r}?)" if found else ""
