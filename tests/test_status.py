# What `bitplan status` says of runs in every state, read off run directories written by hand.
from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from search.cli import main
from search.rundir import RunDirectory
from search.status import PATIENCE_S, RunStatus, read_status, totals
from search.workers.board import Work
from search.workers.folder import FolderBoard
from tests import rundirs

NOW = rundirs.STARTED + 100


def log(run: RunDirectory, *events: tuple[float, str, dict[str, Any]], host: str | None = None) -> None:
    """Writes events, each so many seconds after the start."""
    where = {"host": host or socket.gethostname(), "process": 4711}
    rows = [{"time": rundirs.STARTED + at, **where, "event": event, **facts} for at, event, facts in events]
    run.file("log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in run.path.iterdir():
        os.utime(path, (rows[-1]["time"], rows[-1]["time"]))


def trials() -> list[tuple[float, str, dict[str, Any]]]:
    """The events of `rundirs.MEASURED`: a known trial, then one every 10 s."""
    return [
        (20.0 + 10 * trial.number, "trial", {"number": trial.number, "known": trial.number == 0})
        for trial in with_drops()
    ]


def with_drops() -> list[Any]:
    from dataclasses import replace

    return [replace(t, metrics={**t.metrics, "drop": 0.96 - t.quality} if t.metrics else {}) for t in rundirs.MEASURED]


def at_work(path: Path, host: str | None = None) -> RunDirectory:
    """A run in the middle of measuring."""
    run = rundirs.start(path)
    run.update(config=run.info()["config"] | {"strategy": {"evaluations": 10}})
    rundirs.measure(run, with_drops())
    stages = [(0.0, "started", {}), (1.0, "stage", {"name": "scoring choices"})]
    log(run, *stages, (10.0, "stage", {"name": "measuring policies"}), *trials(), host=host)
    return run


def test_a_run_at_work(tmp_path: Path) -> None:
    run = at_work(tmp_path)
    run.claim()
    try:
        found = read_status(run, NOW)
    finally:
        run.release()
    assert (found.state, found.stage, found.trials) == ("running", "measuring policies", 5)
    assert (found.evaluations, found.allowance) == (3.5, 10)
    assert found.stage_s == pytest.approx(90)
    assert found.evaluations_per_s == pytest.approx(2.5 / 40)  # three fresh measurements, one of half the split
    assert found.left_s == pytest.approx(6.5 / (2.5 / 40) - 16)  # 40 s ago was the last, of 16 s each
    assert found.best == {"trial": 3, "quality": 0.95, "drop": pytest.approx(0.01), "weight_bytes": 60.0}
    assert found.best_text == "accuracy 0.9500, drop +0.0100, stored size 60.0 B"
    assert found.sign_s == pytest.approx(40)
    assert not found.notes
    assert found.error is None


def test_a_budget_on_the_drop_makes_the_cheapest_best(tmp_path: Path) -> None:
    run = at_work(tmp_path)
    run.update(budget={"quality_drop": 0.07})
    found = read_status(run, NOW)
    assert found.best is not None
    assert found.best["trial"] == 3  # 60 bytes at a drop of 0.01; trial 4 has 40 and loses too much
    assert found.best_text.startswith("stored size 60.0 B, accuracy")


def test_a_run_whose_process_is_gone_is_dead(tmp_path: Path) -> None:
    found = read_status(at_work(tmp_path), NOW)
    assert found.state == "dead"
    assert found.error == "it says that it is running, but its process 4711 is gone"
    assert found.left_s is None


@pytest.mark.parametrize(("silence_s", "state"), [(PATIENCE_S - 70, "running"), (PATIENCE_S + 70, "dead")])
def test_elsewhere_the_last_sign_of_life_decides(silence_s: float, state: str, tmp_path: Path) -> None:
    run = at_work(tmp_path, host="node7")
    assert read_status(run, rundirs.STARTED + 60 + silence_s).state == state


def test_long_measurements_make_patient(tmp_path: Path) -> None:
    run = at_work(tmp_path)
    log(run, (0.0, "started", {}), (2000.0, "stage", {"name": "measuring policies"}), host="node7")
    assert read_status(run, rundirs.STARTED + 2000 + 19_000).state == "running"
    assert read_status(run, rundirs.STARTED + 2000 + 21_000).state == "dead"


def test_clocks_that_differ_are_noted(tmp_path: Path) -> None:
    found = read_status(at_work(tmp_path, host="node7"), rundirs.STARTED + 20)
    assert found.notes == ("clocks differ: the last sign of life lies 40 s in the future",)
    assert found.sign_s == 0


def test_runs_that_ended(tmp_path: Path) -> None:
    finished = at_work(tmp_path / "finished")
    rundirs.finish(finished)
    failed = at_work(tmp_path / "failed")
    failed.update(status="failed")
    log(failed, (0.0, "started", {}), *trials(), (70.0, "failed", {"error": "RuntimeError: boom"}))
    stopped = at_work(tmp_path / "stopped")
    stopped.update(status="interrupted", stopped="the search was stopped early, after 3.5 of 10 evaluations")
    found = {run.path.name: read_status(run, NOW) for run in (finished, failed, stopped)}
    assert {name: status.state for name, status in found.items()} == {
        "finished": "finished",
        "failed": "failed",
        "stopped": "interrupted",
    }
    assert found["failed"].error == "RuntimeError: boom"
    assert found["finished"].error is None
    assert found["stopped"].about["stopped"].endswith("3.5 of 10 evaluations")


def test_a_resumed_run_knows_what_was_measured_before_it_measures_again(tmp_path: Path) -> None:
    run = at_work(tmp_path)
    ended = (70.0, "failed", {"error": "OSError: disk full"})
    log(
        run, (0.0, "started", {}), *trials(), ended, (80.0, "resumed", {}), (81.0, "stage", {"name": "scoring choices"})
    )
    run.claim()
    found = read_status(run, NOW)
    run.release()
    assert (found.stage, found.evaluations) == ("scoring choices", 3.5)
    assert found.best is not None
    assert found.error is None  # that was the session before


def test_scoring_is_told_by_steps(tmp_path: Path) -> None:
    run = rundirs.start(tmp_path)
    steps = [(float(10 + 5 * n), "step", {"done": 10 * n, "total": 100}) for n in range(5)]
    log(run, (0.0, "started", {}), (5.0, "stage", {"name": "scoring choices"}), *steps)
    run.claim()
    found = read_status(run, rundirs.STARTED + 40)
    run.release()
    assert found.steps == (40, 100)
    assert found.left_s == pytest.approx(
        30 - 0.5
    )  # 2 a second; of the one at hand, no more than its half second is over


def test_damaged_and_partial_files_are_noted(tmp_path: Path) -> None:
    run = at_work(tmp_path)
    lines = run.file("trials.jsonl").read_text().splitlines()
    torn = "\n".join([lines[0], "{damaged", json.dumps({"number": 1}), *lines[3:], lines[0][:40]])
    run.file("trials.jsonl").write_text(torn)
    with run.file("log.jsonl").open("a") as file:
        file.write('{"time": 1')
    found = read_status(run, NOW)
    assert "1 damaged lines of trials.jsonl are left out" in found.notes
    assert "a line of trials.jsonl is no trial and left out" in found.notes
    assert found.best is not None
    for content in ("", "[1]", '{"status": "sleeping"}', "{}"):
        run.file("run.json").write_text(content)
        assert read_status(run, NOW).state == "damaged"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": [1]}, "config is [1], and should be an object"),
        ({"config": {"strategy": "x"}}, "config.strategy is 'x', and should be an object"),
        ({"config": {"strategy": {"evaluations": "x"}}}, "config.strategy.evaluations is 'x', and should be a number"),
        ({"config": {"strategy": {"seconds": [1]}}}, "config.strategy.seconds is [1], and should be a number"),
        ({"budget": "x"}, "budget is 'x', and should be an object"),
        ({"budget": {"quality_drop": "x"}}, "budget.quality_drop is 'x', and should be a number"),
        ({"seconds": "x"}, "seconds is 'x', and should be a number"),
    ],
)
def test_a_damaged_run_does_not_keep_the_others_from_being_shown(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(tmp_path)
    bad = RunDirectory(tmp_path / "1")
    bad.update(**change)
    found = read_status(bad, NOW)
    assert (found.state, found.about) == ("damaged", {})
    assert (found.error or "").startswith(f"run.json of {bad.path} is damaged: {message}; ")
    for options in ([], ["--json"], ["--watch", "0.05"]):
        assert main(["status", str(tmp_path), *options]) == 1
        assert "damaged" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "1")]) == 1
    assert re.search(r"^state +damaged *$", capsys.readouterr().out, re.MULTILINE)


