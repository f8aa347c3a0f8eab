"""Evolution: offspring against the limits, races that save samples, and the optimum of a small space."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conformance import StrategyContract
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import FormulaEvaluator, Synthetic, make_synthetic
from tiny import SlowToUnpack, make_bench

from search.errors import ConfigError
from search.quality.evaluate import Quality
from search.strategies.bounds import Bounds
from search.strategies.evolution import Evolution, switch_levels

EVALUATIONS = 100  # in which the optimum of the synthetic problem is reached
BENCH = make_bench()
SLOW = make_bench(cost_model=SlowToUnpack())
POINTS = np.array([BENCH.space.encode(policy) for policy in BENCH.space])
COSTS = {
    "weight_bytes": (BENCH, np.array(BENCH.costs("weight_bytes"))),
    "activation_bytes": (BENCH, np.array(BENCH.costs("activation_bytes"))),
    "latency_s": (SLOW, np.array(SLOW.costs("latency_s"))),
}


class TestEvolution(StrategyContract):
    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Evolution(evaluations, fidelities=())


class InParts(FormulaEvaluator):
    """600 samples in batches: the fewer are measured, the wider the interval around the same drop."""

    batches = 60

    def measure(self, policy, split, fidelity=1.0):
        whole = super().measure(policy, split)
        batches = math.ceil(fidelity * self.batches)
        samples = 600 * batches // self.batches
        half = 0.1 / math.sqrt(samples)
        return Quality(whole.value, samples, whole.drop, whole.drop - half, whole.drop + half)


def in_parts(seed: int = 0, batches: int = 60, **options) -> Synthetic:
    problem = make_synthetic(seed, **options)
    problem.__dict__["evaluator"] = InParts(problem.bench, seed)
    problem.evaluator.batches = batches
    return problem


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("options", [{}, {"quality_drop": 0.2}])
def test_reaches_the_optimum(seed: int, options: dict, tmp_path: Path) -> None:
    problem = make_synthetic(seed, **options)
    trials, objective = problem.search(Evolution(EVALUATIONS), tmp_path / "trials.jsonl", seed)
    assert problem.found(trials, objective) == pytest.approx(problem.optimum)
    assert objective.spent_evaluations <= EVALUATIONS
    asked = [(trial.digest, trial.fidelity) for trial in trials]
    assert len(set(asked)) == len(asked) == len([t for t in trials if t.state == "complete"]), "each once, all feasible"


@pytest.mark.parametrize("options", [{}, {"quality_drop": 0.2}])
def test_races_save_samples(options: dict, tmp_path: Path) -> None:
    """With races, many more policies are looked at for the same number of samples, and no other optimum is found."""
    problem = in_parts(3, **options)
    trials, objective = problem.search(Evolution(30), tmp_path / "raced.jsonl", 3)
    plain, others = problem.search(Evolution(30, fidelities=()), tmp_path / "plain.jsonl", 3)
    seen, looked_at = len({t.digest for t in trials}), len({t.digest for t in plain})
    assert seen > 2 * looked_at or seen > 100
    measured = sum(trial.metrics["samples"] for trial in trials) / 600
    assert measured == pytest.approx(objective.spent_evaluations, rel=0.1)
    assert problem.found(trials, objective) <= problem.found(plain, others) * (1 + 1e-9)
    part = {trial.digest for trial in trials if trial.fidelity < 1}
    whole = {trial.digest for trial in trials if trial.fidelity == 1.0}
    assert len(part - whole) > len(whole), "most were never measured in full"


def test_a_race_measures_fewer_on_more(tmp_path: Path) -> None:
    """16 offspring on a sixteenth, 4 on a quarter, 1 in full: an evaluation's worth each."""
    problem = in_parts(0)
    trials, _ = problem.search(Evolution(12), tmp_path / "trials.jsonl")
    start = next(number for number, trial in enumerate(trials) if trial.fidelity < 1) + 2  # after what shares hold
    stages = [trial.fidelity for trial in trials[start : start + 21]]
    assert stages == [0.0625] * 16 + [0.25] * 4 + [1.0]
    first, second = trials[start : start + 16], trials[start + 16 : start + 20]
    best = sorted(first, key=lambda trial: (trial.drop, trial.cost["weight_bytes"]))[:4]
    assert {trial.digest for trial in second} == {trial.digest for trial in best}


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_too_few_batches_are_measured_in_full(batches: int, tmp_path: Path) -> None:
    """A sixteenth of two batches is one half: the first parent shows it, and nobody else is measured in part."""
    trials, _ = in_parts(0, batches).search(Evolution(20, fidelities=(1 / 16,)), tmp_path / "trials.jsonl")
    assert len([trial for trial in trials if trial.fidelity < 1]) == 1
    assert len([trial for trial in trials if trial.fidelity == 1.0]) > 15


