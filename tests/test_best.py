"""The best plan for a device and a budget, against a brute-force answer over plans written by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rundirs import POLICIES, finish, make_plan, start
from stores import make_root, plain_environment, runs_of

from search.budget import Budget
from search.cli import main
from search.commands.best import read_budget
from search.errors import ConfigError
from search.plan import Plan
from search.rundir import RunDirectory
from search.tracking.best import Question, find_best
from search.tracking.mirror import sync
from search.tracking.settings import TrackingSettings
from search.tracking.store import tracking_uri

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's, with SQLAlchemy 2.1

FRONTS = {
    ("zen5", 0): [(3, "front", 0.02, 0.03, 40.0, 2e-6), (5, "winner", 0.01, 0.015, 60.0, 3e-6)],
    ("zen5", 1): [(2, "front", 0.01, 0.02, 48.0, 1e-6), (9, "winner", 0.0, 0.011, 120.0, 9e-6)],
    ("npu", 0): [(1, "front", 0.005, 0.006, 30.0, math.nan), (2, "winner", 0.001, math.nan, 90.0, math.nan)],
}
"""Hardware and seed to plans: trial, role, drop, its upper end, bytes, seconds."""


def write_run(path: Path, hardware: str, seed: int) -> RunDirectory:
    run = start(path, run_id=f"{hardware}{seed}".ljust(32, "0"))
    finish(run)
    run.update(hardware=hardware, seed=seed)
    rows = []
    for trial, role, drop, drop_high, size, latency in FRONTS[hardware, seed]:
        row = {"role": role, "name": f"trial {trial}", "trial": trial, "digest": f"{hardware}{seed}{trial}"}
        row |= {"quality": 0.96 - drop, "drop": drop, "drop_low": None, "drop_high": drop_high, "verdict": "met"}
        row |= {"average_weight_bits": size / 10, "weight_bytes": size, "latency_s": latency}
        row |= {"selection_quality": 0.96 - drop}
        rows.append(row | {"policy": json.dumps(POLICIES[0].to_dict())})
    run.write_table("front.csv", pd.DataFrame(rows))
    plan = json.loads(run.file("plan.json").read_text())
    _, _, drop, drop_high, size, latency = FRONTS[hardware, seed][-1]
    plan["quality"] |= {"value": 0.96 - drop, "drop": drop, "drop_high": None if math.isnan(drop_high) else drop_high}
    plan["selection"] |= {"value": 0.96 - drop, "float_value": 0.96, "drop": drop}
    plan["average_weight_bits"] = size / 10
    plan["cost"]["weight_bytes"]["value"] = size
    plan["cost"]["latency_s"] = {
        "value": None if math.isnan(latency) else latency,
        "reference": 10e-6,
        "tier": "datasheet",
        "low": None,
        "high": None,
    }
    run.file("plan.json").write_text(json.dumps(plan))
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        plain_environment(patch)
        root = make_root(tmp_path_factory.mktemp("best") / "runs")
        for hardware, seed in FRONTS:
            sync(write_run(root / f"{hardware}-{seed}", hardware, seed), TrackingSettings(), root)
    return root


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_environment(monkeypatch)


def ask(root: Path, hardware: str = "zen5", budget: Budget | None = None, **options: Any) -> list[str]:
    question = Question("digits", hardware, budget or Budget(), **options)
    found = find_best(question, tracking_uri(None, root), root)
    return [plan.tags["digest"] for plan in found]


def expected(hardware: str, limits: dict[str, float], order: list[str], winners_only: bool = False) -> list[str]:
    """The answer by going through all plans."""
    plans = []
    for (device, seed), front in FRONTS.items():
        for trial, role, drop, drop_high, size, latency in front:
            values = {
                "selection_drop": drop,
                "certain_drop": drop if math.isnan(drop_high) else drop_high,
                "weight_bytes": size,
                "size_ratio": size / 480,
                "average_weight_bits": size / 10,
                "latency_s": latency,
                "latency_ratio": latency / 10e-6,
            }
            if device == hardware and (role == "winner" or not winners_only):
                plans.append((values, f"{device}{seed}{trial}"))
    kept = [plan for plan in plans if all(plan[0][name] <= limit for name, limit in limits.items())]
    return [digest for values, digest in sorted(kept, key=lambda plan: [plan[0][name] for name in order])]


@pytest.mark.parametrize("hardware", ["zen5", "npu"])
@pytest.mark.parametrize("limit", [0.09, 0.1, 0.125, 0.25])
def test_the_best_has_the_least_drop_within_the_budget(root: Path, hardware: str, limit: float) -> None:
    found = ask(root, hardware, Budget(size_ratio=limit))
    assert found == expected(hardware, {"size_ratio": limit}, ["selection_drop", "size_ratio"])


def test_ties_are_broken_by_the_limited_cost(root: Path) -> None:
    assert ask(root)[:3] == ["zen519", "zen512", "zen505"]  # the second and third drop alike; the second is smaller
    assert ask(root, budget=Budget(latency_s=3e-6, size_ratio=0.2)) == ["zen512", "zen505", "zen503"]


def test_several_limits_hold_at_once(root: Path) -> None:
    budget = Budget(latency_ratio=0.25, average_weight_bits=4.5, weight_bytes=1000)
    limits = {"latency_ratio": 0.25, "average_weight_bits": 4.5, "weight_bytes": 1000}
    assert ask(root, budget=budget) == expected("zen5", limits, ["selection_drop", "latency_ratio"]) == ["zen503"]


def test_a_limit_on_the_drop_minimises_cost_and_counts_the_interval(root: Path) -> None:
    found = ask(root, budget=Budget(quality_drop=0.02))
    assert (
        found
        == expected("zen5", {"certain_drop": 0.02}, ["weight_bytes", "selection_drop"])
        == ["zen512", "zen505", "zen519"]
    )
    assert ask(root, "npu", Budget(quality_drop=0.005)) == ["npu02"]  # no interval: the drop itself is held against it


def test_plans_can_be_ranked_by_a_cost(root: Path) -> None:
    assert ask(root, rank="latency_s") == expected("zen5", {}, ["latency_s", "selection_drop"])


def test_winners_alone_can_be_asked_for(root: Path) -> None:
    assert ask(root, winners_only=True) == expected("zen5", {}, ["selection_drop", "weight_bytes"], winners_only=True)


def test_it_is_one_search(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    calls = []
    real = MlflowClient.search_logged_models
    monkeypatch.setattr(
        MlflowClient, "search_logged_models", lambda *given, **named: calls.append(given) or real(*given, **named)
    )
    ask(root, budget=Budget(size_ratio=0.2))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "digit"], "no plan for task digit (did you mean 'digits'?); there are plans for digits"),
        (["--hardware", "zen4"], "on hardware zen4 (did you mean 'zen5'?); there are plans for npu, zen5"),
        (["--budget", "size_ratio=0.01"], "none of the 4 plans for digits on zen5 keeps the budget; the least that"),
        (
            ["--winners", "--budget", "size_ratio=0.12"],  # plans of 40 and 48 bytes keep it
            f"none of the 2 winners for digits on zen5 keeps the budget; the least that any of them has: size_ratio "
            f"{60 / 480:g}",
        ),
        (
            ["--hardware", "npu", "--metric", "latency_s"],
            "latency_s is known of no plan that was found; known are selection_drop,",
        ),
        (["--budget", "energy_j=1"], "the least that any of them has: energy_j unknown"),
        (["--budget", "siz_ratio=1"], "budget.siz_ratio is no setting (did you mean 'size_ratio'?)"),
        (["--budget", "size_ratio=much"], "--budget size_ratio=much must be KEY=NUMBER"),
        (["--budget", "size_ratio=1", "size_ratio=2"], "--budget gives size_ratio twice"),
        (["--model", "cafe"], "has a model fingerprint that begins with cafe; there are f00d"),
        (["--data", "cafe"], "has a data fingerprint that begins with cafe; there are beef"),
        (["--metric", "latency"], "--metric latency is unknown (did you mean 'latency_s'?); allowed: selection_drop"),
        (["--all", "0"], "--all 0 must be at least 1"),
    ],
)
def test_what_cannot_be_answered_says_why(
    root: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    asked = {"--task": "digits", "--hardware": "zen5", "--root": str(root)}
    given = [word for pair in asked.items() if pair[0] not in options for word in pair]
    assert main(["best", *given, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["best", "--task", "digits", "--hardware", "zen5", "--root", str(tmp_path)]) == 2
    assert f"there is no MLflow database {tmp_path}/mlflow.db" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_limits_may_be_written_as_for_a_search() -> None:
    assert read_budget(["budget.size_ratio=0.1", "latency_s=1e-3"]) == Budget(size_ratio=0.1, latency_s=1e-3)
    with pytest.raises(ConfigError, match="reference= is no limit"):
        read_budget(["reference=1"])


# The command


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A run root with one run whose winner's files are whole."""
    root = make_root(tmp_path / "runs")
    run = start(root / "run")
    finish(run)
    rows = [
        {"role": role, "name": f"trial {trial}", "trial": trial, "digest": digest, "verdict": "met"}
        | {
            "quality": 0.9,
            "drop": drop,
            "selection_quality": 0.97 - drop,
            "average_weight_bits": 4.0,
            "weight_bytes": 60.0,
            "policy": "{}",
        }
        for role, trial, digest, drop in [("front", 0, "other", 0.0), ("winner", 3, POLICIES[1].digest, 0.01)]
    ]
    run.write_table("front.csv", pd.DataFrame(rows))
    sync(run, TrackingSettings(), root)
    return root


