from __future__ import annotations

import time
from pathlib import Path

import pytest

from search.events import EventLog
from search.report.course import particulars, read_course
from search.report.tables import event_rows, stage_rows


def event(at: float, event: str, process: int = 1, host: str = "node1", **facts: object) -> dict[str, object]:
    return {"time": 1e9 + at, "clock_s": at, "host": host, "process": process, "event": event, **facts}


def test_stages_add_up_over_processes() -> None:
    course = read_course(
        [
            event(0, "started", run_id="r"),
            event(1, "stage", name="scoring"),
            event(2, "stage", 2, "node2", name="measuring"),
            event(4, "stage_ended", name="scoring", seconds=3.0),
            event(4, "stage", name="measuring"),
            event(5, "trial", number=0),
            event(6, "trial", 2, "node2", number=1),
            event(9, "stage_ended", name="measuring", seconds=5.0),
            event(9, "stage", name="scoring"),
            event(9.5, "stage_ended", name="scoring", seconds=0.5),
            event(9.5, "finished", digest="d"),
        ]
    )
    assert course is not None
    assert course.seconds == {"scoring": 3 + 0.5, "measuring": 5 + 4}
    assert course.workers == (("node1", 1), ("node2", 2))
    assert (course.trials, course.resumed) == (2, 0)
    assert [found["event"] for found in course.events] == ["started", "finished"]
    assert course.summary == "2 processes on 2 hosts worked for 12.5 seconds and logged 2 trials."
    assert stage_rows(course)[1] == ["measuring", ("9.00", 9.0), "72%"]


def test_what_passed_between_a_kill_and_the_resumption_is_no_work() -> None:
    course = read_course(
        [
            event(0, "started"),
            event(0, "stage", name="measuring"),
            event(2, "trial", number=0),
            event(500, "resumed", 7),
            event(501, "stage", 7, name="measuring"),
            event(502, "trial", 7, number=1),
        ]
    )
    assert course is not None
    assert course.seconds == {"measuring": 2 + 1}
    assert "resumed once" in course.summary


def test_a_process_that_bears_the_number_of_one_killed_starts_anew() -> None:
    course = read_course(
        [
            event(0, "stage", name="a"),
            event(2, "trial"),
            event(9, "resumed"),
            event(10, "stage", name="a"),
            event(11, "stage_ended", name="a", seconds=1.0),
        ]
    )
    assert course is not None
    assert course.seconds == {"a": 2 + 1}


def test_events_of_a_log_are_told_with_their_particulars(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log.jsonl")
    assert read_course(log.read()) is None
    log.write("failed", "error", error="DiskError: full", traceback="...", digest=None)
    course = read_course(log.read())
    assert course is not None
    ((when, name, where, what),) = event_rows(course)
    assert when[1] == pytest.approx(time.time(), abs=60)
    assert name == "failed"
    assert where.split()[0] == course.workers[0][0]
    assert what == particulars(course.events[0]) == "error DiskError: full"
    assert stage_rows(course) == []
