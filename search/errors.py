"""What a user can put right: every message says what is wrong, what was given, what is allowed and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