def test_a_file_that_cannot_be_used_at_all_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = at_work(tmp_path)

    def touched(run: RunDirectory) -> list[float]:
        raise KeyError("beats")

    monkeypatch.setattr("search.status._touched", touched)
    found = read_status(run, NOW)
    assert found.state == "damaged"
    assert (found.error or "").startswith("a file of it is damaged (it has no 'beats'); ")


@pytest.mark.parametrize("change", [{"budget": {"foo": 1}}, {"budget": {"foo": 1, "size_ratio": 0.14}}])
def test_limits_of_another_version_are_ignored(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = at_work(tmp_path)
    rundirs.finish(run)
    run.update(**change)
    found = read_status(run, NOW)
    assert (found.state, found.error) == ("finished", None)
    assert found.best_text == "accuracy 0.9500, drop +0.0100, stored size 60.0 B"
    assert main(["status", str(tmp_path)]) == 0
    assert "stored size 60.0 B" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"number": [1]},
        {"metrics": "x"},
        {"metrics": {"quality": 0.99}},
        {"metrics": {"quality": "x", "drop": -1}},
        {"cost": {"weight_bytes": "x"}},
        {"fidelity": None},
        {"seconds": []},
    ],
)
def test_a_damaged_trial_is_left_out(change: dict[str, Any], tmp_path: Path) -> None:
    run = at_work(tmp_path)
    rundirs.finish(run)
    lines = run.file("trials.jsonl").read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | change)
    run.file("trials.jsonl").write_text("".join(f"{line}\n" for line in lines))
    found = read_status(run, NOW)
    assert found.state == "finished"
    assert "a line of trials.jsonl is no trial and left out" in found.notes
    assert found.best is not None
    assert found.best["trial"] == 0