def test_a_floor_is_kept_surely_and_races_judge_by_it(tmp_path: Path) -> None:
    problem = in_parts(1, quality_drop=0.15)
    trials, objective = problem.search(Evolution(60), tmp_path / "trials.jsonl", 1)
    best = min((t for t in trials if t.fidelity == 1.0), key=objective.rank)
    assert best.certain_drop <= 0.15
    allowed = [
        cost
        for policy, cost in zip(problem.policies(), problem.bench.costs("weight_bytes"), strict=True)
        if (quality := problem.evaluator.measure(policy, "selection")).drop_high <= 0.15 and quality
    ]
    assert best.cost["weight_bytes"] == min(allowed)


def test_offspring_are_cheaper_than_the_cheapest_allowed(tmp_path: Path) -> None:
    trials, _ = make_synthetic(1, quality_drop=0.1).search(Evolution(40), tmp_path / "trials.jsonl", 1)
    least = math.inf
    whole = [trial for trial in trials if trial.fidelity == 1.0]
    settled = 1 + next(n for n, trial in enumerate(trials) if trial.fidelity < 1)
    for number, trial in enumerate(whole):
        if number >= settled:
            assert trial.cost["weight_bytes"] < least
        if trial.certain_drop <= 0.1:
            least = min(least, trial.cost["weight_bytes"])
    assert len(whole) > settled + 10


@pytest.mark.parametrize(
    ("names", "quality_drop", "slow"),
    [
        (("weight_bytes", "bit_ops"), None, False),
        (("activation_bytes",), None, False),
        (("activation_bytes", "weight_bytes"), 0.2, False),
        (("latency_s", "weight_bytes"), None, True),
        (("latency_s", "weight_bytes"), 0.3, True),
    ],
)
def test_several_limits_and_peaks(names, quality_drop, slow: bool, tmp_path: Path) -> None:
    bench = SLOW if slow else BENCH
    problem = Synthetic(bench, {name: float(np.quantile(bench.costs(name), 0.5)) for name in names}, quality_drop)
    trials, objective = problem.search(Evolution(60), tmp_path / "trials.jsonl")
    assert {trial.state for trial in trials} == {"complete"}, "only policies within the limits are asked for"
    assert problem.found(trials, objective) == pytest.approx(problem.optimum)


def test_starts_are_the_first_parents(tmp_path: Path) -> None:
    problem = make_synthetic(0)
    objective = problem.objective(tmp_path / "none.jsonl", Evolution())
    starts = [policy for policy in problem.policies() if objective.is_feasible(policy)][5:7]
    trials, _ = problem.search(Evolution(10, fidelities=()), tmp_path / "trials.jsonl", starts=lambda objective: starts)
    assert [trial.policy for trial in trials[:2]] == starts
    space = problem.bench.space
    changed = np.subtract(space.encode(trials[2].policy), [space.encode(policy) for policy in starts])
    assert min((change != 0).sum() for change in changed) <= 6
    assert trials[2].policy != objective.space.decode([0] * len(space.decisions))


def test_ends_when_nothing_new_can_be_bred(tmp_path: Path) -> None:
    problem = make_synthetic(0, share=0.02)
    trials, objective = problem.search(Evolution(1000), tmp_path / "trials.jsonl")
    kept = sum(objective.is_feasible(policy) for policy in problem.policies())
    whole = [trial for trial in trials if trial.fidelity == 1.0]
    assert len({trial.digest for trial in whole}) == len(whole) <= kept
    assert problem.found(trials, objective) == problem.optimum


