"""Asking a finished run again: answers keep the budget, say what was measured, and need no model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TinyTask

from hwmodels import Roofline, StorageModel, Workload
from search import answers
from search.answers import FORECASTS, MEASURED, pricing_of, resolve
from search.api import find_plan
from search.budget import Budget
from search.cli import main
from search.config import named_strategy
from search.errors import DataError, InfeasibleError
from search.plan import Plan
from search.resolve import question
from search.rundir import RunDirectory
from search.sensitivity.scoring import TABLE
from search.strategies.base import Strategy
from search.strategies.baselines import RandomSearch
from search.strategies.solver import Solver

SPACE = {"weight": ["int2", "int4", "int8"], "input": ["uint4", "uint8"], "ties": [["left", "right"]]}


def searched_with(strategy: Strategy, share: float, folder: Path) -> RunDirectory:
    find_plan(
        TinyTask(),
        hardware="storage",
        budget={"size_ratio": share},
        strategy=strategy,
        space=SPACE,
        quantizer={"repair": "none"},
        run_dir=folder,
    )
    return RunDirectory(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return searched_with(Solver(14), 0.3, tmp_path_factory.mktemp("finished") / "run")


def test_the_space_is_the_one_that_was_searched(finished: RunDirectory) -> None:
    pricing = pricing_of(finished, StorageModel(), Workload())
    assert [unit.layers for unit in pricing.space.units] == [("stem",), ("left", "right"), ("head",)]
    for trial in finished.trials():
        assert pricing.costs(trial.policy)["weight_bytes"] == trial.cost["weight_bytes"]


@pytest.mark.parametrize("share", [0.2, 0.25, 0.3])
def test_answers_keep_the_budget_best_first(finished: RunDirectory, share: float) -> None:
    resolved = resolve(finished, Budget(size_ratio=share), StorageModel(), Workload())
    limit = resolved.limits["weight_bytes"]
    assert resolved.answers
    assert all(answer.costs["weight_bytes"] <= limit for answer in resolved.answers)
    drops = [answer.drop for answer in resolved.answers]
    assert drops == sorted(drops)
    assert sum(answer.is_measured for answer in resolved.answers) <= MEASURED
    assert len(resolved.open) <= FORECASTS
    measured = {trial.digest: trial.drop for trial in finished.trials() if trial.state == "complete"}
    for answer in resolved.answers:
        assert answer.is_measured == (answer.policy.digest in measured)
        if answer.is_measured:
            assert (answer.drop, answer.deviation) == (measured[answer.policy.digest], 0.0)
        else:
            assert answer.deviation > 0
    best_known = [
        trial.drop for trial in finished.trials() if trial.state == "complete" and trial.cost["weight_bytes"] <= limit
    ]
    known = [answer.drop for answer in resolved.answers if answer.is_measured]
    assert known == sorted(best_known)[:MEASURED]


def test_a_quality_budget_is_answered_by_cost(finished: RunDirectory) -> None:
    resolved = resolve(finished, Budget(quality_drop=0.3), StorageModel(), Workload())
    allowed = [answer for answer in resolved.answers if answer.drop <= 0.3]
    assert allowed == list(resolved.answers[: len(allowed)])
    sizes = [answer.costs["weight_bytes"] for answer in allowed]
    assert sizes == sorted(sizes)


def test_another_device_is_priced_anew(finished: RunDirectory) -> None:
    resolved = resolve(finished, Budget(latency_ratio=2.0), Roofline("zen5"), Workload(batch=4))
    assert all(answer.costs["latency_s"] <= resolved.limits["latency_s"] for answer in resolved.answers)


def test_a_budget_that_cannot_be_met_names_the_tie(finished: RunDirectory) -> None:
    with pytest.raises(InfeasibleError, match=r"budget\.size_ratio=0\.001 cannot be met"):
        resolve(finished, Budget(size_ratio=0.001), StorageModel(), Workload())


def test_the_runs_own_agent_is_asked_too(tmp_path: Path) -> None:
    """It proposes for other budgets of the cost it knows, within them, and is left out where it knows nothing."""
    strategy = named_strategy("rl", {"evaluations": 4, "episodes": 4, "warmup": 4, "updates": 1})
    run = searched_with(strategy, 0.3, tmp_path / "run")
    pricing = pricing_of(run, StorageModel(), Workload())
    floats = pricing.reference("float")
    for budget in (Budget(size_ratio=0.2), Budget(size_ratio=0.25, quality_drop=0.1)):
        limits = budget.limits(floats)
        points = answers._by_agent(run, budget, pricing, limits)
        assert len(points)
        assert all(
            pricing.costs(pricing.space.decode(point))["weight_bytes"] <= limits["weight_bytes"] for point in points
        )
        assert resolve(run, budget, StorageModel(), Workload()).answers
    other = Budget(bit_ops_ratio=0.05)
    assert answers._by_agent(run, other, pricing, other.limits(floats)).shape == (0, len(pricing.space.decisions))


def test_what_is_written_is_whole_json(finished: RunDirectory, tmp_path: Path) -> None:
    resolved = resolve(finished, Budget(size_ratio=0.25), StorageModel(), Workload())
    written = json.loads(resolved.save(tmp_path).read_text())
    assert [answer["digest"] for answer in written["answers"]] == [a.policy.digest for a in resolved.answers]
    assert all(math.isfinite(value) for answer in written["answers"] for value in answer["costs"].values())


def test_a_run_without_sensitivities_says_so(tmp_path: Path) -> None:
    run = searched_with(RandomSearch(4), 0.5, tmp_path / "run")
    with pytest.raises(DataError, match=f"no {TABLE}.*strategy=auto"):
        resolve(run, Budget(size_ratio=0.5), StorageModel(), Workload())


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search from the command line, which knows how to build its task again."""
    folder = tmp_path_factory.mktemp("searched")
    settings = ["space.weight=[int2,int4,int8]", "space.input=[uint8]", "strategy.evaluations=6", "tracking=none"]
    assert main(["search", *settings, "quantizer.repair=none", f"run_dir={folder}/run", f"run_root={folder}"]) == 0
    return folder / "run"


