"""Tracking stores for tests: an empty database that is made once, and everything that MLflow shows of one."""

from __future__ import annotations

import atexit
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from search.tracking.store import _create_database, tracking_uri


def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves nothing of the environment's own settings of MLflow, and keeps it from telling on us."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("DO_NOT_TRACK", "true")


@cache
def _empty_database() -> Path:
    folder = Path(mkdtemp(prefix="store-"))
    atexit.register(shutil.rmtree, folder)
    database = folder / "mlflow.db"
    _create_database(database)
    return database


def make_root(folder: Path) -> Path:
    """A run root whose database exists but is empty, which spares MLflow's migrations."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_empty_database(), folder / "mlflow.db")
    return folder


def client_of(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(None, root))


def runs_of(root: Path, experiment: str = "bitplan/digits") -> list[Any]:
    client = client_of(root)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def models_of(root: Path, experiment: str = "bitplan/digits") -> list[Any]:
    client = client_of(root)
    return list(client.search_logged_models([client.get_experiment_by_name(experiment).experiment_id]))


def shown(root: Path) -> list[Any]:
    """Everything MLflow shows of the active runs and models, without the ids it draws by chance."""
    client, runs = client_of(root), runs_of(root)
    names = {run.info.run_id: run.info.run_name for run in runs}

    def files(run_id: str, folder: str | None = None) -> Iterator[str]:
        for item in client.list_artifacts(run_id, folder):
            yield from files(run_id, item.path) if item.is_dir else [item.path]

    def describe(run: Any) -> Any:
        tags = dict(run.data.tags)
        parent = names[tags.pop("mlflow.parentRunId")] if "mlflow.parentRunId" in tags else None
        history = [
            (point.key, point.step, point.timestamp, point.value)
            for key in run.data.metrics
            for point in client.get_metric_history(run.info.run_id, key)
        ]
        times = (run.info.status, run.info.start_time, run.info.end_time)
        return (
            names[run.info.run_id],
            parent,
            times,
            tags,
            run.data.params,
            sorted(history),
            sorted(files(run.info.run_id)),
        )

    return sorted(map(describe, runs), key=lambda row: row[0])


def models_shown(root: Path) -> list[Any]:
    """Every model: its name, its run, the runs that have it as output, its tags, its metrics and its files."""
    client, runs = client_of(root), runs_of(root)
    names = {run.info.run_id: run.info.run_name for run in runs}

    def describe(model: Any) -> Any:
        outputs = [
            names[run.info.run_id]
            for run in runs
            for output in client.get_run(run.info.run_id).outputs.model_outputs
            if output.model_id == model.model_id
        ]
        values = sorted((metric.key, metric.timestamp, metric.value) for metric in model.metrics)
        files = sorted(path.name for path in Path(model.artifact_location.removeprefix("file://")).iterdir())
        return model.name, str(model.status), names[model.source_run_id], sorted(outputs), model.tags, values, files

    return sorted(map(describe, models_of(root)), key=lambda row: row[0])
