"""MLflow as a mirror of the run directory: the same runs however often, and after whatever mishap, it is synced."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock
from rundirs import HISTORY, MEASURED, POLICIES, finish, measure, start, write_front

from search.config import TrackingSettings
from search.errors import DataError
from search.portrait import parameters, portray
from search.rundir import RunDirectory
from search.tracking import TrackingError, _create_database, mirror, sync, tracking_uri

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's, with SQLAlchemy 2.1
SETTINGS = TrackingSettings()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("DO_NOT_TRACK", "true")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    database = tmp_path_factory.mktemp("store") / "mlflow.db"
    _create_database(database)
    return database


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    """A run root whose database exists but is empty, which spares MLflow's migrations."""
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    return tmp_path / "runs"


@pytest.fixture
def finished(root: Path) -> RunDirectory:
    run = start(root / "first")
    measure(run, MEASURED)
    finish(run)
    return run


def client_of(root: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(SETTINGS, root))


def runs_of(root: Path, experiment: str = "bitplan/digits") -> list[Any]:
    client = client_of(root)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def shown(root: Path) -> list[Any]:
    """Everything MLflow shows of the active runs, without the ids it draws by chance."""
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


# What MLflow shows


def test_a_finished_run_is_shown_with_its_front(root: Path, finished: RunDirectory) -> None:
    assert sync(finished, SETTINGS, root) == f"sqlite:///{root}/mlflow.db"
    parent, front, winner = shown(root)
    name, above, times, tags, params, history, files = parent
    assert (name, above) == ("digits zen5 solver seed 0", None)
    assert times == ("FINISHED", 1_700_000_000_250, 1_700_000_060_250)
    assert tags["bitplan.run_id"] == "a" * 32
    assert (tags["task"], tags["hardware"], tags["strategy"], tags["seed"]) == ("digits", "zen5", "solver", "0")
    assert (tags["git_commit"], tags["verdict"], tags["digest"], tags["role"]) == ("0123abc", "met", "abc", "search")
    assert params == parameters(finished.info())
    quality = [(step, value) for key, step, _, value in history if key == "quality"]
    assert quality == [(0, 0.9), (1, 0.99), (3, 0.95), (4, 0.7)]
    final = {key: value for key, _, _, value in history if "/" in key}
    qualities = [final[f"winner/{name}"] for name in ("quality", "selection_quality", "float_quality")]
    assert qualities == [0.94, 0.95, 0.96]
    assert (final["winner/drop"], final["winner/drop_low"], final["winner/drop_high"]) == (0.01, 0.0, 0.02)
    assert (final["winner/weight_bytes"], final["search/evaluations"]) == (60.0, 4.0)
    assert "winner/energy_j" not in final
    assert (final["search/hypervolume"], final["search/spent_seconds"]) == (0.6, 7.0)
    assert [(step, value) for key, step, _, value in history if key == "best_quality"] == [
        (1, 0.9),
        (3, 0.95),
        (4, 0.95),
    ]
    volumes = [(step, value) for key, step, _, value in history if key == "hypervolume"]
    assert volumes == [(1, 0.4), (2, 0.4), (3, 0.5), (4, 0.6)]
    records = [
        "front.csv",
        "history.csv",
        "layers.json",
        "plan.json",
        "plan.safetensors",
        "report.html",
        "run.json",
        "trials.jsonl",
    ]
    assert files == [".hydra/config.yaml", "figures/front.png", *records]

    assert (front[0], winner[0]) == ("trial 0, 4.50 bits", "winner, trial 3, 4.50 bits")
    assert front[1] == winner[1] == name
    assert (winner[3]["role"], winner[3]["trial"], winner[3]["digest"]) == ("winner", "3", POLICIES[1].digest)
    assert {key: value for key, _, _, value in winner[5]} == {"quality": 0.95, "average_weight_bits": 4.5}
    assert winner[6] == ["policy.json"]


def test_the_policy_of_a_plan_on_the_front_is_an_artifact(root: Path, finished: RunDirectory) -> None:
    sync(finished, SETTINGS, root)
    [winner] = [run for run in runs_of(root) if run.data.tags["role"] == "winner"]
    path = root / "mlartifacts" / winner.info.run_id / "artifacts" / "policy.json"
    assert json.loads(path.read_text()) == POLICIES[1].to_dict()


def test_syncing_again_changes_nothing(root: Path, finished: RunDirectory) -> None:
    sync(finished, SETTINGS, root)
    once, ids = shown(root), {run.info.run_id for run in runs_of(root)}
    sync(finished, SETTINGS, root)
    assert shown(root) == once
    assert {run.info.run_id for run in runs_of(root)} == ids


