"""What is to be shown of a run, by hand-written run directories."""

from __future__ import annotations

from pathlib import Path

import pytest
from rundirs import MEASURED, POLICIES, start

from search.portrait import Point, parameters, portray, trial_points
from search.trials import Trial


def test_trial_points_hold_every_known_number_at_the_step_of_its_trial() -> None:
    points = list(trial_points(MEASURED[:3], 1000, True))
    first = {
        "seconds": 2.0,
        "fidelity": 1.0,
        "weight_bytes": 80.0,
        "quality": 0.9,
        "predicted": 0.1,
        "best_quality": 0.9,
    }
    infeasible = {"seconds": 0.0, "fidelity": 1.0, "weight_bytes": 40.0}
    assert [point for point in points if point.step == 0] == [Point(key, first[key], 3000, 0) for key in first]
    assert {point.key: point.value for point in points if point.step == 2} == infeasible
    assert {p.time for p in points if p.step == 1} == {4000}


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, [0.9, 0.95, 0.95]), (False, [0.9, 0.9, 0.7])])
def test_best_quality_counts_full_measurements_only(higher_is_better: bool, best: list[float]) -> None:
    points = [p for p in trial_points(MEASURED, 0, higher_is_better) if p.key == "best_quality"]
    assert [(p.step, p.value) for p in points] == list(zip([0, 3, 4], best, strict=True))


def test_numbers_that_are_not_finite_are_left_out() -> None:
    trial = Trial(0, POLICIES[0], 1.0, {"quality": float("nan")}, {"latency_s": float("inf")}, 1.0, "failed")
    assert [point.key for point in trial_points([trial], 0, True)] == ["seconds", "fidelity"]


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
