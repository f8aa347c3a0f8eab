"""MLflow beside a search: what is visible while it runs, and that no trouble of the store is the search's."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rundirs import MEASURED, finish, measure, start
from stores import client_of, make_root, plain_environment, runs_of, shown

from search.errors import ConfigError
from search.rundir import RunDirectory
from search.tracking.live import Follower, Mirrored, Tail, sweep_name
from search.tracking.settings import TrackingSettings

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's, with SQLAlchemy 2.1
EAGER = TrackingSettings(interval_s=1e-9)
DEADLINE = 120.0


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_environment(monkeypatch)
    monkeypatch.setattr("search.tracking.live.SHARE", 1e9)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path / "runs")


@pytest.fixture
def run(root: Path) -> Iterator[RunDirectory]:
    """A search at work."""
    run = start(root / "run")
    run.claim()
    yield run
    run.release()


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://me:secret@127.0.0.1:{server.getsockname()[1]}"


def wait_for(condition: Callable[[], Any]) -> Any:
    until = time.monotonic() + DEADLINE
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


def follow(run: RunDirectory, root: Path, *deeds: Callable[[], None], uri: str | None = None) -> str | None:
    """Follows a run that does one deed after each update; returns what went wrong in the end."""
    left = list(deeds)

    def is_over(seconds: float) -> bool:
        if left:
            left.pop(0)()
        return not left

    settings = TrackingSettings(uri=uri, interval_s=EAGER.interval_s)
    return Follower(run, settings, root, is_over, lambda: None).follow()


# In this process


def test_what_is_new_is_written_as_it_comes(root: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    sent: list[list[tuple[str, int]]] = []
    seen: list[Any] = []
    real = MlflowClient.log_batch

    def log_batch(client: Any, run_id: str, metrics: Any = (), *rest: Any, **options: Any) -> None:
        sent.append([(metric.key, metric.step) for metric in metrics if metric.key.startswith("trial/quality")])
        real(client, run_id, metrics, *rest, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)

    def look() -> None:
        [parent] = [found for found in runs_of(root) if found.data.tags["role"] == "search"]
        seen.append((parent.info.status, parent.data.metrics.get("best_quality")))

    deeds = [
        lambda: measure(run, MEASURED[:2]),
        look,
        lambda: measure(run, MEASURED[2:]),
        look,
        lambda: finish(run),
        lambda: run.update(seconds=61.0),  # it is shown at its end, and once more when its report is there
        look,
    ]
    assert follow(run, root, *deeds) is None
    assert seen == [("RUNNING", 0.9), ("RUNNING", 0.95), ("FINISHED", 0.95)]
    assert [batch for batch in sent if batch] == [
        [("trial/quality", 0), ("trial/quality", 1)],
        [("trial/quality", 3), ("trial/quality", 4)],
    ]
    parent, _, winner = shown(root)
    assert (parent[2][0], winner[2][0]) == ("FINISHED", "FINISHED")
    assert "report.html" in parent[6]


def test_the_last_update_writes_the_files_that_changed_since(
    root: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    sent: list[str] = []
    real = MlflowClient.log_artifact

    def log_artifact(client: Any, run_id: str, path: str, folder: str | None = None) -> None:
        sent.append(Path(path).name)
        real(client, run_id, path, folder)

    monkeypatch.setattr(MlflowClient, "log_artifact", log_artifact)
    measure(run, MEASURED)
    deeds = [lambda: finish(run), lambda: run.file("report.html").write_text("drawn meanwhile"), lambda: None]
    assert follow(run, root, *deeds) is None
    assert sent.count("report.html") == 2
    assert sent.count("plan.json") == sent.count("trials.jsonl") == sent.count("front.json") == 1


def test_a_requeued_run_goes_on_where_it_was(root: Path, run: RunDirectory) -> None:
    def fail() -> None:
        run.update(status="failed", finished=1_700_000_010.0)

    measure(run, MEASURED[:2])
    assert follow(run, root, fail) is None
    assert runs_of(root)[0].info.status == "FAILED"
    run.update(status="running")
    seen: list[str] = []
    deeds = [lambda: seen.append(runs_of(root)[0].info.status), lambda: measure(run, MEASURED[2:]), lambda: finish(run)]
    assert follow(run, root, *deeds) is None
    assert seen == ["RUNNING"]
    [parent] = [row for row in shown(root) if row[1] is None]
    steps = [step for key, step, *_ in parent[5] if key == "trial/quality"]
    assert (parent[2][0], steps) == ("FINISHED", [0, 1, 3, 4])


def test_a_store_that_comes_back_gets_everything(root: Path, run: RunDirectory) -> None:
    database = root / "mlflow.db"
    whole = database.read_bytes()
    deeds = [
        lambda: measure(run, MEASURED[:2]),
        lambda: database.write_bytes(b"no database" * 100),
        lambda: measure(run, MEASURED[2:]),
        lambda: database.write_bytes(whole),
        lambda: finish(run),
    ]
    assert follow(run, root, *deeds) is None
    [parent] = [row for row in shown(root) if row[1] is None]
    assert [step for key, step, *_ in parent[5] if key == "trial/quality"] == [0, 1, 3, 4]


def test_what_goes_wrong_in_the_end_is_said(root: Path, run: RunDirectory) -> None:
    deeds = [lambda: (root / "mlflow.db").write_bytes(b"no database" * 100), lambda: measure(run, MEASURED)]
    assert "file is not a database" in (follow(run, root, *deeds) or "")


def test_the_tail_reads_new_lines_once_they_are_whole(tmp_path: Path) -> None:
    tail, path = Tail(tmp_path / "trials.jsonl"), tmp_path / "trials.jsonl"
    assert tail.read() == []
    measure(RunDirectory(tmp_path), MEASURED[:1])
    assert tail.read() == MEASURED[:1]
    text = path.read_bytes()
    measure(RunDirectory(tmp_path), MEASURED[1:3])
    more = path.read_bytes()[len(text) :]
    path.write_bytes(text + more[:-5])
    assert tail.read() == MEASURED[:2]
    path.write_bytes(text + more)
    assert tail.read() == MEASURED[:3]


def test_sweeps_are_called_by_their_folder(tmp_path: Path) -> None:
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    config = OmegaConf.create({"mode": RunMode.MULTIRUN, "sweep": {"dir": f"{tmp_path}/runs/2026-11-23/12-00-00"}})
    assert sweep_name(config, tmp_path / "runs") == "2026-11-23/12-00-00"
    assert sweep_name(config, tmp_path / "other") == "12-00-00"
    config.mode = RunMode.RUN
    assert sweep_name(config, tmp_path / "runs") is None


@pytest.mark.parametrize("name", ["interval_s", "patience_s"])
def test_times_must_be_above_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match=f"tracking.{name}=0.0 must be above 0"):
        TrackingSettings(**{name: 0.0})


# In the process beside the search


def test_a_running_search_is_visible_and_its_process_left_alone(
    root: Path, run: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ)
    with Mirrored(run.path, TrackingSettings(interval_s=0.1), root, "a sweep") as mirrored:
        mirrored.start(run)
        measure(run, MEASURED[:2])
        client = client_of(root)
        wait_for(lambda: client.get_experiment_by_name("bitplan/digits"))
        [live] = wait_for(lambda: [found for found in runs_of(root) if "best_quality" in found.data.metrics])
        assert (live.info.status, live.data.tags["sweep"]) == ("RUNNING", "a sweep")
        assert dict(os.environ) == before
        measure(run, MEASURED[2:])
        finish(run)
        run.release()
    assert [row[2][0] for row in shown(root)] == ["FINISHED"] * 3
    assert capfd.readouterr() == ("", "")


def test_a_search_that_was_killed_is_shown_so(root: Path, run: RunDirectory) -> None:
    mirrored = Mirrored(run.path, TrackingSettings(), root)
    mirrored.start(run)
    process = mirrored._process
    assert process
    assert process.stdin
    run.release()
    process.stdin.close()  # which is what becomes of the pipe of a process that is killed
    assert process.wait(DEADLINE) == 0
    process.stdout.close() if process.stdout else None
    [row] = shown(root)
    assert (row[2][0], row[3]["error"]) == ("KILLED", "its process ended without saying why")


def test_a_silent_server_costs_one_warning(
    root: Path,
    run: RunDirectory,
    silent_server: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with Mirrored(run.path, TrackingSettings(uri=silent_server, patience_s=DEADLINE), root) as mirrored:
        mirrored.start(run)
    output, errors = capfd.readouterr()
    where = silent_server.replace("me:secret@", "")
    assert output == ""
    assert errors.count("\n") == 1
    assert errors.startswith(f"warning: cannot use MLflow at {where}: timed out")
    assert errors.endswith(f"nothing of the run is lost: `bitplan sync {run.path}` shows it in MLflow later\n")


@pytest.mark.parametrize(
    ("number", "complaint"),
    [
        (signal.SIGSTOP, "gave no sign of life for 0.5 s"),  # as where a call never returns
        (signal.SIGKILL, "the process that writes to MLflow ended early, with code -9"),
    ],
)
def test_the_end_waits_for_no_process_that_is_stuck_or_gone(
    root: Path, run: RunDirectory, capfd: pytest.CaptureFixture[str], number: int, complaint: str
) -> None:
    with Mirrored(run.path, TrackingSettings(patience_s=0.5), root) as mirrored:
        mirrored.start(run)
        assert mirrored._process
        os.kill(mirrored._process.pid, number)
    assert complaint in capfd.readouterr().err
    assert mirrored._process.returncode == -signal.SIGKILL


def test_no_process_to_be_had_costs_a_warning(
    root: Path, run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with Mirrored(run.path, TrackingSettings(), root) as mirrored:
        mirrored.start(run)
    assert "cannot start the process that writes to MLflow: /nowhere/python: No such file" in capfd.readouterr().err


def test_tracking_switched_off_starts_nothing(root: Path, run: RunDirectory) -> None:
    with Mirrored(run.path, TrackingSettings(enabled=False), root) as mirrored:
        mirrored.start(run)
        assert mirrored._process is None
    assert run.info()["run_root"] == str(root)