def test_a_run_synced_as_it_grows_ends_like_one_synced_once(tmp_path: Path, root: Path, empty_store: Path) -> None:
    run = start(root / "grown")
    sync(run, SETTINGS, root)
    [(_, _, times, _, params, history, files)] = shown(root)
    assert (times[0], times[2], history, files) == ("RUNNING", None, [], ["layers.json", "run.json"])
    assert params["seed"] == "0"
    measure(run, MEASURED[:2])
    sync(run, SETTINGS, root)
    run.update(status="interrupted")
    sync(run, SETTINGS, root)
    assert shown(root)[0][2][0] == "KILLED"
    run.update(status="running")
    sync(run, SETTINGS, root)
    assert shown(root)[0][2][0] == "RUNNING"
    measure(run, MEASURED[2:])
    finish(run)
    sync(run, SETTINGS, root)

    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(empty_store, other / "mlflow.db")
    sync(run, SETTINGS, other)
    assert shown(root) == shown(other)


@pytest.mark.parametrize("survived", [1, 5, 10, 12, 18])
def test_a_sync_cut_short_is_made_good_by_the_next(
    root: Path, finished: RunDirectory, monkeypatch: pytest.MonkeyPatch, survived: int
) -> None:
    from mlflow import MlflowClient

    calls: list[str] = []

    def mortal(method: str) -> Any:
        real = getattr(MlflowClient, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(method)
            if len(calls) > survived:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    for method in ("create_run", "log_batch", "log_artifact", "log_dict", "set_terminated"):
        monkeypatch.setattr(MlflowClient, method, mortal(method))
    with pytest.raises(KeyboardInterrupt):
        sync(finished, SETTINGS, root)
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    sync(finished, SETTINGS, root)
    parent, front, winner = shown(root)
    portrait = portray(finished)
    assert [run[2][0] for run in (parent, front, winner)] == ["FINISHED"] * 3
    assert sorted((p.key, p.step, p.time, p.value) for p in portrait.points) == parent[5]
    assert len(parent[6]) == 10
    assert (front[6], winner[6]) == (["policy.json"], ["policy.json"])


def test_several_measurements_of_one_evaluation_are_all_shown(root: Path) -> None:
    run = start(root / "raced")
    table = pd.DataFrame(HISTORY).assign(evaluations=[1.0, 1.25, 1.5, 1.75])
    for count in (2, 4, 4):
        run.write_table("history.csv", table[:count])
        sync(run, SETTINGS, root)
    [(*_, history, _files)] = shown(root)
    volumes = [(step, value) for key, step, _, value in history if key == "hypervolume"]
    assert volumes == [(1, 0.4), (2, 0.4), (2, 0.5), (2, 0.6)]


def test_a_deleted_database_is_rebuilt(root: Path, finished: RunDirectory) -> None:
    sync(finished, SETTINGS, root)
    before = shown(root)
    (root / "mlflow.db").unlink()
    sync(finished, SETTINGS, root)
    assert shown(root) == before
    with closing(sqlite3.connect(root / "mlflow.db")) as file:  # the file itself, not a connection to the deleted one
        assert file.execute("SELECT count(*) FROM runs").fetchone() == (3,)
    assert not list(root.glob(".mlflow-*"))


def test_a_plan_that_left_the_front_is_deleted_and_the_users_own_runs_stay(root: Path, finished: RunDirectory) -> None:
    sync(finished, SETTINGS, root)
    [parent] = [run for run in runs_of(root) if run.data.tags["role"] == "search"]
    link = {"mlflow.parentRunId": parent.info.run_id}
    client_of(root).create_run(parent.info.experiment_id, run_name="mine", tags=link)
    write_front(finished, [("winner", MEASURED[3])])
    sync(finished, SETTINGS, root)
    assert {run.info.run_name for run in runs_of(root)} == {parent.info.run_name, "winner, trial 3, 4.50 bits", "mine"}


def test_a_run_created_twice_is_left_once(root: Path, finished: RunDirectory) -> None:
    sync(finished, SETTINGS, root)
    [parent] = [run for run in runs_of(root) if run.data.tags["role"] == "search"]
    later = parent.info.start_time + 1
    client_of(root).create_run(parent.info.experiment_id, later, dict(parent.data.tags))
    sync(finished, SETTINGS, root)
    assert [run.info.run_id for run in runs_of(root) if run.data.tags["role"] == "search"] == [parent.info.run_id]


def test_runs_of_one_task_share_an_experiment_unless_it_is_named(root: Path, finished: RunDirectory) -> None:
    other = start(root / "second", run_id="b" * 32)
    sync(finished, SETTINGS, root)
    sync(other, SETTINGS, root)
    sync(other, TrackingSettings(experiment="mine"), root)
    assert len(runs_of(root)) == 4
    assert len(runs_of(root, "mine")) == 1


def test_processes_at_once_share_a_store_that_none_of_them_finds(tmp_path: Path) -> None:
    runs = [start(tmp_path / str(number), run_id=str(number) * 32) for number in range(2)]
    for run in runs:
        measure(run, MEASURED)
        finish(run)
    code = (
        "import sys; from pathlib import Path; from search.tracking import *\n"
        "print(sync(RunDirectory(sys.argv[1]), TrackingSettings(), Path(sys.argv[1]).parent))"
    )
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    workers = [subprocess.Popen([*command, str(run.path)], text=True, **pipes) for run in runs]
    said = [worker.communicate(timeout=120) for worker in workers]
    assert said == [(f"sqlite:///{tmp_path}/mlflow.db\n", "")] * 2
    assert sorted(row[3]["bitplan.run_id"][0] for row in shown(tmp_path)) == ["0"] * 3 + ["1"] * 3


def test_a_process_waits_its_turn_at_the_database(
    root: Path, finished: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.tracking.LOCK_SECONDS", 0.1)
    with FileLock(root / "mlflow.db.lock"):
        warning = mirror(finished, SETTINGS, root)
    assert warning is not None
    assert "mlflow.db.lock' could not be acquired" in warning
    assert client_of(root).get_experiment_by_name("bitplan/digits") is None
    assert mirror(finished, SETTINGS, root) is None


# Where it goes, and manners


def test_the_settings_come_before_the_environment_and_that_before_the_run_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(SETTINGS, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://one")
    assert tracking_uri(SETTINGS, tmp_path) == "http://one"
    assert tracking_uri(TrackingSettings(uri="http://two"), tmp_path) == "http://two"


def test_a_relative_run_root_is_made_absolute(
    root: Path, finished: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    assert sync(finished, SETTINGS, Path("runs")) == f"sqlite:///{root}/mlflow.db"
    assert all(run.info.artifact_uri.startswith(f"file://{root}/mlartifacts/") for run in runs_of(root))
    assert {path.name for path in root.parent.iterdir()} == {"runs"}


def test_odd_characters_in_a_path_lead_to_the_same_place(root: Path) -> None:
    odd = root / "50%25 of #1? no: ü"
    odd.mkdir()
    shutil.copy(root / "mlflow.db", odd / "mlflow.db")
    sync(start(odd / "run"), SETTINGS, odd)
    assert sorted(path.name for path in odd.iterdir()) == ["mlartifacts", "mlflow.db", "mlflow.db.lock", "run"]
    assert len(shown(odd)) == 1


def test_nothing_is_printed_and_nothing_left_behind(
    root: Path, finished: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ)
    sync(finished, SETTINGS, root)
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == before
    assert logging.root.manager.disable == logging.NOTSET


def test_tracking_switched_off_writes_nothing(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    assert mirror(run, TrackingSettings(enabled=False), tmp_path) is None
    assert not (tmp_path / "mlflow.db").exists()


# Trouble


@pytest.fixture
def silent_server() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_a_closed_port_costs_a_warning(root: Path, finished: RunDirectory, closed_port: int) -> None:
    began = time.monotonic()
    warning = mirror(finished, TrackingSettings(uri=f"http://me:secret@127.0.0.1:{closed_port}"), root)
    assert time.monotonic() - began < 10
    assert warning is not None
    assert f"http://127.0.0.1:{closed_port}: Connection refused" in warning
    assert f"bitplan sync {finished.path}" in warning
    assert "\n" not in warning


def test_a_silent_server_costs_seconds(root: Path, finished: RunDirectory, silent_server: int) -> None:
    began = time.monotonic()
    with pytest.raises(TrackingError, match="timed out"):
        sync(finished, TrackingSettings(uri=f"http://127.0.0.1:{silent_server}"), root)
    assert 4 < time.monotonic() - began < 14


def test_the_users_own_patience_is_kept(
    root: Path, finished: RunDirectory, silent_server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    began = time.monotonic()
    with pytest.raises(TrackingError, match="timed out"):
        sync(finished, TrackingSettings(uri=f"http://127.0.0.1:{silent_server}"), root)
    assert time.monotonic() - began < 4


def test_a_store_mlflow_does_not_know_is_named(root: Path, finished: RunDirectory) -> None:
    with pytest.raises(TrackingError, match=r"cannot write to MLflow at ./mlruns: .*maintenance mode"):
        sync(finished, TrackingSettings(uri="./mlruns"), root)


def test_a_damaged_database_costs_a_warning(root: Path, finished: RunDirectory) -> None:
    (root / "mlflow.db").write_bytes(b"no database" * 100)
    warning = mirror(finished, SETTINGS, root)
    assert warning is not None
    assert "file is not a database" in warning


def test_a_deleted_experiment_is_not_written_to(root: Path, finished: RunDirectory) -> None:
    client_of(root).delete_experiment(client_of(root).create_experiment("bitplan/digits"))
    with pytest.raises(TrackingError, match=r"'bitplan/digits' is deleted; restore it, or choose another"):
        sync(finished, SETTINGS, root)


def test_a_folder_without_a_run_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"no run directory: it has no run.json"):
        sync(RunDirectory(root / "nothing"), SETTINGS, root)
    assert "no run.json" in (mirror(RunDirectory(root / "nothing"), SETTINGS, root) or "")
