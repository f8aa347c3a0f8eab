"""A tracking store: where it is, how it is first reached, whose turn it is, and what goes wrong with it."""

from __future__ import annotations

import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from search.errors import BitplanError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

# Seconds and retries granted to a tracking server where the user's environment says nothing: little until it has
# answered once, more afterwards. MLflow's own are 120 seconds and 7 retries.
FIRST_CONTACT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "PGCONNECT_TIMEOUT": "5"}
CONVERSATION = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
MANNERS = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",  # a pool would go on writing to a database deleted meanwhile
}
LOCK_SECONDS = 300.0
KNOCK_SECONDS = 2.0
"""Seconds after which whoever waits for a lock shows that it is alive."""
MIGRATION_LOCK = 0x6269_7470_6C61_6E
"""Key of the advisory lock under which tables are made in PostgreSQL: `bitplan` in ASCII."""


class TrackingError(BitplanError):
    """A tracking store that cannot be reached, or refuses what it is given."""


@dataclass(frozen=True)
class Store:
    """A tracking store that has answered once.

    Attributes:
        client: MLflow's client.
        artifacts: Where a new experiment's artifacts go; None leaves that to the server.
        turn: A block that changes the store; SQLite takes one process at a time.
    """

    client: MlflowClient
    artifacts: str | None
    turn: Callable[[], AbstractContextManager[None]]

    def models(self, homes: list[str], condition: str) -> list[LoggedModel]:
        """Lists all models of some experiments that meet a condition, oldest first."""
        oldest = [{"field_name": "creation_timestamp", "ascending": True}]
        page = self.client.search_logged_models(homes, condition, order_by=oldest)
        found = list(page)
        while page.token:
            page = self.client.search_logged_models(homes, condition, order_by=oldest, page_token=page.token)
            found += page
        return found


@contextmanager
def connected(uri: str, run_root: Path, alive: Callable[[], None] = lambda: None) -> Iterator[Store]:
    """Reaches a store for the length of a block; its tables are made where it is a database without any.

    Meanwhile MLflow is kept off the terminal, and made less patient than it would be, by the process's environment.

    Args:
        uri: MLflow's tracking URI.
        run_root: The folder of `mlartifacts`, where the store is neither a server nor a SQLite database, beside whose
            file it lies.
        alive: Called every now and then while it waits for others to leave the store.

    Raises:
        TrackingError: If the store cannot be reached, or something goes wrong with it during the block.
    """
    try:
        with _quiet(), _defaults(MANNERS):
            from mlflow import MlflowClient

            database = sqlite_file(uri)
            if database:
                _make_database(database, alive)
            with _defaults(FIRST_CONTACT), _migration_lock(uri):
                client = MlflowClient(uri)
                client.search_experiments(max_results=1)
            home = database.parent if database else run_root
            artifacts = None if uri.startswith("http") else (home.resolve() / "mlartifacts").as_uri()
            with _defaults(CONVERSATION):
                yield Store(client, artifacts, lambda: _database_lock(database, alive))
    except BitplanError:
        raise
    except Exception as error:  # MLflow, its stores and its plug-ins each raise errors of their own kinds
        raise TrackingError(
            f"cannot use MLflow at {without_password(uri)}: {_reason(error)}; "
            "see that it works, or set tracking.uri or MLFLOW_TRACKING_URI to another"
        ) from error


def tracking_uri(given: str | None, run_root: Path) -> str:
    """Where to track: the URI given, else `$MLFLOW_TRACKING_URI`, else `mlflow.db` in the run root."""
    return given or os.environ.get("MLFLOW_TRACKING_URI") or _sqlite_uri(run_root.resolve() / "mlflow.db")


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite database; None for another store."""
    path = re.fullmatch(r"sqlite[^:]*:///([^?]+)(\?.*)?", uri)
    return Path(unquote(path[1])) if path else None


def without_password(text: str) -> str:
    """A URI, or a text that names one, without the names and passwords in it."""
    return re.sub(r"://[^/@\s]*@", "://", text)


@contextmanager
def locked(path: Path, alive: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keeps other processes out of a block where the file system has locks; where it has none, nothing does.

    Args:
        path: The lock's file.
        alive: Called every now and then while it waits.

    Raises:
        filelock.Timeout: If another process does not leave.
    """
    from filelock import FileLock, Timeout

    lock, until = FileLock(path, timeout=KNOCK_SECONDS), time.monotonic() + LOCK_SECONDS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire()
            except Timeout:
                if time.monotonic() >= until:
                    raise
                alive()
    except Timeout:
        raise
    except OSError as error:  # ENOLCK and EOPNOTSUPP on network file systems, EROFS or EACCES on copies to read only
        logging.getLogger(__name__).info("goes on without the lock %s: %s", path, error)
    try:
        yield
    finally:
        lock.release()


def _database_lock(database: Path | None, alive: Callable[[], None]) -> AbstractContextManager[None]:
    return locked(database.with_name(f"{database.name}.lock"), alive) if database else nullcontext()


def _make_database(database: Path, alive: Callable[[], None]) -> None:
    if not database.exists():
        with _database_lock(database, alive):
            if not database.exists():
                _create_database(database)


def _create_database(database: Path) -> None:
    """Creates MLflow's tables in a file aside and renames it, as MLflow cannot go on with tables half made.

    MLflow gets there by some hundred migrations; as nothing is lost with a file aside, none of them waits for the disk.
    """
    from mlflow import MlflowClient
    from sqlalchemy import Engine, event

    def hurry(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    with TemporaryDirectory(prefix=".mlflow-", dir=database.parent) as aside:
        event.listen(Engine, "connect", hurry)
        try:
            MlflowClient(_sqlite_uri(Path(aside) / "mlflow.db")).search_experiments(max_results=1)
        finally:
            event.remove(Engine, "connect", hurry)
        os.replace(Path(aside) / "mlflow.db", database)


@contextmanager
def _migration_lock(uri: str) -> Iterator[None]:
    """Lets one process, of all machines, make tables in PostgreSQL; MLflow itself holds back those of one machine."""
    if not uri.startswith("postgresql"):
        yield
        return
    from sqlalchemy import NullPool, create_engine, text

    engine = create_engine(uri, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": MIGRATION_LOCK})
        try:
            yield
        finally:
            connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": MIGRATION_LOCK})


def _sqlite_uri(database: Path) -> str:
    return "sqlite:///" + str(database).replace("%", "%25").replace("?", "%3F")


@contextmanager
def _defaults(values: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for a while, except those that the user has set."""
    missing = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for key in missing:
            del os.environ[key]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what MLflow and its libraries log and warn off the terminal, unless `$MLFLOW_LOGGING_LEVEL` is set."""
    if "MLFLOW_LOGGING_LEVEL" in os.environ:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """Says in one line why: what the operating system said, if it had a say, else what MLflow says."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    system = next((cause for cause in reversed(chain) if isinstance(cause, OSError)), None)
    text = str(error) if system is None else system.strerror or str(system)
    return without_password(re.split(r"\n|\. ", text.strip())[0]) or type(error).__name__
