"""MLflow as a mirror of the run directory: the same runs however often, and after whatever mishap, it is synced."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock
from rundirs import HISTORY, MEASURED, POLICIES, finish, measure, start, write_front
from stores import client_of, make_root, models_of, models_shown, plain_environment, runs_of, shown

from search.cli import main
from search.errors import DataError
from search.events import EventLog
from search.portrait import parameters, portray
from search.rundir import RunDirectory
from search.tracking.mirror import sync
from search.tracking.settings import TrackingSettings
from search.tracking.store import FIRST_CONTACT, TrackingError, tracking_uri

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's, with SQLAlchemy 2.1
SETTINGS = TrackingSettings()
NAME = "digits zen5 solver size_ratio=0.14 seed 0"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_environment(monkeypatch)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path / "runs")


@pytest.fixture
def finished(root: Path) -> RunDirectory:
    run = start(root / "first")
    measure(run, MEASURED)
    finish(run)
    return run


# What MLflow shows


def test_a_finished_run_is_shown_with_its_front(root: Path, finished: RunDirectory) -> None:
    assert sync(finished, SETTINGS, root) == f"sqlite:///{root}/mlflow.db"
    parent, front, winner = shown(root)
    name, above, times, tags, params, history, files = parent
    assert (name, above) == (NAME, None)
    assert times == ("FINISHED", 1_700_000_000_250, 1_700_000_060_250)
    assert tags["bitplan.run_id"] == "a" * 32
    assert (tags["task"], tags["hardware"], tags["strategy"], tags["seed"]) == ("digits", "zen5", "solver", "0")
    assert (tags["git_commit"], tags["verdict"], tags["digest"], tags["role"]) == ("0123abc", "met", "abc", "search")
    assert (tags["budget"], tags["metric"]) == ("size_ratio=0.14", "accuracy")
    assert params == parameters(finished.info())
    quality = [(step, value) for key, step, _, value in history if key == "trial/quality"]
    assert quality == [(0, 0.9), (1, 0.99), (3, 0.95), (4, 0.7)]
    final = {key: value for key, _, _, value in history}
    assert [final[name] for name in ("quality", "selection_quality", "float_quality")] == [0.94, 0.95, 0.96]
    assert [final[name] for name in ("drop", "drop_low", "drop_high", "certain_drop")] == [0.01, 0.0, 0.02, 0.02]
    assert (final["weight_bytes"], final["size_ratio"], final["evaluations"]) == (60.0, 60 / 480, 4.0)
    assert "energy_j" not in final
    assert (final["hypervolume"], final["seconds"], final["wall_seconds"]) == (0.6, 7.0, 60.0)
    assert [(step, value) for key, step, _, value in history if key == "best_quality"] == [
        (1, 0.9),
        (3, 0.95),
        (4, 0.95),
    ]
    volumes = [(step, value) for key, step, _, value in history if key == "hypervolume"]
    assert volumes == [(1, 0.4), (2, 0.4), (3, 0.5), (4, 0.6)]
    records = ["front.csv", "history.csv", "layers.json", "plan.json", "report.html"]
    tables = ["tables/front.json", "tables/layers.json", "tables/trials.json"]
    assert files == [".hydra/config.yaml", "figures/front.png", *records, *tables, "trials.jsonl"]

    assert (front[0], winner[0]) == ("trial 0, 4.50 bits", "winner, trial 3, 4.50 bits")
    assert front[1] == winner[1] == name
    assert (winner[3]["role"], winner[3]["trial"], winner[3]["digest"]) == ("winner", "3", POLICIES[1].digest)
    assert winner[4] == {
        "task": "digits",
        "hardware": "zen5",
        "strategy": "solver",
        "seed": "0",
        "budget.size_ratio": "0.14",
    }
    assert {key: value for key, _, _, value in front[5]} == {"quality": 0.9, "average_weight_bits": 4.5}
    assert winner[6] == ["policy.json"]


def test_the_winner_is_shown_with_what_its_plan_promises(root: Path, finished: RunDirectory) -> None:
    """Repairs of the winner come after the front was measured."""
    sync(finished, SETTINGS, root)
    parent, _, winner = shown(root)
    promised = {key: value for key, _, _, value in parent[5]}
    for key in ("quality", "drop_high", "average_weight_bits", "weight_bytes", "size_ratio"):
        assert {name: value for name, _, _, value in winner[5]}[key] == promised[key]


def test_plans_on_the_front_are_models(root: Path, finished: RunDirectory) -> None:
    sync(finished, SETTINGS, root)
    front, winner = models_shown(root)
    name, status, run, outputs, tags, values, files = winner
    assert (name, status, run) == (f"{NAME} trial 3".replace(".", "_"), "READY", "winner, trial 3, 4.50 bits")
    assert outputs == [NAME, run]
    assert {key: tags[key] for key in ("task", "hardware", "strategy", "seed", "digest", "verdict", "role")} == {
        "task": "digits",
        "hardware": "zen5",
        "strategy": "solver",
        "seed": "0",
        "digest": POLICIES[1].digest,
        "verdict": "met",
        "role": "winner",
    }
    assert tags["workload"] == "batch 1"
    child = next(row for row in shown(root) if row[0] == run)
    assert values == sorted((key, time, value) for key, _, time, value in child[5])
    assert files == ["plan.json", "plan.safetensors"]
    assert (front[2], front[3], front[6]) == ("trial 0, 4.50 bits", ["trial 0, 4.50 bits"], ["policy.json"])


def test_tables_are_what_mlflow_reads_back(root: Path, finished: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri(None, root))  # `load_table` asks it, whatever the client
    for _ in range(2):  # a table that is logged again is not added to itself
        sync(finished, SETTINGS, root)
    client, [parent] = client_of(root), [run for run in runs_of(root) if run.data.tags["role"] == "search"]
    listed = json.loads(parent.data.tags["mlflow.loggedArtifacts"])
    assert [table["path"] for table in listed] == ["tables/trials.json", "tables/front.json", "tables/layers.json"]
    home, only = parent.info.experiment_id, [parent.info.run_id]
    trials = client.load_table(home, "tables/trials.json", only)
    assert trials["trial"].tolist() == [trial.number for trial in MEASURED]
    assert trials["quality"].dropna().tolist() == pytest.approx([0.9, 0.99, 0.95, 0.7])
    assert trials["state"].tolist() == [trial.state for trial in MEASURED]
    layers = client.load_table(home, "tables/layers.json", only)
    assert layers[["name", "weight", "input"]].to_numpy().tolist() == [
        ["conv", "int4", "uint8"],
        ["fc", "int4", "uint8"],
    ]
    front = client.load_table(home, "tables/front.json", only)
    assert front["role"].tolist() == ["float", "front", "winner"]
    assert "policy" not in front


def test_the_policy_of_a_plan_on_the_front_is_an_artifact(root: Path, finished: RunDirectory) -> None:
    sync(finished, SETTINGS, root)
    [winner] = [run for run in runs_of(root) if run.data.tags["role"] == "winner"]
    path = root / "mlartifacts" / winner.info.run_id / "artifacts" / "policy.json"
    assert json.loads(path.read_text()) == POLICIES[1].to_dict()


def test_syncing_again_changes_nothing(root: Path, finished: RunDirectory) -> None:
    sync(finished, SETTINGS, root)
    once, models, ids = shown(root), models_shown(root), {run.info.run_id for run in runs_of(root)}
    sync(finished, SETTINGS, root)
    assert shown(root) == once
    assert models_shown(root) == models
    assert {run.info.run_id for run in runs_of(root)} == ids


def test_a_run_synced_as_it_grows_ends_like_one_synced_once(tmp_path: Path, root: Path) -> None:
    run = start(root / "grown")
    run.claim()
    sync(run, SETTINGS, root)
    [(_, _, times, _, params, history, files)] = shown(root)
    assert (times[0], times[2], history, files) == ("RUNNING", None, [], ["layers.json"])
    assert params["seed"] == "0"
    measure(run, MEASURED[:2])
    sync(run, SETTINGS, root)
    run.update(status="interrupted")
    sync(run, SETTINGS, root)
    assert shown(root)[0][2][0] == "KILLED"
    assert "error" in shown(root)[0][3]
    run.update(status="running")
    sync(run, SETTINGS, root)
    assert "error" not in shown(root)[0][3]
    assert shown(root)[0][2][0] == "RUNNING"
    measure(run, MEASURED[2:])
    finish(run)
    sync(run, SETTINGS, root)

    other = make_root(tmp_path / "other")
    sync(run, SETTINGS, other)
    grown, once = shown(root), shown(other)
    assert grown == once
    assert models_shown(root) == models_shown(other)


WRITES = (
    *("create_run", "log_batch", "log_artifact", "log_dict", "set_terminated", "set_tag"),
    *("create_logged_model", "log_outputs", "log_model_artifact", "finalize_logged_model"),
)


@pytest.mark.parametrize("survived", [1, 3, 4, 5, 8, 30])
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

    for method in WRITES:
        monkeypatch.setattr(MlflowClient, method, mortal(method))
    with pytest.raises(KeyboardInterrupt):
        sync(finished, SETTINGS, root)
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    sync(finished, SETTINGS, root)
    parent, front, winner = shown(root)
    portrait = portray(finished)
    assert [run[2][0] for run in (parent, front, winner)] == ["FINISHED"] * 3
    points = [(p.key, p.step, p.time, p.value) for p in portrait.series]
    points += [(key, 0, portrait.ended, value) for key, value in portrait.values.items()]
    assert sorted(points) == parent[5]
    assert len(parent[6]) == 11
    assert (front[6], winner[6]) == (["policy.json"], ["policy.json"])
    models = models_shown(root)
    assert [(model[1], model[6]) for model in models] == [
        ("READY", ["policy.json"]),
        ("READY", ["plan.json", "plan.safetensors"]),
    ]
    assert [model[3] for model in models] == [[front[0]], [NAME, winner[0]]]
    for model, run in zip(models, (front, winner), strict=True):
        assert model[5] == sorted((key, time, value) for key, _, time, value in run[5])


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
    assert [model.tags["trial"] for model in models_of(root)] == ["3"]


def test_a_search_that_goes_on_after_it_was_stopped_leads_to_the_plan_it_ends_with(
    root: Path, finished: RunDirectory
) -> None:
    finished.update(status="interrupted")
    write_front(finished, [("winner", MEASURED[0]), ("front", MEASURED[3])])
    sync(finished, SETTINGS, root)
    assert [model[3] for model in models_shown(root)] == [["winner, trial 0, 4.50 bits"], ["trial 3, 4.50 bits"]]
    finished.update(status="finished")
    write_front(finished, [("front", MEASURED[0]), ("winner", MEASURED[3])])
    sync(finished, SETTINGS, root)
    front, winner = models_shown(root)
    assert (front[3], front[6]) == (["trial 0, 4.50 bits"], ["policy.json"])
    assert (winner[3], winner[6]) == ([NAME, "winner, trial 3, 4.50 bits"], ["plan.json", "plan.safetensors"])
    parent = next(run for run in runs_of(root) if run.data.tags["role"] == "search")
    outputs = [output.model_id for output in client_of(root).get_run(parent.info.run_id).outputs.model_outputs]
    assert outputs == [model.model_id for model in models_of(root) if model.tags["role"] == "winner"]


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
        "import sys; from pathlib import Path; from search.tracking.mirror import *\n"
        "print(sync(RunDirectory(sys.argv[1]), TrackingSettings(), Path(sys.argv[1]).parent))"
    )
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    workers = [subprocess.Popen([*command, str(run.path)], text=True, **pipes) for run in runs]
    said = [worker.communicate(timeout=120) for worker in workers]
    assert said == [(f"sqlite:///{tmp_path}/mlflow.db\n", "")] * 2
    assert sorted(row[3]["bitplan.run_id"][0] for row in shown(tmp_path)) == ["0"] * 3 + ["1"] * 3
    assert len(models_of(tmp_path)) == 4


def test_a_process_waits_its_turn_at_the_database(
    root: Path, finished: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.tracking.store.LOCK_SECONDS", 0.1)
    with (
        FileLock(root / "mlflow.db.lock"),
        pytest.raises(TrackingError, match=r"mlflow.db.lock' could not be acquired"),
    ):
        sync(finished, SETTINGS, root)
    assert client_of(root).get_experiment_by_name("bitplan/digits") is None
    sync(finished, SETTINGS, root)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_does_not_keep_a_run_from_being_shown(
    root: Path, finished: RunDirectory, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    sync(finished, SETTINGS, root)
    assert len(shown(root)) == 3


def test_a_copy_that_may_only_be_read_is_shown(root: Path, finished: RunDirectory, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished.path, tmp_path / "archive"))
    folders = [copy, *filter(Path.is_dir, copy.rglob("*"))]
    for folder in folders:
        folder.chmod(0o555)
    (copy / ".mlflow.lock").mkdir() if os.geteuid() == 0 else None  # root may write anywhere, but not lock a folder
    try:
        sync(RunDirectory(copy), SETTINGS, root)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert len(shown(root)) == 3


# How runs end


@pytest.mark.parametrize(("status", "shown_as"), [("failed", "FAILED"), ("interrupted", "KILLED")])
def test_a_run_that_ended_badly_says_why(root: Path, status: str, shown_as: str) -> None:
    run = start(root / "bad")
    log = EventLog(run.file("log.jsonl"))
    log.write("interrupted", error="KeyboardInterrupt: an earlier attempt")
    log.write(status, error="ValueError: no such thing")
    run.update(status=status)
    sync(run, SETTINGS, root)
    [(_, _, times, tags, _, _, files)] = shown(root)
    assert (times[0], tags["error"], files) == (shown_as, "ValueError: no such thing", ["layers.json", "log.jsonl"])


def test_a_run_whose_process_is_gone_is_shown_as_killed(root: Path) -> None:
    run = start(root / "gone")
    run.claim()
    sync(run, SETTINGS, root)
    assert shown(root)[0][2][0] == "RUNNING"
    run.release()  # as when the process is killed: run.json goes on saying that it runs
    sync(run, SETTINGS, root)
    [(_, _, times, tags, *_)] = shown(root)
    assert (times[0], tags["error"]) == ("KILLED", "its process ended without saying why")


def test_runs_of_a_sweep_have_its_name(root: Path, finished: RunDirectory) -> None:
    finished.update(sweep="2026-11-23/12-00-00")
    sync(finished, SETTINGS, root)
    assert {row[3]["sweep"] for row in shown(root)} == {"2026-11-23/12-00-00"}


# The command


def test_a_folder_of_copied_runs_is_synced_at_once(
    root: Path, finished: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from nodes without a network: their run root is not here, and the store is."""
    start(root / "second", run_id="b" * 32)
    for name in ("first", "second"):
        RunDirectory(root / name).update(run_root="/nowhere/on/this/machine")
        shutil.move(root / name, tmp_path / "brought" / name)
    store = f"sqlite:///{root}/mlflow.db"
    assert main(["sync", str(tmp_path / "brought"), "--uri", store]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"Synced {tmp_path}/brought/{name} to {store}" for name in ("first", "second")
    ]
    assert len(shown(root)) == 4
    assert runs_of(root)[0].info.artifact_uri.startswith(f"file://{root}/mlartifacts")