def best(root: Path, *options: str) -> int:
    return main(["best", "--task", "digits", "--hardware", "zen5", "--root", str(root), *options])


@pytest.mark.parametrize("is_here", [True, False])
def test_the_winners_plan_is_written_with_its_tensors(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_here: bool
) -> None:
    if not is_here:
        shutil.rmtree(real / "run")  # as where the search ran on another machine
    assert best(real, "--winners", "--out", str(tmp_path / "deploy" / "mine.json")) == 0
    output = capsys.readouterr().out
    assert f"best: trial 3 of {real}/run" in output
    assert f"wrote {tmp_path}/deploy/mine.json (plan {POLICIES[1].digest})" in output
    assert Plan.load(tmp_path / "deploy" / "mine.json").digest == make_plan().digest


def test_a_plan_without_files_says_how_to_get_them(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [front] = [run.info.run_id for run in runs_of(real) if run.data.tags["role"] == "front"]
    where = f"its policy is in policy.json of MLflow's run {front} and {real}/run/front.csv"
    assert best(real) == 0
    output = capsys.readouterr().out
    assert f"only winners are files; {where}; for a plan that is a file, add --winners\n" in output
    assert "bitplan resolve" not in output  # which needs what a search scored
    (real / "run" / "sensitivity.npz").touch()
    assert best(real, "--out", "plan.json") == 2
    how = f"solved anew: bitplan resolve {real}/run budget.weight_bytes=60 --measure 1"
    assert (
        f"{where}; for a plan that is a file, add --winners; another plan of that size, {how}"
        in capsys.readouterr().err
    )
    assert best(real, "--winners") == 0
    assert f"plan: {real}/run/plan.json" in capsys.readouterr().out


def test_as_many_are_listed_as_asked_for(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert best(real, "--all", "1") == 0
    assert POLICIES[1].digest not in capsys.readouterr().out
    assert best(real) == 0
    assert f"{POLICIES[1].digest} (winner)" in capsys.readouterr().out


def test_it_is_ranked_by_the_split_that_searches_choose_by(tmp_path: Path) -> None:
    """The report split's drop is what is promised of the best, so that it must not be what it was chosen by."""
    root = make_root(tmp_path / "runs")
    run = write_run(root / "run", "zen5", 0)
    table = run.table("front.csv")
    assert table is not None
    table["selection_quality"] = [0.955, 0.95]  # the other way round than on the report split
    run.write_table("front.csv", table)
    sync(run, TrackingSettings(), root)
    assert ask(root) == ["zen503", "zen505"]
    assert ask(root, rank="drop") == ["zen505", "zen503"]


def test_what_only_shares_a_name_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_root(tmp_path / "runs")
    for name, changes in {
        "one": {"metric": "accuracy"},
        "two": {"metric": "squared error", "model": {"name": "Net", "fingerprint": "feed" * 4}},
    }.items():
        run = write_run(root / name, "zen5", 0)
        run.update(run_id=name.ljust(32, "0"), **changes)
        sync(run, TrackingSettings(), root)
    assert best(root) == 2
    said = capsys.readouterr().err
    assert "task digits on zen5 is the name of 2 things that cannot be compared: " in said
    assert "squared error of model feedfeed on data" in said
    assert "choose with --model or --data" in said
    assert best(root, "--model", "feedf") == 0
    assert "squared error" in capsys.readouterr().out