def test_damaged_events_are_left_out(tmp_path: Path) -> None:
    run = at_work(tmp_path)
    broken = [{"event": "step"}, {"event": "step", "done": "x", "total": 2}, {"event": "trial", "number": [1]}]
    with run.file("log.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in [*broken, {"event": "stage", "time": "x"}]))
    run.claim()
    found = read_status(run, NOW)
    run.release()
    assert (found.state, found.stage, found.evaluations) == ("running", "measuring policies", 3.5)


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = rundirs.start(tmp_path)
    run.claim()
    found = read_status(run)
    run.release()
    assert (found.state, found.stage, found.evaluations, found.best) == ("running", None, 0, None)


def test_workers_say_what_they_do(tmp_path: Path) -> None:
    run = at_work(tmp_path)
    board = FolderBoard(run.file("workers") / "board")
    board.open({})
    board.post([Work("measure-t-n-p-1-abc123", "measure", {}), Work("score-77", "score", {})])
    board.beat("search-1", {"role": "search"})
    for name in ("local-1", "node7", "slow"):
        board.beat(name, {"role": "worker", "is_ready": True, "done": 3})
    assert board.claim("local-1") is not None
    assert board.claim("slow") is not None
    beats = run.file("workers") / "board" / "beats"
    for path in beats.iterdir():
        os.utime(path, (NOW - 1, NOW - 1))
    os.utime(beats / "slow", (NOW - 50, NOW - 50))
    (beats / "torn").write_text("{")
    (beats / "odd").write_text('{"facts": [1]}')
    (beats / "a~b~c").write_text("{}")
    (beats.parent / "claimed" / "00000009~measure-t-n-p-1-def456~a~b~c").write_text("{}")
    os.utime(beats / "a~b~c", (NOW - 1, NOW - 1))
    run.claim()
    found = {worker.name: worker for worker in read_status(run, NOW).workers}
    run.release()
    assert found["local-1"].doing == "measures abc123"
    assert found["local-1"].done == 3
    assert found["node7"].doing == "waits for work"
    assert found["search-1"].doing == "searches"
    assert found["slow"].doing == "silent for 50 s"
    assert found["torn"].doing == "says nothing that can be read"
    assert found["odd"].doing == "says nothing that can be read"
    assert found["a~b~c"].doing == "measures def456"


def test_totals_are_in_the_order_of_states() -> None:
    states = ("failed", "running", "running")
    found = totals([RunStatus(Path(), state, {}) for state in states])  # type: ignore[arg-type]
    assert list(found.items()) == [("running", 2), ("failed", 1)]


def sweep(folder: Path) -> None:
    rundirs.finish(at_work(folder / "0"))
    rundirs.finish(at_work(folder / "1"))
    at_work(folder / "2")


def test_the_command_shows_one_run_and_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path)
    assert main(["status", str(tmp_path / "0")]) == 0
    panel = capsys.readouterr().out
    assert re.search(r"^state +finished *$", panel, re.MULTILINE)
    assert re.search(r"^done +3\.5/10 evaluations, 5 policies tried *$", panel, re.MULTILINE)
    assert main(["status", str(tmp_path)]) == 1  # one is dead
    table = capsys.readouterr().out
    assert (
        len(re.findall(r"^ +[012] .* (finished|dead) .* 3\.5/10 .*drop \+0\.0100, 60\.0 B", table, re.MULTILINE)) == 3
    )
    assert table.rstrip().endswith("3 runs: 2 finished, 1 dead")


def test_the_command_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path)
    assert main(["status", str(tmp_path), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in rows] == ["finished", "finished", "dead"]
    assert rows[0]["path"] == str(tmp_path / "0")
    assert {"evaluations", "allowance", "left_s", "evaluations_per_s", "best", "workers", "sign_s"} <= rows[0].keys()


@pytest.mark.parametrize("given", [["nowhere"], ["."], [".", "--watch", "0"], [".", "--watch", "nan"]])
def test_what_cannot_be_used_is_refused(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status", *given]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_watching_ends_when_no_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = at_work(tmp_path)
    run.claim()
    looked = threading.Event()

    def finish() -> None:
        looked.wait(60)
        rundirs.finish(run)
        run.release()

    thread = threading.Thread(target=finish)
    thread.start()
    threading.Timer(0.3, looked.set).start()
    assert main(["status", str(tmp_path), "--watch", "0.05"]) == 0
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert " running · measuring policies · 3.5/10 evaluations · best accuracy 0.9500" in lines[0]
    assert " finished · 3.5/10 evaluations" in lines[-1]


def test_it_needs_nothing_heavy(tmp_path: Path) -> None:
    rundirs.finish(at_work(tmp_path))
    code = (
        "import sys; from search.cli import main; main(['status', sys.argv[1]]); "
        "print({'torch', 'pandas', 'scipy', 'mlflow', 'optuna', 'hydra'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "set()"