def test_a_damaged_run_does_not_keep_others_from_being_synced(
    root: Path, finished: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    other = start(root / "second", run_id="b" * 32)
    damages = {"empty": ("front.csv", ""), "cut": ("run.json", '{"status"'), "other": ("run.json", "{}")}
    damages["bare"] = ("plan.json", json.dumps(json.loads(finished.file("plan.json").read_text()) | {"layers": [{}]}))
    for name, (file, text) in damages.items():
        (Path(shutil.copytree(finished.path, root / name)) / file).write_text(text)
    finished.file("trials.jsonl").write_text("no trial\n")
    assert main(["sync", str(root)]) == 2
    said = capsys.readouterr().err
    assert "first/trials.jsonl, line 1 is damaged" in said
    assert "cut/run.json, line 1 is damaged" in said
    assert f"{root}/empty: No columns to parse from file" in said
    assert f"{root}/other: a file of it has no 'config'" in said
    assert f"{root}/bare: a file of it has no 'name'" in said
    assert [run.data.tags["bitplan.run_dir"] for run in runs_of(root)] == [str(other.path)]


# Where it goes, and manners


def test_the_settings_come_before_the_environment_and_that_before_the_run_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(None, tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://one")
    assert tracking_uri(None, tmp_path) == "http://one"
    assert tracking_uri("http://two", tmp_path) == "http://two"


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


def test_a_closed_port_is_named(root: Path, finished: RunDirectory, closed_port: int) -> None:
    with pytest.raises(TrackingError, match=f"http://127.0.0.1:{closed_port}: Connection refused") as error:
        sync(finished, TrackingSettings(uri=f"http://me:secret@127.0.0.1:{closed_port}"), root)
    assert "\n" not in str(error.value)


def test_a_silent_server_costs_seconds(
    root: Path, finished: RunDirectory, silent_server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FIRST_CONTACT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with pytest.raises(TrackingError, match="timed out"):
        sync(finished, TrackingSettings(uri=f"http://127.0.0.1:{silent_server}"), root)


def test_the_users_own_patience_is_kept(
    root: Path, finished: RunDirectory, silent_server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setitem(FIRST_CONTACT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1000")
    with pytest.raises(TrackingError, match="timed out"):
        sync(finished, TrackingSettings(uri=f"http://127.0.0.1:{silent_server}"), root)


def test_a_store_mlflow_does_not_know_is_named(root: Path, finished: RunDirectory) -> None:
    with pytest.raises(TrackingError, match=r"cannot use MLflow at ./mlruns: .*maintenance mode"):
        sync(finished, TrackingSettings(uri="./mlruns"), root)


def test_a_damaged_database_is_named(root: Path, finished: RunDirectory) -> None:
    (root / "mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(TrackingError, match="file is not a database"):
        sync(finished, SETTINGS, root)


def test_a_deleted_experiment_is_not_written_to(root: Path, finished: RunDirectory) -> None:
    client_of(root).delete_experiment(client_of(root).create_experiment("bitplan/digits"))
    with pytest.raises(TrackingError, match=r"'bitplan/digits' is deleted; restore it, or choose another"):
        sync(finished, SETTINGS, root)


def test_a_folder_without_a_run_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match=r"no run directory: it has no run.json"):
        sync(RunDirectory(root / "nothing"), SETTINGS, root)


def test_names_tell_what_ratios_refer_to(finished: RunDirectory) -> None:
    finished.update(budget_reference="int8")
    portrait = portray(finished)
    assert "size_ratio=0.14 reference=int8 seed 0" in portrait.name
    assert portrait.tags["budget"] == "size_ratio=0.14 reference=int8"
    finished.update(budget={"weight_bytes": 60.0})
    assert portray(finished).tags["budget"] == "weight_bytes=60"
