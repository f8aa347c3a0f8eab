"""What is to be shown of a run, by hand-written run directories."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rundirs import HISTORY, MEASURED, POLICIES, finish, measure, start

from search.portrait import Point, best_points, history_points, parameters, portray, trial_points
from search.trials import Trial


def test_trial_points_hold_every_known_number_at_the_step_of_its_trial() -> None:
    points = list(trial_points(MEASURED[:3], 1000))
    first = {"seconds": 2.0, "fidelity": 1.0, "weight_bytes": 80.0, "quality": 0.9, "predicted": 0.1}
    infeasible = {"seconds": 0.0, "fidelity": 1.0, "weight_bytes": 40.0}
    assert [point for point in points if point.step == 0] == [Point(key, first[key], 3000, 0) for key in first]
    assert {point.key: point.value for point in points if point.step == 2} == infeasible
    assert {p.time for p in points if p.step == 1} == {4000}


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, [0.9, 0.95, 0.95]), (False, [0.9, 0.9, 0.7])])
def test_best_quality_counts_full_measurements_at_the_evaluation_they_end_in(
    higher_is_better: bool, best: list[float]
) -> None:
    points = list(best_points(MEASURED, 0, higher_is_better))
    assert [(p.key, p.step) for p in points] == [("best_quality", step) for step in (1, 3, 4)]  # 1, 2.5 and 3.5 spent
    assert [p.value for p in points] == best


def test_proposing_takes_time_of_policies_over_budget_too() -> None:
    slow = [replace(trial, proposing_seconds=0.5) for trial in MEASURED[:4]]
    assert [p.time for p in best_points(slow, 1000, True)] == [3500, 8000]
    assert {p.step: p.time for p in trial_points(slow, 1000)} == {0: 3500, 1: 5000, 2: 5500, 3: 8000}


def test_history_is_shown_at_the_evaluation_without_what_is_not_known() -> None:
    table = pd.DataFrame(HISTORY).assign(best_loss=[float("nan"), 0.1, 0.05, 0.05])
    points = list(history_points(table, 1000))
    assert [(p.step, p.value) for p in points if p.key == "hypervolume"] == [(1, 0.4), (2, 0.4), (3, 0.5), (4, 0.6)]
    assert [p.step for p in points if p.key == "best_loss"] == [2, 3, 4]
    assert {p.time for p in points if p.step == 3} == {6000}


def test_searches_can_be_compared_by_their_ends(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    assert not [p for p in portray(run).points if p.key in ("hypervolume", "search/hypervolume")]
    measure(run, MEASURED)
    finish(run)
    run.update(front_costs=["weight_bytes", "latency_s"])
    portrait = portray(run)
    final = {point.key: point.value for point in portrait.points if point.key.startswith("search/")}
    assert final == {
        "search/evaluations": 4,
        "search/seconds": 60,
        "search/hypervolume": 0.6,
        "search/primary_hypervolume": 0.7,
        "search/spent_seconds": 7,
    }
    assert portrait.tags["front_costs"] == "weight_bytes, latency_s"
    assert portrait.tags["strategy"] == portrait.parameters["strategy"] == "solver"


def test_numbers_that_are_not_finite_are_left_out() -> None:
    trial = Trial(0, POLICIES[0], 1.0, {"quality": float("nan")}, {"latency_s": float("inf")}, 1.0, "failed")
    assert [point.key for point in trial_points([trial], 0)] == ["seconds", "fidelity"]


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
    ("status", "expected"),
    [("running", "RUNNING"), ("finished", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED")],
)
def test_status_follows_the_run(tmp_path: Path, status: str, expected: str) -> None:
    run = start(tmp_path / "run")
    run.update(status=status)
    written = int(run.file("run.json").stat().st_mtime * 1000)
    portrait = portray(run)
    assert (portrait.status, portrait.ended) == (expected, None if status == "running" else written)
