"""Optuna's samplers as strategies: their contract, what each is told, when they end, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
from conformance import StrategyContract
from synthetic import Synthetic, make_synthetic
from tiny import SlowToUnpack, make_bench

from hwmodels import Precision
from search.config import build, compose
from search.errors import ConfigError
from search.policy import Policy
from search.strategies.base import Strategy
from search.strategies.penalty import penalised_loss
from search.strategies.samplers import AnySampler, CmaEs, Gp, Nsga2, Nsga3, OptunaSearch, Qmc, Tpe
from search.strategies.samplers.dialogue import MOST_IDLE
from search.trials import Trial

NAMED: dict[str, type[OptunaSearch]] = {kind.name: kind for kind in (Tpe, Nsga2, Nsga3, Gp, CmaEs, Qmc)}


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing every trial to disk takes longer than the searches here."""
    monkeypatch.setattr("search.files.os.fsync", lambda descriptor: None)


class TestNsga2(StrategyContract):
    evaluations = 8

    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Nsga2(evaluations, population=4)


class TestCmaEs(StrategyContract):
    evaluations = 8

    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: CmaEs(evaluations, population=4)


class TestQmc(StrategyContract):
    evaluations = 6

    @pytest.fixture
    def make_strategy(self):
        return Qmc


class TestBruteForce(StrategyContract):
    evaluations = 6

    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: AnySampler(evaluations, sampler=optuna.samplers.BruteForceSampler)


def complete(trials: list[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.state == "complete"]


def test_a_front_keeps_the_limits(tmp_path: Path) -> None:
    synthetic = make_synthetic(0, 0.3)
    trials, _ = synthetic.search(Nsga2(15, costs=["bit_ops", "weight_bytes"]), tmp_path / "trials.jsonl")
    [limit] = synthetic.limits.values()
    assert len(complete(trials)) == 15
    assert all(trial.cost["weight_bytes"] <= limit for trial in complete(trials))


def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, ...]]:
    """Records what samplers are told."""
    values: list[tuple[float, ...]] = []
    original = optuna.Study.tell

    def tell(study: optuna.Study, trial: optuna.Trial, given: list[float]) -> object:
        values.append(tuple(given))
        return original(study, trial, given)

    monkeypatch.setattr(optuna.Study, "tell", tell)
    return values


def test_samplers_without_constraints_are_told_a_penalty(monkeypatch, tmp_path: Path) -> None:
    values = told(monkeypatch)
    trials, objective = make_synthetic(0, 0.4).search(CmaEs(8), tmp_path / "trials.jsonl")
    assert trials[0].state == "infeasible"
    assert values[0] == (penalised_loss(objective, trials[0]),)
    assert set(values) == {(penalised_loss(objective, trial),) for trial in trials}


def test_samplers_are_told_true_costs_of_what_is_over_a_limit(monkeypatch, tmp_path: Path) -> None:
    values = told(monkeypatch)
    trials, _ = make_synthetic(0, 0.4).search(Tpe(8, costs=["bit_ops"]), tmp_path / "trials.jsonl")
    assert trials[0].state == "infeasible"
    assert values[0] == (0.0, trials[0].cost["bit_ops"])
    assert {cost for _, cost in values} == {trial.cost["bit_ops"] for trial in trials}


def test_a_policy_met_before_spends_nothing(monkeypatch, tmp_path: Path) -> None:
    """A sampler that says the same again and again is told the same, and the search goes on around the best."""
    values = told(monkeypatch)

    class Stubborn(optuna.samplers.RandomSampler):
        def sample_independent(self, study, trial, param_name, param_distribution):
            return 1

    synthetic = make_synthetic(0, 0.4)
    trials, _ = synthetic.search(AnySampler(20, sampler=Stubborn), tmp_path / "trials.jsonl")
    assert len(complete(trials)) == 20
    assert len({trial.digest for trial in trials}) == len(trials)
    assert len(values) > 3 * len(trials), "it repeated itself, for nothing"
    best = np.minimum.accumulate([trial.drop for trial in complete(trials)])
    assert best[-1] < best[1], "and steps from the best one helped"


@pytest.mark.parametrize("kind", [Tpe, Nsga2, CmaEs, Qmc])
def test_ends_when_everything_was_tried(kind: type[OptunaSearch], tmp_path: Path) -> None:
    bench = make_bench(weight=("int4", "int8"), input=("uint8",))
    synthetic = Synthetic(bench, {})
    trials, objective = synthetic.search(kind(200), tmp_path / "trials.jsonl")
    assert len(trials) <= bench.space.size == 16
    assert synthetic.found(trials, objective) == synthetic.optimum


@pytest.mark.parametrize("kind", [Tpe, Nsga2, CmaEs, Qmc])
@pytest.mark.parametrize("evaluations", [1, 12])
def test_ends_with_a_plan_under_a_budget_only_one_policy_keeps(kind, evaluations: int, tmp_path: Path) -> None:
    """On a device where fewer bits are slower, the uniform policies miss it; it takes the projection to meet it."""
    bench = make_bench(cost_model=SlowToUnpack())
    fast = Policy.uniform(bench.network, Precision.parse("int8/uint8"))
    small = {layer: Precision.parse("int2/uint8") if layer == "head" else fast[layer] for layer in fast}
    costs = bench.pricing.costs(Policy(small))
    limits = {"latency_s": costs["latency_s"], "weight_bytes": costs["weight_bytes"]}
    trials, _ = Synthetic(bench, limits).search(kind(evaluations), tmp_path / "trials.jsonl")
    assert complete(trials)
    assert len(trials) < 2 * MOST_IDLE + 60


