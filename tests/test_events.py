"""The log of a run: every event whole and in order, true durations under false clocks, and never the search's end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
from rundirs import MEASURED

from search.errors import ConfigError, FileError
from search.events import KEPT_BYTES, EventLog, LoggedProgress, LogWarning, read_events, recorded, warnings_logged
from search.progress import Progress
from search.rundir import RunDirectory
from search.stopping import StoppedError

ABOUT = {"task": "digits", "config": {"seed": 0}}


class Shown(Progress):
    """Notes what the user is shown."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.notices: list[str] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def notice(self, text: str) -> None:
        self.notices.append(text)


class Clocks:
    """The two clocks of a machine, of which one may be set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.true = 1_700_000_000.0, 50.0
        monkeypatch.setattr("search.events.time.time", lambda: self.wall)
        monkeypatch.setattr("search.events.time.monotonic", lambda: self.true)

    def pass_s(self, seconds: float, set_by_s: float = 0.0) -> None:
        self.true += seconds
        self.wall += seconds + set_by_s


def fail(run: RunDirectory, error: BaseException, before: Callable[[], object] = lambda: None) -> None:
    """A session that ends with an error, after something else happened."""
    with recorded(run, ABOUT, Progress()) as progress:
        progress.stage("one")
        before()
        raise error


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "log.jsonl")


def test_every_event_says_when_and_where(log: EventLog, tmp_path: Path) -> None:
    before = time.time(), time.monotonic()
    log.write("stage", name="ü")
    log.write("odd", "warning", share=float("nan"), path=tmp_path)
    after = time.time(), time.monotonic()
    first, second = log.read()
    assert (first["event"], first["level"], first["name"]) == ("stage", "info", "ü")
    assert (second["level"], second["share"], second["path"]) == ("warning", None, str(tmp_path))
    for event in (first, second):
        assert before[0] - 1e-3 <= event["time"] <= after[0] + 1e-3
        assert before[1] - 1e-5 <= event["clock_s"] <= after[1] + 1e-5
        assert abs(datetime.fromisoformat(event["at"]).timestamp() - event["time"]) <= 2e-3
        assert event["at"].endswith("Z")
        assert (event["host"], event["process"]) == (os.uname().nodename, os.getpid())


def test_nothing_is_waited_for(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int) -> None:
        raise AssertionError("an event is not worth a sync of the disk")

    monkeypatch.setattr("os.fsync", refuse)
    log.write("stage", name="a")
    assert len(log.read()) == 1, "and yet it is there at once"


def test_a_kill_loses_no_event(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from search.events import EventLog
log = EventLog(Path({str(tmp_path / "log.jsonl")!r}))
for number in range(50):
    log.write("trial", number=number)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [event["number"] for event in read_events(tmp_path / "log.jsonl")] == list(range(50))


def test_a_line_cut_off_anywhere_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for number in range(2):
        EventLog(path).write("trial", number=number)
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        EventLog(path).write("resumed")
        found = [event.get("number", event["event"]) for event in read_events(path)]
        brackets = whole[:length].count(b"}")  # a line that lacks only its end is whole
        assert found == [*range(brackets), "resumed"]
    assert read_events(tmp_path / "none.jsonl") == []


def test_many_may_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"

    def write(writer: int) -> None:
        log = EventLog(path)
        for number in range(200):
            log.write("trial", writer=writer, number=number, text="x" * writer * 100)
        log.close()

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = read_events(path)
    assert len(events) == 800
    for writer in range(4):
        assert [event["number"] for event in events if event["writer"] == writer] == list(range(200))


def test_a_log_that_cannot_be_written_warns_once_and_catches_up(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.mkdir()  # whoever runs this test: a folder cannot be appended to
    log = EventLog(path)
    with pytest.warns(LogWarning, match=r"log.jsonl cannot be used: a folder is in its place.*the search goes on"):
        log.write("stage", name="a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.write("stage", name="b")
        path.rmdir()
        log.write("stage", name="c")
    assert [event["name"] for event in log.read()] == ["a", "b", "c"]


def test_what_waits_to_be_written_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.mkdir()
    log = EventLog(path)
    with pytest.warns(LogWarning):
        log.write("stage", name="x" * (KEPT_BYTES // 3), number=0)
    for number in (1, 2, 3):
        log.write("stage", name="x" * (KEPT_BYTES // 3), number=number)
    path.rmdir()
    log.write("stage")
    assert [event.get("number") for event in log.read()] == [0, 1, None]


def test_a_line_written_in_parts_is_whole(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up takes part of a line; when there is room again, the rest follows."""
    log.write("stage", name="a")
    write, calls = os.write, []

    def write_some(file: int, content: bytes) -> int:
        calls.append(len(content))
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(file, content[:10])

    monkeypatch.setattr("search.events.os.write", write_some)
    with pytest.warns(LogWarning, match="no space is left"):
        log.write("stage", name="b")
    log.write("stage", name="c")
    assert [event["name"] for event in log.read()] == ["a", "b", "c"]