def test_what_races_left_behind_is_measured_in_the_end(tmp_path: Path) -> None:
    problem = in_parts(0, share=0.05)
    trials, objective = problem.search(Evolution(200), tmp_path / "trials.jsonl")
    assert {t.digest for t in trials if t.fidelity < 1} <= {t.digest for t in trials if t.fidelity == 1.0}
    assert problem.found(trials, objective) == problem.optimum


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.sampled_from(list(COSTS)))
def test_offspring_keep_the_limits_and_differ_by_few_formats(seed: int, share: float, cost: str) -> None:
    bench, costs = COSTS[cost]
    limits = {cost: float(np.quantile(costs, share))}
    bounds, rng = Bounds(bench.pricing, limits), np.random.default_rng(seed)
    kept, is_clear = costs <= limits[cost], np.abs(costs / limits[cost] - 1) > 1e-9
    assert bounds.keep(POINTS)[kept].all()
    for found in (bounds.keep(POINTS), bounds.excess(POINTS) == 0):
        assert np.array_equal(found[is_clear], kept[is_clear]), "but for rounding"
    parents = POINTS[kept][rng.integers(kept.sum(), size=3)]
    children = switch_levels(bench.space, parents, 50, bounds, rng, fills=0)
    assert bounds.keep(children).all()
    tops = np.array([len(decision.formats) - 1 for decision in bench.space.decisions])
    assert ((children >= 0) & (children <= tops)).all()
    nearest = np.abs(children[:, None] - parents[None]).sum(-1).min(1)
    raised = np.clip(children[:, None] - parents[None], 0, None).sum(-1)
    assert nearest.max(initial=0) <= 3 + 10, "three up, and what it takes to pay for them"
    if cost == "weight_bytes":
        assert raised.min(1).max(initial=0) <= 3


def test_offspring_exchange_formats_and_fill_slack() -> None:
    """At the limit every offspring that raises lowers, too; with slack some only raise."""
    limits = {"weight_bytes": float(np.median(BENCH.costs("weight_bytes")))}
    full = max(
        (policy for policy in BENCH.space if BENCH.pricing.costs(policy)["weight_bytes"] <= limits["weight_bytes"]),
        key=lambda policy: BENCH.pricing.costs(policy)["weight_bytes"],
    )
    parent = np.array([BENCH.space.encode(full)])
    weights = [index for index, decision in enumerate(BENCH.space.decisions) if decision.side == "weight"]
    children = switch_levels(BENCH.space, parent, 200, Bounds(BENCH.pricing, limits), np.random.default_rng(0))
    steps = (children - parent)[:, weights]
    assert ((steps > 0).any(1) <= (steps < 0).any(1)).mean() > 0.9
    lowest = np.zeros_like(parent)
    children = switch_levels(BENCH.space, lowest, 200, Bounds(BENCH.pricing, limits), np.random.default_rng(0))
    assert (children.sum(1) > 0).all(), "plain steps up where slack is left"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parents": 0}, r"strategy\.parents=0 must be at least 1"),
        ({"offspring": 0}, r"strategy\.offspring=0 must be at least 1"),
        ({"fidelities": [0.5, 0.25]}, r"strategy\.fidelities=\[0.5, 0.25\] must be rising shares"),
        ({"fidelities": [1.0]}, r"strategy\.fidelities=\[1.0\]"),
        ({"fidelities": [0.0]}, r"strategy\.fidelities=\[0.0\]"),
        ({"seconds": 0}, r"strategy\.seconds=0"),
    ],
)
def test_settings_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Evolution(**options)


def test_one_seed_gives_one_sequence_with_races(tmp_path: Path) -> None:
    torch.manual_seed(1)
    runs = [in_parts(0).search(Evolution(15), tmp_path / f"{n}.jsonl", seed=4)[0] for n in range(2)]
    first, second = ([(trial.digest, trial.fidelity) for trial in trials] for trials in runs)
    assert first == second
