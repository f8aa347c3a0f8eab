"""What is to be shown of a run, by hand-written run directories."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rundirs import HISTORY, MEASURED, POLICIES, finish, measure, start

from search.events import EventLog
from search.portrait import (
    Point,
    best_points,
    corners,
    history_points,
    parameters,
    plan_values,
    portray,
    trial_points,
)
from search.trials import Trial


def test_trials_are_drawn_at_their_numbers_and_estimates_apart() -> None:
    stopped = replace(MEASURED[1], state="stopped", cost={"latency_s": 0.1, "bit_ops": 7.0})
    points = list(trial_points([MEASURED[0], stopped, MEASURED[2]], 1000, {"bit_ops_ratio": 0.5}))
    assert [(point.key, point.value) for point in points if point.step == 0] == [
        ("trial/quality", 0.9),
        ("trial/seconds", 2.0),
        ("trial/weight_bytes", 80.0),
    ]
    assert [(point.key, point.value) for point in points if point.step == 1] == [
        ("stopped/quality", 0.99),
        ("stopped/seconds", 1.0),
        ("stopped/latency_s", 0.1),
        ("stopped/bit_ops", 7.0),  # as the budget limits it
    ]
    assert {point.time for point in points} == {3000, 4000}
    assert 2 not in {point.step for point in points}  # over the budget, hence not measured


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, [0.9, 0.95, 0.95]), (False, [0.9, 0.9, 0.7])])
def test_best_quality_counts_full_measurements_at_the_evaluation_they_end_in(
    higher_is_better: bool, best: list[float]
) -> None:
    points = list(best_points(MEASURED, 0, higher_is_better, is_over=True))
    assert [(p.key, p.step) for p in points] == [("best_quality", step) for step in (1, 3, 4)]  # 1, 2.5 and 3.5 spent
    assert [p.value for p in points] == best


def test_proposing_takes_time_of_policies_over_budget_too() -> None:
    slow = [replace(trial, proposing_seconds=0.5) for trial in MEASURED[:4]]
    assert [p.time for p in best_points(slow, 1000, True, is_over=True)] == [3500, 8000]
    assert {p.step: p.time for p in trial_points(slow, 1000, {})} == {0: 3500, 1: 5000, 3: 8000}


def test_history_is_shown_at_the_evaluation_without_what_is_not_known() -> None:
    table = pd.DataFrame(HISTORY).assign(best_loss=[float("nan"), 0.1, 0.05, 0.05])
    points = list(history_points(table, 1000))
    assert [(p.step, p.value) for p in points if p.key == "hypervolume"] == [(1, 0.4), (2, 0.4), (3, 0.5), (4, 0.6)]
    assert [p.step for p in points if p.key == "best_loss"] == [2, 3, 4]
    assert {p.time for p in points if p.step == 3} == {6000}


def test_searches_can_be_compared_by_their_ends(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    assert portray(run).values == {}
    measure(run, MEASURED)
    finish(run)
    run.update(front_costs=["weight_bytes", "latency_s"])
    portrait = portray(run)
    totals = {name: portrait.values[name] for name in ("evaluations", "seconds", "wall_seconds")}
    assert totals == {"evaluations": 4, "seconds": 7, "wall_seconds": 60}
    ends = {point.key: point.value for point in portrait.series}
    assert (ends["hypervolume"], ends["primary_hypervolume"]) == (0.6, 0.7)
    assert portrait.tags["front_costs"] == "weight_bytes, latency_s"
    assert portrait.tags["strategy"] == portrait.parameters["strategy"] == "solver"


def test_numbers_that_are_not_finite_are_left_out() -> None:
    trial = Trial(0, POLICIES[0], 1.0, {"quality": float("nan")}, {"latency_s": float("inf")}, 1.0, "failed")
    assert list(trial_points([trial], 0, {})) == []
    values = plan_values({"drop": 0.02, "drop_high": float("nan"), "weight_bytes": 5.0, "latency_s": None}, None)
    assert values == {"drop": 0.02, "certain_drop": 0.02, "weight_bytes": 5.0}


def test_parameters_are_flat_and_fit_mlflow(tmp_path: Path) -> None:
    info = start(tmp_path / "run").info()
    info["config"]["task"] = {"note": "x" * 7000, "y" * 300: None}
    found = parameters(info)
    assert found["space.pins.layers._"] == "int8"
    assert found["space.weight"] == '["int4", "int8"]'
    assert found["budget.size_ratio"] == "0.14"
    assert found["task.note"] == "x" * 5997 + "..."
    assert max(map(len, found)) == 250
    assert not [key for key in found if key.startswith(("tracking", "run_root"))]


@pytest.mark.parametrize(
    ("values", "with_last", "kept"),
    [
        ([1, 1, 1, 2, 2, 3, 3, 3], True, [0, 2, 3, 4, 5, 7]),
        ([1, 1, 1, 2, 2, 3, 3, 3], False, [0, 2, 3, 4, 5]),
        ([1], False, [0]),
        ([], True, []),
    ],
)
def test_a_chart_needs_the_corners_of_a_series_only(values: list[int], with_last: bool, kept: list[int]) -> None:
    points = [Point("best", value, 0, step) for step, value in enumerate(values)]
    found = list(corners(points, with_last))
    assert [point.step for point in found] == kept
    if with_last and values:  # a line through what is left is the line through all
        line = np.interp(range(len(values)), kept, [point.value for point in found])
        assert line.tolist() == values


def test_a_search_that_was_stopped_says_so_until_it_goes_on(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    log = EventLog(run.file("log.jsonl"))
    log.write("interrupted", error="KeyboardInterrupt: an earlier attempt")
    log.write("stopped", seconds=1.0)
    run.update(status="interrupted")
    assert portray(run).tags["error"] == "stopped early"
    run.update(status="running")  # and nobody works on it
    assert portray(run).tags["error"] == "its process ended without saying why"
    run.update(status="finished")
    assert "error" not in portray(run).tags


@pytest.mark.parametrize(
    ("status", "expected"),
    [("running", "RUNNING"), ("finished", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED")],
)
def test_status_follows_the_run(tmp_path: Path, status: str, expected: str) -> None:
    run = start(tmp_path / "run")
    run.claim()
    run.update(status=status)
    written = int(run.file("run.json").stat().st_mtime * 1000)
    portrait = portray(run)
    run.release()
    assert (portrait.status, portrait.ended) == (expected, None if status == "running" else written)
