"""Strategies beyond their contract: the optimum of small spaces, constraints, and what they refuse."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tiny import Bench, SlowToUnpack, TinyTask, make_bench

from hwmodels import Precision
from search.errors import ConfigError
from search.objective import Objective, SpentError
from search.policy import Policy
from search.run import ensure_measured
from search.shortlist import best_trial
from search.strategies.base import Strategy
from search.strategies.baselines import RandomSearch, lower_until_feasible
from search.strategies.samplers import Tpe
from search.strategies.solver import Solver
from search.trials import Trial, TrialLog


def run(
    bench: Bench, strategy: Strategy, folder: Path, limits: dict[str, float], seed: int = 0, **options
) -> tuple[list[Trial], Objective]:
    objective = bench.objective(folder / "trials.jsonl", limits, strategy, **options)
    with suppress(SpentError):
        strategy.search(bench.space, objective, np.random.default_rng(seed))
    return TrialLog(folder / "trials.jsonl").trials, objective


def every_policy(bench: Bench) -> list[tuple[Policy, float, float]]:
    """Policy, drop and bytes of the whole space, measured."""
    return [
        (policy, bench.evaluator.measure(policy, "selection").drop, bench.pricing.costs(policy)["weight_bytes"])
        for policy in bench.space
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_solver_finds_the_true_optimum_of_a_small_space(seed: int, share: float, tmp_path: Path) -> None:
    bench = make_bench(TinyTask(seed), input=("uint8",))
    every = every_policy(bench)
    limit = float(np.quantile([cost for *_, cost in every], share))
    trials, objective = run(bench, Solver(evaluations=81), tmp_path, {"weight_bytes": limit})
    best = min((trial for trial in trials), key=objective.rank)
    assert best.drop == min(drop for _, drop, cost in every if cost <= limit)
    assert len(trials) < 81, "not by trying everything"
    assert len({trial.digest for trial in trials}) == len(trials), "nothing is proposed twice"


def test_solver_starts_at_the_predicted_optimum(bench: Bench, tmp_path: Path) -> None:
    limit = float(np.median(bench.costs("weight_bytes")))
    trials, objective = run(bench, Solver(evaluations=6), tmp_path, {"weight_bytes": limit})
    best = min(objective.predict(policy) for policy in bench.space if objective.is_feasible(policy))
    assert trials[0].metrics["predicted"] == pytest.approx(best, rel=1e-9)
    assert trials[1].metrics["predicted"] >= trials[0].metrics["predicted"]


@pytest.mark.parametrize("allowed", [0.0, 0.02, 0.08, 0.3])
@pytest.mark.parametrize("seed", range(2))
def test_solver_finds_a_cheap_policy_for_a_quality_drop(seed: int, allowed: float, tmp_path: Path) -> None:
    bench = make_bench(TinyTask(seed), input=("uint8",))
    every = every_policy(bench)
    trials, objective = run(bench, Solver(evaluations=60), tmp_path, {}, quality_drop=allowed)
    best = min(trials, key=objective.rank)
    tried = {trial.digest for trial in trials}
    for neighbour in bench.space.neighbours(best.policy):
        cheaper = bench.pricing.costs(neighbour)["weight_bytes"] < best.cost["weight_bytes"]
        assert not cheaper or neighbour.digest in tried, "it ends where no cheaper neighbour is left"
    within = sorted(cost for _, drop, cost in every if drop <= allowed)
    if within:
        assert best.drop <= allowed
        assert within.index(best.cost["weight_bytes"]) <= 0.1 * len(every), "close to the cheapest"
    else:
        assert best.drop == min(drop for _, drop, _ in every)


def test_solver_holds_limits_and_drop_at_once(bench: Bench, tmp_path: Path) -> None:
    limits = {"bit_ops": float(np.quantile(bench.costs("bit_ops"), 0.3)), "weight_bytes": 600.0}
    trials, _ = run(bench, Solver(evaluations=15), tmp_path, limits, quality_drop=0.2, primary_cost="bit_ops")
    assert trials
    assert all(trial.cost[name] <= limit for trial in trials for name, limit in limits.items())


def test_solver_starts_where_the_cheapest_is_over_another_limit(tmp_path: Path) -> None:
    """The fastest policies are the largest and lose least: their predicted loss is out of reach for small ones."""
    bench = make_bench(cost_model=SlowToUnpack())
    limits = {
        "latency_s": max(bench.costs("latency_s")),
        "weight_bytes": float(np.quantile(bench.costs("weight_bytes"), 0.1)),
    }
    trials, _ = run(bench, Solver(evaluations=5), tmp_path, limits, quality_drop=0.5, primary_cost="latency_s")
    assert {trial.state for trial in trials} == {"complete"}


@pytest.mark.parametrize("strategy", [Solver(12), Tpe(12), RandomSearch(12)], ids=["solver", "tpe", "random"])
def test_strategies_hold_peaks(strategy: Strategy, bench: Bench, tmp_path: Path) -> None:
    limit = float(np.median(bench.costs("activation_bytes")))
    trials, _ = run(bench, strategy, tmp_path, {"activation_bytes": limit})
    assert sum(trial.state == "complete" for trial in trials) > 3
    assert all(trial.state == "infeasible" or trial.cost["activation_bytes"] <= limit for trial in trials)


def test_tpe_tries_uniform_policies_first(bench: Bench, tmp_path: Path) -> None:
    trials, _ = run(bench, Tpe(5), tmp_path, {})
    expected = ["int8/uint8", "int4/uint8", "int2/uint4"]
    assert [trial.policy for trial in trials[:3]] == [
        Policy.uniform(bench.network, Precision.parse(name)) for name in expected
    ]


def test_tpe_states_constraints(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    stated = []
    original = optuna.trial.Trial.set_constraint
    monkeypatch.setattr(
        optuna.trial.Trial, "set_constraint", lambda self, *given: stated.append(given) or original(self, *given)
    )
    limit = float(np.median(bench.costs("weight_bytes")))
    trials, _ = run(bench, Tpe(12), tmp_path, {"weight_bytes": limit}, quality_drop=0.1)
    assert {name for name, _ in stated} == {"weight_bytes", "quality_drop"}
    first = dict(stated[:2])
    assert first["weight_bytes"] == trials[0].cost["weight_bytes"] / limit - 1 > 0
    assert first["quality_drop"] == 1.0


def test_tpe_learns_what_is_within_budget(bench: Bench, tmp_path: Path) -> None:
    """Under a tight limit its later proposals keep it more often than uniform draws do."""
    costs = bench.costs("weight_bytes")
    limit = float(np.quantile(costs, 0.2))
    kept = []
    for seed in range(6):
        trials, _ = run(bench, Tpe(25), tmp_path / str(seed), {"weight_bytes": limit}, seed=seed)
        kept.append(np.mean([trial.state == "complete" for trial in trials[len(trials) // 2 :]]))
    assert np.mean(kept) > 0.4


def test_random_search_lowers_until_the_budget_is_kept(bench: Bench, tmp_path: Path) -> None:
    limit = float(np.quantile(bench.costs("weight_bytes"), 0.05))
    trials, objective = run(bench, RandomSearch(15), tmp_path, {"weight_bytes": limit})
    assert {trial.state for trial in trials} == {"complete"}
    rng = np.random.default_rng(0)
    policy = Policy.uniform(bench.network, Precision.parse("int8/uint8"))
    lowered = lower_until_feasible(bench.space, objective, policy, rng)
    assert objective.is_feasible(lowered)
    assert all(a <= b for a, b in zip(bench.space.encode(lowered), bench.space.encode(policy), strict=True))
    impossible = bench.objective(tmp_path / "other.jsonl", {"weight_bytes": 1.0}, RandomSearch(5))
    assert set(bench.space.encode(lower_until_feasible(bench.space, impossible, policy, rng))) == {0}


@pytest.mark.parametrize("strategy", [Solver(5), Tpe(5), RandomSearch(5)], ids=["solver", "tpe", "random"])
def test_a_space_of_one_policy(strategy: Strategy, tmp_path: Path) -> None:
    bench = make_bench(weight=("int8",), input=("uint8",))
    for number, options in enumerate(({}, {"quality_drop": 0.1})):
        folder = tmp_path / str(number)
        folder.mkdir()
        trials, _ = run(bench, strategy, folder, {}, **options)
        assert len(trials) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomSearch(evaluations=0), "strategy.evaluations=0 must be at least 1"),
        (lambda: Tpe(seconds=0), "strategy.seconds=0 must be above 0"),
        (lambda: Solver(front=1.0), "strategy.front=1.0 must be at least 0 and below 1"),
        (lambda: Solver(front=-0.1), "strategy.front=-0.1"),
    ],
)
def test_settings_out_of_range(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


class Blind(Strategy):
    """Proposes nothing that is within the budget."""

    name = "blind"

    def search(self, space, objective, rng):
        while True:
            objective(space.decode([len(decision.formats) - 1 for decision in space.decisions]))


def test_there_is_a_plan_even_if_a_strategy_finds_none(bench: Bench, tmp_path: Path) -> None:
    limit = float(np.quantile(bench.costs("weight_bytes"), 0.1))
    trials, objective = run(bench, Blind(3), tmp_path, {"weight_bytes": limit})
    assert {trial.state for trial in trials} == {"infeasible"}
    for _ in range(2):  # the second time there is nothing to do
        ensure_measured(objective, TrialLog(tmp_path / "trials.jsonl"))
        trials = TrialLog(tmp_path / "trials.jsonl").trials
        assert best_trial(objective, trials).cost["weight_bytes"] <= limit
        assert len(trials) == 2


@pytest.mark.parametrize("front", [0.0, 0.9])
def test_shares_at_their_ends(front: float, bench: Bench, tmp_path: Path) -> None:
    trials, _ = run(bench, Solver(8, front=front), tmp_path, {"weight_bytes": 500.0})
    assert len(trials) == 8