def test_warnings_are_logged_and_shown(log: EventLog) -> None:
    with warnings.catch_warnings(record=True) as shown, warnings_logged(log):
        warnings.simplefilter("always")
        warnings.warn("the text", RuntimeWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["the text"]
    (event,) = log.read()
    assert (event["event"], event["level"]) == ("warning", "warning")
    assert (event["category"], event["text"]) == ("RuntimeWarning", "the text")
    assert event["file"] == __file__
    assert event["line"] > 0


def test_a_clock_that_is_set_is_noticed(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch)
    log.write("stage", name="a")
    clocks.pass_s(5, set_by_s=-3600)
    log.write("stage", name="b")
    clocks.pass_s(5, set_by_s=0.1)
    log.write("stage", name="c")
    assert [event["event"] for event in log.read()] == ["stage", "clock_set", "stage", "stage"]
    assert log.read()[1]["by_s"] == -3600
    times = [event["clock_s"] for event in log.read()]
    assert [after - before for before, after in pairwise(times)] == [5, 0, 5]


def test_a_session_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, run, shown = Clocks(monkeypatch), RunDirectory(tmp_path), Shown()
    with recorded(run, ABOUT, shown) as progress:
        assert run.info()["status"] == "running"
        progress.stage("one")
        clocks.pass_s(2)
        progress.stage("two")
        progress.trial(MEASURED[0], known=False)
        progress.trial(MEASURED[2], known=True)
        clocks.pass_s(3)
        run.update(digest="abc", verdict="met", evaluations=1)
    info = run.info()
    assert (info["status"], info["seconds"], info["finished"] - info["started"]) == ("finished", 5, 5)
    events = read_events(tmp_path / "log.jsonl")
    assert [event["event"] for event in events] == [
        *("started", "stage", "stage_ended", "stage", "trial", "trial", "stage_ended", "finished")
    ]
    assert shown.stages == ["one", "two"]
    started, finished = events[0], events[-1]
    assert started["run_id"] == info["run_id"]
    assert re.fullmatch("[0-9a-f]{16}", started["settings"])
    assert started["versions"]["torch"]
    assert started["machine"]["cpus"] >= 1
    assert started["machine"]["memory_bytes"] > 2**28
    assert started["machine"]["python"] == sys.version.split()[0]
    assert [event["seconds"] for event in events if event["event"] == "stage_ended"] == [2, 3]
    trials = [event for event in events if event["event"] == "trial"]
    assert [(event["number"], event["known"], event["quality"]) for event in trials] == [
        (0, False, 0.9),
        (2, True, None),
    ]
    totals = {"digest": "abc", "verdict": "met", "evaluations": 1, "trials": 2, "known": 1, "seconds": 5}
    assert totals.items() <= finished.items()


def test_sessions_add_up_whatever_the_clocks_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is resumed on a machine whose clock is hours behind, and set back once more meanwhile."""
    clocks, run, shown = Clocks(monkeypatch), RunDirectory(tmp_path), Shown()
    with pytest.raises(KeyboardInterrupt):
        fail(run, KeyboardInterrupt(), lambda: clocks.pass_s(10, set_by_s=86_400))
    info = run.info()
    assert (info["status"], info["seconds"], info["finished"] - info["started"]) == ("interrupted", 10, 10)
    clocks.wall -= 200_000
    with recorded(run, ABOUT, shown):
        clocks.pass_s(4, set_by_s=-3600)
    again = run.info()
    assert again["run_id"] == info["run_id"]
    assert again["started"] == info["started"]
    assert (again["status"], again["seconds"]) == ("finished", 14)
    assert again["finished"] >= again["started"]
    events = read_events(tmp_path / "log.jsonl")
    resumed = next(event for event in events if event["event"] == "resumed")
    assert (resumed["status"], resumed["trials"]) == ("interrupted", 0)
    assert events[-1]["seconds"] == 4
    assert events[-1]["total_seconds"] == 14
    assert shown.notices == ["going on with an earlier run: 0 trials known"]
    with recorded(run, ABOUT, shown):
        pass
    assert "finished before" in shown.notices[-1]


@pytest.mark.parametrize(
    ("error", "status", "has_traceback"),
    [
        (ValueError("odd"), "failed", True),
        (ConfigError("seed=x must be a number"), "failed", False),
        (KeyboardInterrupt(), "interrupted", False),
        (StoppedError("asked"), "interrupted", False),
    ],
)
def test_how_a_run_ends_is_in_its_log(tmp_path: Path, error: BaseException, status: str, has_traceback: bool) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(type(error)) as raised:
        fail(run, error)
    assert raised.value is error
    assert run.info()["status"] == status
    *_, stage, last = read_events(tmp_path / "log.jsonl")
    assert stage["event"] == "stage_ended"
    assert (last["event"], last["level"], last["kind"]) == (status, "error", type(error).__name__)
    assert str(error) in last["error"]
    assert ("traceback" in last) == has_traceback
    if has_traceback:
        assert "raise error" in last["traceback"]


def test_a_search_that_was_stopped_with_a_plan_says_so(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with recorded(run, ABOUT, Progress()) as progress:
        progress.is_stopped = True
    assert run.info()["status"] == "interrupted"
    assert read_events(tmp_path / "log.jsonl")[-1]["event"] == "stopped"


def test_a_refusal_of_the_system_says_how_to_go_on(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(FileError, match=rf"x.npz cannot be used: no space.*run_dir={tmp_path} to go on"):
        fail(run, OSError(28, "No space left on device", "x.npz"))
    assert run.info()["status"] == "failed"


def test_a_run_json_that_is_gone_is_not_made_up(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="odd"):
        fail(run, ValueError("odd"), run.file("run.json").unlink)
    assert not run.file("run.json").exists()
    last = read_events(tmp_path / "log.jsonl")[-1]
    assert last["error"] == "ValueError: odd"
    assert "run.json" in last["not_in_run_json"]


def test_steps_and_the_end_are_handed_on(log: EventLog) -> None:
    steps: list[tuple[int, int]] = []
    counts: list[int] = []
    closed: list[bool] = []

    class Seen(Progress):
        def step(self, done: int, total: int) -> None:
            steps.append((done, total))

        def workers(self, count: int) -> None:
            counts.append(count)

        def close(self) -> None:
            closed.append(True)

    progress = LoggedProgress(log, Seen())
    progress.stage("one")
    progress.step(1, 3)
    progress.workers(2)
    progress.notice("told")
    progress.close()
    assert (steps, counts, closed) == ([(1, 3)], [2], [True])
    assert [event["event"] for event in log.read()] == ["stage", "step", "notice", "stage_ended"]
