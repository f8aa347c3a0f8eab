"""MLflow on PostgreSQL: as the tracking URI itself, and behind a real `mlflow server`, with many writers at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from postgres import PostgresServer, running_postgres
from rundirs import MEASURED, finish, measure, start
from stores import plain_environment

from search.budget import Budget
from search.cli import main
from search.rundir import RunDirectory
from search.tracking.best import Question, find_best
from search.tracking.live import Mirrored
from search.tracking.mirror import sync
from search.tracking.settings import TrackingSettings

pytestmark = [
    pytest.mark.system,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy"),  # MLflow's, with SQLAlchemy 2.1
]
SYNC = (
    "import sys; from pathlib import Path; from search.tracking.mirror import *\n"
    "print(sync(RunDirectory(sys.argv[1]), TrackingSettings(uri=sys.argv[2]), Path(sys.argv[1]).parent))"
)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_environment(monkeypatch)


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def database(postgres: PostgresServer) -> str:
    """An empty database, as a tracking URI."""
    return postgres.make_database().replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """An MLflow server on PostgreSQL, and the process group that it works in."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_up(url, process, folder / "log")
            yield url, process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while True:
        try:
            with urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)


def write_runs(folder: Path, names: str) -> list[RunDirectory]:
    runs = [start(folder / name, run_id=name * 32) for name in names]
    for run in runs:
        measure(run, MEASURED)
        finish(run)
    return runs


def check(uri: str, run_ids: set[str], files: list[str]) -> None:
    """The store has one search, two plans and two models for each run, whole."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    home = client.get_experiment_by_name("bitplan/digits").experiment_id
    runs = [run for run in client.search_runs([home]) if run.data.tags["bitplan.run_id"] in run_ids]
    assert sorted(run.data.tags["bitplan.run_id"] for run in runs) == sorted(3 * [*run_ids])
    assert {run.info.status for run in runs} == {"FINISHED"}
    models = [model for model in client.search_logged_models([home]) if model.tags["bitplan.run_id"] in run_ids]
    assert sorted(model.tags["bitplan.run_id"] for model in models) == sorted(2 * [*run_ids])
    assert {str(model.status) for model in models} == {"READY"}
    parent = next(run for run in runs if run.data.tags["role"] == "search")
    points = client.get_metric_history(parent.info.run_id, "trial/quality")
    assert [point.value for point in points] == [0.9, 0.99, 0.95, 0.7]
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} >= set(files)


FILES = ["report.html", "figures", "plan.json", "tables"]


def test_jobs_that_start_at_once_make_the_tables_of_postgresql_once(database: str, tmp_path: Path) -> None:
    """Each with a folder for temporary files of its own, as on machines of their own: MLflow's lock is a file there."""
    runs = write_runs(tmp_path, "ab")
    jobs = []
    for run in runs:
        own = tmp_path / f"tmp-{run.path.name}"
        own.mkdir()
        command = [sys.executable, "-c", SYNC, str(run.path), database]
        environment = os.environ | {"TMPDIR": str(own)}
        jobs.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    said = [job.communicate(timeout=240) for job in jobs]
    assert [(errors, "secret" in output) for output, errors in said] == [("", False)] * 2
    check(database, {name * 32 for name in "ab"}, FILES)


def test_a_server_shows_a_search_and_finds_its_plans(
    server: tuple[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real search, mirrored beside it, and asked for its plan after its folder is gone."""
    url, _ = server
    settings = ["strategy.evaluations=6", "space.weight=[int2,int4,int8]", "space.input=[uint8]"]
    folders = [f"run_root={tmp_path}/runs", f"run_dir={tmp_path}/runs/one"]
    assert main(["search", "task=digits", f"tracking.uri={url}", *settings, *folders]) == 0
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "runs" / "one").rename(tmp_path / "elsewhere")
    out = tmp_path / "plan.json"
    asked = ["best", "--task", "digits", "--hardware", "zen5", "--uri", url, "--budget", "size_ratio=0.14"]
    network = json.loads((tmp_path / "elsewhere" / "plan.json").read_text())["model"]["fingerprint"]
    assert main([*asked, "--model", network, "--winners", "--out", str(out)]) == 0
    assert out.read_text() == (tmp_path / "elsewhere" / "plan.json").read_text()


def test_jobs_write_to_a_server_at_once(server: tuple[str, int], tmp_path: Path) -> None:
    url, _ = server
    runs = write_runs(tmp_path, "de")
    command = [sys.executable, "-c", SYNC]
    jobs = [subprocess.Popen([*command, str(run.path), url], stderr=subprocess.PIPE, text=True) for run in runs]
    assert [job.communicate(timeout=240)[1] for job in jobs] == [""] * 2
    check(url, {name * 32 for name in "de"}, FILES)
    assert find_best(Question("digits", "zen5", Budget(), model="f00d"), url, tmp_path)


def test_a_server_that_hangs_midway_costs_the_search_nothing(
    server: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    url, group = server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = start(tmp_path / "run", run_id="9" * 32)
    run.claim()
    measure(run, MEASURED[:2])
    try:
        with Mirrored(run.path, TrackingSettings(uri=url, interval_s=0.2), tmp_path) as mirrored:
            mirrored.start(run)
            client, until = MlflowClient(url), time.monotonic() + 120
            while not _shows(client, "9" * 32):
                assert time.monotonic() < until
                time.sleep(0.2)
            os.killpg(group, signal.SIGSTOP)  # it takes connections, and never answers
            measure(run, MEASURED[2:])
            finish(run)
            run.release()
        assert f"warning: cannot use MLflow at {url}: timed out" in capfd.readouterr().err
    finally:
        os.killpg(group, signal.SIGCONT)
    monkeypatch.undo()
    plain_environment(monkeypatch)
    sync(run, TrackingSettings(uri=url), tmp_path)
    check(url, {"9" * 32}, FILES)


def _shows(client: Any, run_id: str) -> bool:
    home = client.get_experiment_by_name("bitplan/digits")
    found = client.search_runs([home.experiment_id], f"tags.`bitplan.run_id` = '{run_id}'") if home else []
    return any("best_quality" in run.data.metrics for run in found)
