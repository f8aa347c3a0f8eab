"""Baselines: what random search and uniform precisions measure, in which order, and that nothing is asked twice."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conformance import StrategyContract
from synthetic import Synthetic, make_synthetic
from tiny import SlowToUnpack, make_bench

from hwmodels import Precision
from search.objective import Objective, SpentError
from search.policy import Policy
from search.strategies.base import Strategy
from search.strategies.baselines import RandomSearch, Uniform, uniform_points
from search.strategies.listed import Listed
from search.strategies.solver import Solver
from search.strategies.surrogate import Surrogate
from search.trials import Trial, TrialLog


class TestRandomSearch(StrategyContract):
    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: RandomSearch(evaluations)


class TestUniform(StrategyContract):
    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Uniform(evaluations)


def run(problem: Synthetic, strategy: Strategy, folder: Path, seed: int = 0, **options) -> list[Trial]:
    return problem.search(strategy, folder / "trials.jsonl", seed, **options)[0]


def within(problem: Synthetic) -> list[Policy]:
    """The policies that keep the limit on bytes."""
    costs, most = problem.bench.costs("weight_bytes"), problem.limits["weight_bytes"]
    return [policy for policy, cost in zip(problem.policies(), costs, strict=True) if cost <= most]


def uniform(problem: Synthetic, name: str) -> Policy:
    return Policy.uniform(problem.bench.network, Precision.parse(name))


def test_uniform_measures_every_uniform_precision_from_least_noise_on(tmp_path: Path) -> None:
    problem = Synthetic(make_bench(), {})
    names = ["int8/uint8", "int4/uint8", "int8/uint4", "int4/uint4", "int2/uint8", "int2/uint4"]
    trials = run(problem, Uniform(), tmp_path)
    # 2^-16 + 2^-16 < 2^-8 + 2^-16 = 2^-16 + 2^-8 < 2^-8 + 2^-8 < 2^-4 + 2^-16 < 2^-4 + 2^-8
    assert [trial.policy for trial in trials] == [uniform(problem, name) for name in names]


def test_uniform_leaves_out_what_is_over_budget(tmp_path: Path) -> None:
    problem = Synthetic(make_bench(), {})
    middle = problem.bench.pricing.costs(uniform(problem, "int4/uint8"))["weight_bytes"]
    trials = run(Synthetic(problem.bench, {"weight_bytes": middle}), Uniform(), tmp_path)
    names = ["int4/uint8", "int4/uint4", "int2/uint8", "int2/uint4"]
    assert [trial.policy for trial in trials] == [uniform(problem, name) for name in names]


def test_where_no_uniform_precision_keeps_the_budget_the_nearest_policy_is_measured(tmp_path: Path) -> None:
    bench = make_bench(cost_model=SlowToUnpack())
    uniform_ones = [bench.pricing.costs(bench.space.decode(point)) for point in uniform_points(bench.space)]
    limits = {"latency_s": uniform_ones[0]["latency_s"] * 1.5, "weight_bytes": uniform_ones[0]["weight_bytes"] * 0.9}
    assert not any(all(costs[name] <= most for name, most in limits.items()) for costs in uniform_ones)
    (trial,) = run(Synthetic(bench, limits), Uniform(), tmp_path)
    assert trial.state == "complete"


def test_pins_stay_and_count_once() -> None:
    bench = make_bench(pins={"stem": "int8/uint8", "head": "int2"})
    points = uniform_points(bench.space)
    assert len(points) == len(set(points)) == 6
    for point in points:
        policy = bench.space.decode(point)
        assert (str(policy["stem"]), str(policy["head"].weight)) == ("int8/uint8", "int2")
        assert policy["left"] == policy["right"]
    one = make_bench(weight=("int8",), input=("uint8",))
    assert uniform_points(one.space) == [(0,) * len(one.space.decisions)]


@pytest.mark.parametrize("quality_drop", [None, 0.1])
def test_random_search_asks_for_nothing_twice(quality_drop: float | None, tmp_path: Path) -> None:
    problem = make_synthetic(0, share=0.1, quality_drop=quality_drop)
    trials, objective = problem.search(RandomSearch(60), tmp_path / "trials.jsonl")
    assert objective.spent_evaluations == len(trials) == 60
    assert {trial.state for trial in trials} == {"complete"}


def test_random_search_ends_when_hardly_anything_is_left(tmp_path: Path) -> None:
    problem = make_synthetic(0, share=0.02)
    kept = len(within(problem))
    trials, objective = problem.search(RandomSearch(100), tmp_path / "trials.jsonl")
    assert kept - 1 <= len(trials) <= kept < 30
    assert objective.spent_evaluations == len(trials)


def test_random_search_keeps_budgets_that_fewer_bits_exceed(tmp_path: Path) -> None:
    bench = make_bench(cost_model=SlowToUnpack())
    limits = {
        "latency_s": float(np.quantile(bench.costs("latency_s"), 0.3)),
        "weight_bytes": float(np.quantile(bench.costs("weight_bytes"), 0.9)),
    }
    trials = run(Synthetic(bench, limits), RandomSearch(30), tmp_path)
    assert len(trials) == 30
    assert {trial.state for trial in trials} == {"complete"}


def test_random_search_draws_the_whole_space(tmp_path: Path) -> None:
    problem = Synthetic(make_bench(), {})
    space = problem.bench.space
    points = np.array([space.encode(trial.policy) for trial in run(problem, RandomSearch(150), tmp_path)])
    for column, decision in zip(points.T, space.decisions, strict=True):
        size = len(decision.formats)
        assert np.allclose(np.bincount(column, minlength=size) / len(points), 1 / size, atol=0.12)


@pytest.mark.parametrize("make", [RandomSearch, Uniform, Solver, lambda n: Listed([], n)])
def test_starts_are_measured_first(make, tmp_path: Path) -> None:
    problem = make_synthetic(0)
    starts = [within(problem)[7], within(problem)[3]]
    trials = run(problem, make(6), tmp_path, starts=lambda objective: starts)
    assert [trial.policy for trial in trials[:2]] == starts
    assert len({trial.digest for trial in trials}) == len(trials)


def test_the_solver_learns_from_what_it_starts_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt: list[np.ndarray] = []
    fit = Surrogate.fit.__func__
    monkeypatch.setattr(
        Surrogate, "fit", classmethod(lambda cls, points, *given: learnt.append(points) or fit(cls, points, *given))
    )
    problem = make_synthetic(2, share=0.15)
    starts = within(problem)[5:8]
    trials = run(problem, Solver(9, front=0.0), tmp_path, starts=lambda objective: starts)
    space = problem.bench.space
    assert learnt[0][:3].tolist() == [list(space.encode(policy)) for policy in starts]
    assert len(trials) == len({trial.digest for trial in trials}) == 9


def test_listed_measures_starts_before_its_list_and_nothing_twice(tmp_path: Path) -> None:
    problem = Synthetic(make_bench(), {})
    names = ["int4/uint8", "int2/uint4"]
    policies = [uniform(problem, name) for name in names]
    start = uniform(problem, "int8/uint8")
    trials = run(
        problem, Listed([*policies, start], start_from="plan.json"), tmp_path, starts=lambda objective: [start]
    )
    assert [trial.policy for trial in trials] == [start, *policies]


def test_seconds_end_a_search_that_only_thinks(tmp_path: Path) -> None:
    """Draws that repeat cost no evaluation, but time."""
    problem = make_synthetic(0, share=0.02)
    strategy = RandomSearch(100, seconds=1e-9)
    objective: Objective = problem.objective(tmp_path / "trials.jsonl", strategy)
    with suppress(SpentError):
        strategy.search(problem.bench.space, objective, np.random.default_rng(0))
    assert len(TrialLog(tmp_path / "trials.jsonl").trials) == 1
