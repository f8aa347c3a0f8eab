"""The mirror of a run directory in MLflow: one run per search, and a child run for every plan on the front.

The run directory is the truth. What MLflow is to show is put together from it (`search.portrait`), then compared with
what the store has, and only what is missing is written: syncing twice, after a crash, or into an empty store all end in
the same runs.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from search.config import TrackingSettings
from search.errors import BitplanError
from search.portrait import Portrait, portray
from search.rundir import RunDirectory

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FILES = (
    *("run.json", "layers.json", "trials.jsonl", "front.csv", "history.csv"),
    *("plan.json", "plan.safetensors", "report.html"),
)
FOLDERS = ("figures", ".hydra")

# Seconds and retries granted to a tracking server where the user's environment says nothing: little until it has
# answered once, more afterwards. MLflow's own are 120 seconds and 7 retries.
FIRST_CONTACT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
CONVERSATION = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
MANNERS = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",  # a pool would go on writing to a database deleted meanwhile
}
LOCK_SECONDS = 300.0


class TrackingError(BitplanError):
    """A tracking store that cannot be reached, or refuses what it is given."""


def mirror(run: RunDirectory, settings: TrackingSettings, run_root: Path) -> str | None:
    """Brings MLflow up to date with a run, if the settings ask for it; returns a warning where that fails.

    A tracking store in trouble costs this warning and a few seconds, never the search.
    """
    if not settings.enabled:
        return None
    try:
        sync(run, settings, run_root)
    except BitplanError as error:
        return f"{error}; nothing of the run is lost: `bitplan sync {run.path}` shows it in MLflow later"
    return None


def sync(run: RunDirectory, settings: TrackingSettings, run_root: Path) -> str:
    """Makes MLflow show a run as its directory has it now, whatever MLflow knew of it before.

    Args:
        run: The run.
        settings: Where to; `enabled` is not asked.
        run_root: The folder of `mlflow.db` and `mlartifacts`, which are used unless another store is configured.

    Returns:
        The tracking URI, without any password.

    Raises:
        DataError: If there is no run in the directory, or a file of it is damaged.
        TrackingError: If the store cannot be reached or refuses.
    """
    run = RunDirectory.existing(run.path)
    portrait = portray(run)
    uri = tracking_uri(settings, run_root)
    experiment = settings.experiment or f"bitplan/{portrait.tags['task']}"
    try:
        with _quiet(), _defaults(MANNERS):
            _write(portrait, run, uri, experiment, run_root.resolve() / "mlartifacts")
    except Exception as error:  # MLflow, its stores and its plug-ins each raise errors of their own kinds
        raise TrackingError(
            f"cannot write to MLflow at {_without_password(uri)}: {_reason(error)}; "
            "see that it works, or set tracking.uri or MLFLOW_TRACKING_URI to another"
        ) from error
    return _without_password(uri)


def tracking_uri(settings: TrackingSettings, run_root: Path) -> str:
    """Where to track: the settings' URI, else `$MLFLOW_TRACKING_URI`, else `mlflow.db` in the run root."""
    given = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return given or _sqlite_uri(run_root.resolve() / "mlflow.db")


