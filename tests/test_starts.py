"""Where strategies start from: solver's plans, runs, plans; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import Bench, make_bench, tiny_plan

from hwmodels import Precision
from search.errors import ConfigError
from search.files import write_json
from search.policy import Policy
from search.rundir import RunDirectory
from search.starts import MOST, starting_policies
from search.strategies.baselines import RandomSearch
from search.strategies.forecaster import forecasters
from search.strategies.penalty import UNMEASURED, penalised_loss


@pytest.fixture(scope="module")
def bench() -> Bench:
    return make_bench()


@pytest.fixture
def limits(bench: Bench) -> dict[str, float]:
    return {"weight_bytes": float(np.quantile(bench.costs("weight_bytes"), 0.3))}


def starts(bench: Bench, tmp_path: Path, source: str | None, limits, costs=(), **options) -> list[Policy]:
    strategy = RandomSearch(5, start_from=source)
    strategy.costs = costs
    objective = bench.objective(tmp_path / "log.jsonl", limits, strategy, **options)
    found = starting_policies(strategy, objective)
    assert all(objective.is_feasible(policy) for policy in found)
    assert len(set(found)) == len(found) <= MOST
    return found


def test_nothing_unless_asked_for(bench: Bench, tmp_path: Path, limits) -> None:
    assert starts(bench, tmp_path, None, limits) == []


def test_solver_gives_every_predictors_optimum(bench: Bench, tmp_path: Path, limits) -> None:
    found = starts(bench, tmp_path, "solver", limits)
    objective = bench.objective(tmp_path / "log.jsonl", limits, RandomSearch(5))
    feasible = [policy for policy in bench.space if objective.is_feasible(policy)]
    for source in forecasters(objective.sensitivity, bench.pricing):
        if source.name == "superposition":
            continue  # searched, not solved
        losses = source.losses(np.array([bench.space.encode(policy) for policy in feasible]))
        best = losses.min()
        assert any(losses[feasible.index(policy)] == pytest.approx(best, rel=1e-9) for policy in found), source.name


def test_solver_gives_points_along_the_front(bench: Bench, tmp_path: Path) -> None:
    for options in ({"quality_drop": 0.1}, {"costs": ("bit_ops",)}):
        found = starts(bench, tmp_path, "solver", {}, **options)
        bits = [policy.average_weight_bits(bench.network) for policy in found]
        assert len(found) >= 3
        assert max(bits) - min(bits) > 3, "spread from few bits to many"


def test_a_plan_and_a_run(bench: Bench, tmp_path: Path, limits) -> None:
    large, small = (Policy.uniform(bench.network, Precision.parse(name)) for name in ("int8/uint8", "int2/uint4"))
    folder = tmp_path / "run"
    folder.mkdir()
    tiny_plan(bench, folder, large).save(folder / "plan.json")
    from_plan = starts(bench, tmp_path, str(folder / "plan.json"), {})
    assert from_plan == [large]
    within = starts(bench, tmp_path, str(folder / "plan.json"), limits)
    assert within != [large], "brought within the limits"
    objective = bench.objective(folder / "trials.jsonl", {}, RandomSearch(5))
    objective.map([large, small])
    write_json(folder / "run.json", {"primary_cost": "weight_bytes"})
    found = starts(bench, tmp_path, str(folder), {})
    assert found[0] == large, "the winner first"
    assert found[1:] == [small]


@pytest.mark.parametrize("make", ["missing", "empty"])
def test_what_is_no_start(bench: Bench, tmp_path: Path, make: str) -> None:
    path = tmp_path / make
    if make == "empty":
        path.mkdir()
    with pytest.raises(ConfigError, match=rf"strategy.start_from={path}.*give solver, a run directory or a plan.json"):
        starts(bench, tmp_path, str(path), {})


def test_plans_of_other_spaces_and_networks(bench: Bench, tmp_path: Path) -> None:
    plan = tiny_plan(bench, tmp_path, Policy.uniform(bench.network, Precision.parse("int8/uint8")))
    plan.save(tmp_path / "plan.json")
    other = make_bench(weight=("int3", "int5"))
    with pytest.raises(ConfigError, match=r"has no policy of this space: layer stem: weight format int8 is outside"):
        starts(other, tmp_path, str(tmp_path / "plan.json"), {})


def test_a_run_that_measured_nothing(bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunDirectory(folder).path.mkdir()
    write_json(folder / "run.json", {})
    with pytest.raises(ConfigError, match="nothing was measured there"):
        starts(bench, tmp_path, str(folder), {})


def test_penalised_loss(bench: Bench, tmp_path: Path) -> None:
    """Within limits it is the relative drop or cost; over them it grows, and no policy over budget beats one within."""
    costs = bench.costs("weight_bytes")
    limit = float(np.quantile(costs, 0.5))
    objective = bench.objective(tmp_path / "cost.jsonl", {"weight_bytes": limit}, RandomSearch(700))
    trials = objective.map(list(bench.space)[::9])
    for trial in trials:
        loss = penalised_loss(objective, trial)
        if trial.state == "complete":
            assert loss == pytest.approx(trial.drop / objective.float_quality)
        else:
            assert loss == pytest.approx(UNMEASURED + 10 * (trial.cost["weight_bytes"] / limit - 1))
    objective = bench.objective(tmp_path / "drop.jsonl", {}, RandomSearch(700), quality_drop=0.3)
    floats = bench.pricing.reference("float")["weight_bytes"]
    for trial in objective.map(list(bench.space)[::25]):
        over = max(trial.certain_drop - 0.3, 0.0) / objective.float_quality
        assert penalised_loss(objective, trial) == pytest.approx(trial.cost["weight_bytes"] / floats + 10 * over)
