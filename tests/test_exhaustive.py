"""Every policy within the budget: all of them, none twice, exactly the optimum, and a word where there are many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conformance import StrategyContract
from synthetic import Synthetic, make_synthetic
from tiny import SlowToUnpack, make_bench

from search.errors import ConfigError, InfeasibleError
from search.space import SearchSpace
from search.strategies.exhaustive import Exhaustive, points_within, readable

BENCH = make_bench()
SLOW = make_bench(cost_model=SlowToUnpack())


class TestExhaustive(StrategyContract):
    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Exhaustive(evaluations)


def quantiles(bench, share: float, *names: str) -> dict[str, float]:
    return {name: float(np.quantile(bench.costs(name), share)) for name in names}


LIMITS = {
    "bytes": (BENCH, quantiles(BENCH, 0.2, "weight_bytes")),
    "several": (BENCH, quantiles(BENCH, 0.5, "weight_bytes", "bit_ops")),
    "peak": (BENCH, quantiles(BENCH, 0.5, "activation_bytes")),
    "peak and bytes": (BENCH, quantiles(BENCH, 0.6, "activation_bytes", "weight_bytes")),
    "fewer bits are slower": (SLOW, quantiles(SLOW, 0.4, "latency_s", "weight_bytes")),
    "none": (BENCH, {}),
}


def feasible(bench, limits: dict[str, float]) -> set[tuple[int, ...]]:
    return {
        bench.space.encode(policy)
        for policy in bench.space
        if all(bench.pricing.costs(policy)[name] <= most for name, most in limits.items())
    }


@pytest.mark.parametrize("case", LIMITS)
def test_lists_exactly_what_keeps_the_limits(case: str) -> None:
    bench, limits = LIMITS[case]
    found = list(map(tuple, points_within(bench.pricing, limits, 10**6).tolist()))
    assert set(found) == feasible(bench, limits)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("options", [{}, {"share": 0.1}, {"quality_drop": 0.1}])
@pytest.mark.parametrize("seed", range(2))
def test_finds_exactly_the_optimum_and_ends(seed: int, options: dict, tmp_path: Path) -> None:
    problem = make_synthetic(seed, **options)
    trials, objective = problem.search(Exhaustive(), tmp_path / "trials.jsonl")
    assert problem.found(trials, objective) == problem.optimum
    assert {problem.bench.space.encode(t.policy) for t in trials} == feasible(problem.bench, problem.limits)
    assert objective.spent_evaluations == len(trials)
    assert not objective.is_scored, "nothing is scored"


def test_dearest_first_under_a_limit_and_cheapest_first_to_a_floor(tmp_path: Path) -> None:
    bench, limits = LIMITS["bytes"]
    trials, _ = Synthetic(bench, limits).search(Exhaustive(), tmp_path / "limit.jsonl")
    costs = [trial.cost["weight_bytes"] for trial in trials]
    assert costs == sorted(costs, reverse=True)
    problem = make_synthetic(1, quality_drop=0.1)
    trials, _ = problem.search(Exhaustive(), tmp_path / "floor.jsonl")
    first = next(trial for trial in trials if trial.drop <= 0.1)
    assert first.cost["weight_bytes"] == problem.optimum


def test_limits_and_floor_at_once(tmp_path: Path) -> None:
    bench, limits = LIMITS["peak and bytes"]
    problem = Synthetic(bench, limits, quality_drop=0.15)
    trials, objective = problem.search(Exhaustive(), tmp_path / "trials.jsonl")
    assert problem.found(trials, objective) == problem.optimum


def test_refuses_before_anything_is_measured(tmp_path: Path) -> None:
    problem = make_synthetic(0)
    kept = len(feasible(problem.bench, problem.limits))
    with pytest.raises(
        InfeasibleError, match=f"there are {kept} of the space's 648; strategy.largest={kept - 1} allows"
    ):
        problem.search(Exhaustive(largest=kept - 1), tmp_path / "trials.jsonl")
    assert not (tmp_path / "trials.jsonl").exists()
    trials, _ = problem.search(Exhaustive(largest=kept), tmp_path / "trials.jsonl")
    assert len(trials) == kept


def test_says_so_where_there_are_too_many_to_count(tmp_path: Path) -> None:
    formats = [f"int{bits}" for bits in range(2, 9)]
    bench = make_bench(weight=formats, input=[f"uint{bits}" for bits in range(2, 9)])
    assert bench.space.size == 7**7
    with pytest.raises(InfeasibleError, match="too many to count of the space's 823,543"):
        Synthetic(bench, {}).search(Exhaustive(largest=10), tmp_path / "trials.jsonl")


def test_large_numbers_are_readable() -> None:
    assert readable(823543) == "823,543"
    assert readable(6**40) == "about 10^31"


def test_a_tight_budget_makes_a_large_space_small() -> None:
    bench = make_bench(weight=[f"int{bits}" for bits in range(2, 9)], input=[f"uint{bits}" for bits in range(2, 9)])
    space: SearchSpace = bench.space
    lowest = bench.pricing.costs(space.decode([0] * len(space.decisions)))
    limits = {"weight_bytes": lowest["weight_bytes"], "bit_ops": lowest["bit_ops"]}
    assert points_within(bench.pricing, limits, 100).tolist() == [[0] * len(space.decisions)]


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"strategy\.largest=0 must be at least 1"):
        Exhaustive(largest=0)