def _write(portrait: Portrait, run: RunDirectory, uri: str, experiment: str, artifacts: Path) -> None:
    """Writes what the store lacks; the status comes last, so that a run cut short is seen to be incomplete."""
    from filelock import FileLock
    from mlflow import MlflowClient

    database = _database(uri)
    lock = database.with_name(f"{database.name}.lock") if database else run.file(".mlflow.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock, timeout=LOCK_SECONDS):
        if database and not database.exists():
            _create_database(database)
        with _defaults(FIRST_CONTACT):
            client = MlflowClient(uri)
            home = _experiment(client, experiment, None if uri.startswith("http") else artifacts.as_uri())
        with _defaults(CONVERSATION):
            own = {"bitplan.run_id": portrait.tags["bitplan.run_id"]}
            found = _runs(client, home, own | {"role": "search"})
            parent = found[0] if found else _create(client, home, portrait)
            _log(client, parent, portrait)
            for file in filter(Path.is_file, map(run.file, FILES)):
                client.log_artifact(parent.info.run_id, str(file))
            for folder in filter(Path.is_dir, map(run.file, FOLDERS)):
                client.log_artifacts(parent.info.run_id, str(folder), folder.name)
            _write_children(client, home, own | {"mlflow.parentRunId": parent.info.run_id}, portrait.children)
            _close(client, parent, portrait)
            for double in found[1:]:  # left by a server that created a run and did not live to say so
                client.delete_run(double.info.run_id)


def _write_children(client: MlflowClient, home: str, link: Mapping[str, str], children: Iterable[Portrait]) -> None:
    """Brings the child runs with the tags `link` up to date, and deletes those whose plan is not on the front."""
    found = _runs(client, home, link)
    by_trial = {run.data.tags["trial"]: run for run in found}
    kept = set()
    for child in children:
        run = by_trial.get(child.tags["trial"]) or _create(client, home, child, link)
        kept.add(run.info.run_id)
        _log(client, run, child)
        if run.info.status != child.status:
            client.log_dict(run.info.run_id, dict(child.policy), "policy.json")
            _close(client, run, child)
    for run in found:
        if run.info.run_id not in kept:
            client.delete_run(run.info.run_id)


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Returns the id of an experiment; where another machine creates it at the same time, that one's."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifacts))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(f"its experiment {name!r} is deleted; restore it, or choose another tracking.experiment")
    return str(found.experiment_id)


def _runs(client: MlflowClient, home: str, tags: Mapping[str, str]) -> list[Run]:
    """Lists the runs with these tags, oldest first."""
    wanted = " AND ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return list(client.search_runs([home], wanted, order_by=["attributes.start_time ASC"], max_results=10_000))


def _create(client: MlflowClient, home: str, portrait: Portrait, link: Mapping[str, str] | None = None) -> Run:
    return client.create_run(home, portrait.started, {**portrait.tags, **(link or {})}, portrait.name)


def _log(client: MlflowClient, run: Run, portrait: Portrait) -> None:
    """Writes the points and parameters that are missing and the tags that differ; MLflow's client cuts the batches."""
    from mlflow.entities import Metric, Param, RunTag

    run_id, data = run.info.run_id, run.data
    series = {key for key, count in Counter(point.key for point in portrait.points).items() if count > 1}
    there = {
        (key, old.step, old.timestamp)
        for key in series & {*data.metrics}
        for old in client.get_metric_history(run_id, key)
    }
    metrics = [
        Metric(point.key, point.value, point.time, point.step)
        for point in portrait.points
        if (
            (point.key, point.step, point.time) not in there
            if point.key in series
            else data.metrics.get(point.key) != point.value
        )
    ]
    parameters = [Param(key, value) for key, value in portrait.parameters.items() if key not in data.params]
    tags = [RunTag(key, value) for key, value in portrait.tags.items() if data.tags.get(key) != value]
    client.log_batch(run_id, metrics, parameters, tags)


def _close(client: MlflowClient, run: Run, portrait: Portrait) -> None:
    if portrait.ended is None:
        client.update_run(run.info.run_id, portrait.status)
    else:
        client.set_terminated(run.info.run_id, portrait.status, portrait.ended)


def _sqlite_uri(database: Path) -> str:
    return "sqlite:///" + str(database).replace("%", "%25").replace("?", "%3F")


def _database(uri: str) -> Path | None:
    """The file of a SQLite database; None for another store."""
    path = re.fullmatch(r"sqlite[^:]*:///([^?]+)(\?.*)?", uri)
    return Path(unquote(path[1])) if path else None


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
    return _without_password(re.split(r"\n|\. ", text.strip())[0]) or type(error).__name__


def _without_password(text: str) -> str:
    return re.sub(r"://[^/@\s]*@", "://", text)
