"""Optuna's storages: how one is named, checked and opened, and what is said when it cannot be used."""

from __future__ import annotations

import os
import random
import re
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from search.errors import ConfigError, DataError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.storages.journal import JournalFileSymlinkLock

T = TypeVar("T")

LOCKED_S = 60.0  # how long to wait for others that write to the same SQLite file
CONNECTING_S = 10  # how long a PostgreSQL server may take to answer at all
UNANSWERED_MS = 30_000  # how long it may take to acknowledge what was sent, before the network is taken for broken
CHUNK = 4096  # bytes of a journal that are read at once to find its last whole line
RIVALS = 8  # attempts to set up an empty database that others set up at the same moment


def hidden(text: str) -> str:
    """A text without the passwords of the URLs in it."""
    return re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", re.sub(r"(?i)((?:password|passwd|pwd)=)[^&\s]*", r"\1***", text))


def check_storage(storage: str, setting: str) -> None:
    """Checks what can be checked of a storage without opening it.

    Args:
        storage: Path of a journal file, or URL of a database.
        setting: What names it, such as `study`, for messages.

    Raises:
        ConfigError: If it is neither a URL nor a path that a journal could have.
    """
    if not storage or (":" in storage and "://" not in storage and not Path(storage).parent.is_dir()):
        raise ConfigError(
            f"{setting}={hidden(storage)} is neither a path nor a URL; give the path of a journal file such as "
            "runs/optuna.log, or a URL such as postgresql://user@host/name"
        )
    if "://" not in storage and Path(storage).is_dir():
        raise ConfigError(f"{setting}={storage} is a folder; name a journal file in it, such as {storage}/optuna.log")


@contextmanager
def explained(storage: str, setting: str) -> Iterator[None]:
    """Turns what databases and files raise into a message without a password.

    Raises:
        DataError: If the storage cannot be used.
    """
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except JSONDecodeError as error:
        raise DataError(
            f"{setting}={hidden(storage)} is no journal file, or has a damaged line ({error}); name another, or move "
            "it away and repeat the command: what was measured is kept with the evaluations"
        ) from None
    except (OptunaError, SQLAlchemyError, ImportError, OSError, RuntimeError, ValueError) as error:
        reason = hidden(" ".join(str(error.__cause__ or error).split()))
        raise DataError(
            f"{setting}={hidden(storage)} cannot be used: {reason}; it must be the path of a journal "
            "file, or a URL such as postgresql://user@host/name"
        ) from None  # what it hides may hold the password


def is_outage(error: BaseException) -> bool:
    """Whether an error may pass by itself: a server that is gone, starts, or has too much to do."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, PendingRollbackError

    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    is_broken = isinstance(cause, DBAPIError) and cause.connection_invalidated
    # Optuna may go on with a session whose connection broke; the next question gets a session of its own
    return is_broken or isinstance(cause, (OperationalError, InterfaceError, PendingRollbackError))


def open_storage(storage: str) -> BaseStorage:
    """Opens a storage, making its file or its tables where there are none.

    Args:
        storage: Path of a journal file, or URL of a database; `postgresql://` is reached with psycopg 3.
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" not in storage:
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        return _quietly(lambda: JournalStorage(JournalFileBackend(storage, mending_lock(Path(storage)))))
    url, arguments = _connection(storage)
    opened = _among_rivals(lambda: _quietly(lambda: RDBStorage(url, engine_kwargs={"connect_args": arguments})))
    weakref.finalize(opened, opened.engine.dispose)  # or its connections stay open for as long as the process
    return opened


def mending_lock(journal: Path) -> JournalFileSymlinkLock:
    """The lock under which a journal is written, which takes away a line that a process died in the middle of.

    Others would go on in the middle of it, and from then on nobody could read the journal.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    class MendingLock(JournalFileSymlinkLock):  # type: ignore[misc]
        def acquire(self) -> bool:
            acquired = bool(super().acquire())
            _cut_torn_line(journal)
            return acquired

    return MendingLock(str(journal))


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position:
            start = max(position - CHUNK, 0)
            file.seek(start)
            whole = file.read(position - start).rfind(b"\n") + 1
            if whole:
                position = start + whole
                break
            position = start
        if position < end:
            file.truncate(position)


def _connection(storage: str) -> tuple[str, dict[str, Any]]:
    """The URL with its driver, and what the driver is told."""
    scheme, _, rest = storage.partition("://")
    if scheme == "sqlite":
        from sqlalchemy.engine import make_url

        file = make_url(storage).database
        if file and file != ":memory:":
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        return storage, {"timeout": LOCKED_S}
    if scheme in ("postgresql", "postgres", "postgresql+psycopg"):
        patience = {"connect_timeout": CONNECTING_S, "tcp_user_timeout": UNANSWERED_MS}
        return f"postgresql+psycopg://{rest}", patience
    return storage, {}


def _quietly(make: Callable[[], T]) -> T:
    """Opens a storage without Optuna's notice that journals may still change: that is our choice, not the user's."""
    import warnings

    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return make()


def _among_rivals(make: Callable[[], T]) -> T:
    """Tries again where two make the same tables at once, and one is refused."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    for attempt in range(RIVALS):
        try:
            return make()
        except (IntegrityError, ProgrammingError, OperationalError, StorageInternalError) as error:
            cause = error.__cause__ if isinstance(error, StorageInternalError) else error
            clashes = isinstance(cause, (IntegrityError, ProgrammingError)) or "already exists" in str(cause)
            if not clashes or attempt == RIVALS - 1:
                raise
            time.sleep(random.uniform(0.05, 0.3))
    raise AssertionError("the last attempt returns or raises")