def test_starts_come_first_and_are_not_asked_for_again(tmp_path: Path) -> None:
    synthetic = make_synthetic(0, 0.4)
    objective = synthetic.objective(tmp_path / "none.jsonl", Tpe())
    starts = [policy for policy in synthetic.policies() if objective.is_feasible(policy)][5:200:60]
    for name in ("tpe", "nsga2", "cmaes", "qmc"):
        trials, _ = synthetic.search(NAMED[name](8), tmp_path / f"{name}.jsonl", starts=lambda objective: starts)
        assert [trial.policy for trial in trials[: len(starts)]] == starts
        assert len({trial.digest for trial in trials}) == len(trials)


def test_where_the_drop_is_limited_nothing_dearer_than_the_best_is_measured(tmp_path: Path) -> None:
    trials, objective = make_synthetic(0, quality_drop=0.3).search(Nsga2(25), tmp_path / "trials.jsonl")
    cheapest = np.inf
    for trial in trials:
        cost = objective.primary(trial)
        assert cost < cheapest
        if max(objective.violations(trial).values()) <= 0:
            cheapest = cost


def test_populations_fit_the_evaluations() -> None:
    assert [Nsga2(evaluations).population for evaluations in (5, 40, 100, 1000)] == [8, 8, 20, 50]
    assert Nsga3(1000, population=7).population == 7


@pytest.mark.parametrize("name", NAMED)
def test_config_builds(name: str) -> None:
    strategy = build(compose([f"strategy={name}", "strategy.evaluations=7"]).strategy, Strategy, "strategy")
    assert type(strategy) is NAMED[name]
    assert (strategy.name, strategy.evaluations, strategy.costs) == (name, 7, ())


def test_any_sampler_by_its_target(tmp_path: Path) -> None:
    target = "strategy.sampler._target_=optuna.samplers.BruteForceSampler"
    given = ["strategy=optuna", target, "+strategy.sampler.avoid_premature_stop=true", "strategy.evaluations=648"]
    strategy = build(compose(given).strategy, Strategy, "strategy")
    assert vars(strategy)["sampler"] == "BruteForceSampler(avoid_premature_stop=True)"
    synthetic = Synthetic(make_bench(weight=("int4", "int8"), input=("uint8",)), {})
    trials, _ = synthetic.search(strategy, tmp_path / "trials.jsonl")
    assert len({trial.digest for trial in trials}) == 16, "all there are"


MISTAKES = [
    (["strategy=cmaes", "strategy.costs=[weight_bytes]"], "asks for a front, but cmaes minimises one number only"),
    (["strategy=tpe", "strategy.costs=[weight_byte]"], r"no cost \(did you mean 'weight_bytes'\?\)"),
    (["strategy=tpe", "strategy.costs=weight_bytes"], r"must be a list, such as \[weight_bytes\]"),
    (["strategy=tpe", "strategy.costs=[bit_ops,bit_ops]"], "names a cost twice"),
    (
        ["strategy=tpe", "strategy.tie=blocks"],
        r"strategy.tie=blocks is unknown \(did you mean 'block'\?\); allowed: auto",
    ),
    (["strategy=tpe", "strategy.startup=0"], "strategy.startup=0 must be at least 1"),
    (["strategy=gp", "strategy.evaluations=0"], "strategy.evaluations=0"),
    (["strategy=nsga2", "strategy.population=1"], "strategy.population=1 must be at least 2"),
    (["strategy=cmaes", "strategy.population=3"], "strategy.population=3 must be at least 4"),
    (["strategy=qmc", "strategy.sequence=lattice"], "strategy.sequence=lattice is unknown; allowed: sobol, halton"),
    (["strategy=optuna", "strategy.sampler._target_=optuna.samplers.PartialFixedSampler"], "takes no seed"),
    (["strategy=optuna", "strategy.sampler._partial_=false"], "made already and not with the run's seed"),
    (["strategy=optuna", "+strategy.sampler.seed=3"], "seed is the run's own"),
    (["strategy=optuna", "+strategy.sampler.depth=3"], r"TPESampler\(depth=3\) cannot be made: .*'depth'"),
    (["strategy=optuna", "strategy.sampler._target_=random.Random"], "takes no seed"),
    (["strategy=optuna", "strategy.sampler._target_=collections.Counter"], "must be an optuna.samplers.BaseSampler"),
    (
        ["strategy=optuna", "strategy.sampler._target_=optuna.samplers.CmaEsSampler", "strategy.costs=[bit_ops]"],
        "asks for a front, but CmaEsSampler minimises one number only",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(compose(overrides).strategy, Strategy, "strategy")


def test_costs_that_the_hardware_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategy\.costs names latency_s, which hardware storage does not predict"):
        make_synthetic(0).search(Tpe(4, costs=["latency_s"]), tmp_path / "trials.jsonl")