def test_measuring_writes_a_plan_beside_what_was_known(searched: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resolve", str(searched), "budget.average_weight_bits=3", "--measure", "2"]) == 0
    assert "--measure N measures" in capsys.readouterr().out
    folder = searched / "resolved" / "budget.average_weight_bits=3"
    plan, run = Plan.load(folder / "plan.json"), RunDirectory(folder)
    assert plan.average_weight_bits <= 3
    before = {t.digest for t in RunDirectory(searched).trials() if t.cost["average_weight_bits"] <= 3}
    after = [trial.digest for trial in run.trials()]
    assert set(after[: len(before)]) == before, "what was measured comes along"
    assert len(after) == len(before) + 2
    np.testing.assert_equal(plan.selection.drop, min(trial.drop for trial in run.trials()))


def answered(run: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    assert main(["resolve", str(run), *overrides, "--out", str(folder)]) == 0
    return json.loads((folder / "resolved.json").read_text())


def test_another_workload_is_priced_with_the_runs_other_settings(searched: Path, tmp_path: Path) -> None:
    one = answered(searched, tmp_path / "one", "budget.size_ratio=0.3")
    four = answered(searched, tmp_path / "four", "workload.batch=4", "budget.size_ratio=0.3")
    seconds = {answer["digest"]: answer["costs"]["latency_s"] for answer in one["answers"]}
    shared = [answer for answer in four["answers"] if answer["digest"] in seconds]
    assert shared
    assert all(answer["costs"]["latency_s"] > seconds[answer["digest"]] for answer in shared)
    held = RunDirectory(searched).info()["config"]["workload"]
    _, _, workload, configuration = question(RunDirectory(searched), ["workload.batch=4"])
    assert workload == Workload(**held | {"batch": 4})
    assert configuration.workload == held | {"batch": 4}


def test_without_a_budget_the_runs_own_holds(searched: Path, tmp_path: Path) -> None:
    """On another device, here one of a file."""
    other = Path(__file__).parent / "devices" / "toy.yaml"
    found = answered(searched, tmp_path, f"hardware={other}")
    assert found["hardware"] == "toy"
    assert found["budget"] == {"size_ratio": 0.14}
    assert found["answers"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=text", "budget.size_ratio=0.1"], "everything else needs a new search"),
        (["workload={batch:4}"], "workload.KEY=VALUE"),
        (["workload.batch=abc"], "workload.batch=abc must be a whole number"),
        (["hardware=storage", "budget.size_ratio=null"], "name the budget to answer"),
        (["budget.size_ratios=0.1"], "size_ratios"),
        (["budget.size_ratio=0.1", "--measure", "0"], "--measure 0 must be at least 1"),
        (["budget.size_ratio=0.1", "hardware=zen55"], "hardware=zen55 is unknown"),
    ],
)
def test_questions_that_make_no_sense(
    searched: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["resolve", str(searched), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
