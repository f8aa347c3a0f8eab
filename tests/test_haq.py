"""HAQ as a strategy: its contract, its rewards, what it learns, where it starts."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conformance import StrategyContract
from synthetic import Synthetic, make_synthetic
from tiny import SlowToUnpack, TinyTask, make_bench

from hwmodels import Precision
from search.errors import ConfigError
from search.objective import SpentError
from search.policy import Policy
from search.quality.evaluate import Quality
from search.strategies.haq import Haq
from search.strategies.haq.strategy import reward
from search.trials import Trial


class TestHaqContract(StrategyContract):
    evaluations = 6

    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Haq(evaluations=evaluations)


def weights_only(quality_drop: float | None = None) -> Synthetic:
    """81 policies; of their sizes, half are within the limit."""
    bench = make_bench(input=("uint8",))
    limits = {} if quality_drop else {"weight_bytes": float(np.median(bench.costs("weight_bytes")))}
    return Synthetic(bench, limits, quality_drop)


def search(problem: Synthetic, folder: Path, seed: int) -> float:
    """What 80 evaluations find, as a multiple of the optimum."""
    trials, objective = problem.search_optimum(Haq(evaluations=80), folder / "trials.jsonl", seed)
    return problem.found(trials, objective) / problem.optimum


@pytest.mark.parametrize("seed", range(5))
def test_finds_the_optimum_within_a_size(seed: int, tmp_path: Path) -> None:
    assert search(weights_only(), tmp_path, seed) == pytest.approx(1)


def test_finds_the_optimum_or_nearly_so_for_a_quality(tmp_path: Path) -> None:
    """In 80 evaluations, three of five seeds; the others are at most 5% above it. The agent does not look again."""
    found = [search(weights_only(quality_drop=0.1), tmp_path / str(seed), seed) for seed in range(5)]
    assert sum(share == pytest.approx(1) for share in found) >= 3
    assert max(found) < 1.05


def test_measures_what_it_starts_from_first(tmp_path: Path) -> None:
    problem = make_synthetic()
    prices = problem.bench.pricing
    within = [p for p in problem.policies() if prices.costs(p)["weight_bytes"] <= problem.limits["weight_bytes"]]
    starts = within[::50][:3]
    trials, _ = problem.search(Haq(evaluations=5), tmp_path / "trials.jsonl", starts=lambda objective: starts)
    assert [trial.policy for trial in trials[:3]] == starts
    trials, _ = problem.search(Haq(evaluations=2), tmp_path / "few.jsonl", starts=lambda objective: starts)
    assert [trial.policy for trial in trials] == starts[:2], "there may be more than it can spend"


def test_every_episode_is_one_evaluation_and_never_over_budget(tmp_path: Path) -> None:
    problem, seen = make_synthetic(share=0.1), []
    problem.search(Haq(evaluations=30), tmp_path / "trials.jsonl", on_trial=lambda trial, known: seen.append(trial))
    assert len(seen) == 30
    assert {trial.state for trial in seen} == {"complete"}


def test_nothing_open_is_measured_once(tmp_path: Path) -> None:
    problem = Synthetic(make_bench(weight=("int4",), input=("uint8",)), {})
    trials, objective = problem.search(Haq(evaluations=5), tmp_path / "trials.jsonl")
    assert len(trials) == 1
    assert objective.spent_evaluations == 1


def test_keeps_a_budget_that_fewer_bits_overshoot(tmp_path: Path) -> None:
    bench = make_bench(cost_model=SlowToUnpack())
    limit = float(np.quantile(bench.costs("latency_s"), 0.05))
    trials, _ = Synthetic(bench, {"latency_s": limit}).search(Haq(evaluations=12), tmp_path / "trials.jsonl")
    assert {trial.state for trial in trials} == {"complete"}
    assert all(trial.cost["latency_s"] <= limit for trial in trials)


def test_running_out_ends_the_search_within_an_episode(tmp_path: Path) -> None:
    problem = make_synthetic()
    objective = problem.objective(tmp_path / "trials.jsonl", strategy := Haq(evaluations=7))
    with pytest.raises(SpentError):
        strategy.search(problem.bench.space, objective, np.random.default_rng(0))
    state = np.random.get_state()[1].tolist()
    with suppress(SpentError):
        strategy.search(problem.bench.space, objective, np.random.default_rng(0))
    assert np.random.get_state()[1].tolist() == state, "global generators are as they were"


def test_few_evaluations_shorten_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from search.strategies.haq import agent

    given = []
    original = agent.HaqAgent.__init__

    def noted(self, env, steps, warm_up, seed) -> None:
        given.append(warm_up)
        original(self, env, steps, warm_up, seed)

    monkeypatch.setattr(agent.HaqAgent, "__init__", noted)
    problem = make_synthetic()
    for evaluations, warm_up in ((1, 20), (10, 20), (10, 1)):
        problem.search(Haq(evaluations, warm_up=warm_up), tmp_path / f"{len(given)}.jsonl")
    assert given == [0, 2, 1]
    assert Haq().evaluations == 600
    assert Haq().warm_up == 20


class Loss(TinyTask):
    """Less is better."""

    higher_is_better = False


def judged(task: TinyTask, quality: float, drop: float, tmp_path: Path, **options) -> tuple[float, Trial]:
    """The reward of a trial against a float quality of `quality`."""
    bench = make_bench(task)
    objective = bench.objective(tmp_path / "trials.jsonl", {}, Haq(), **options)
    objective.__dict__["float_quality"] = quality
    measured = Quality(quality - drop, 100, drop, drop, drop).to_dict()
    cost = bench.pricing.costs(policy := Policy.uniform(bench.network, Precision.parse("int4/uint8")))
    trial = Trial(0, policy, 1.0, {"quality": measured.pop("value"), **measured}, cost, 0.0, "complete")
    return reward(objective, trial), trial


def test_reward_is_a_tenth_of_the_percentage_points(tmp_path: Path) -> None:
    assert judged(TinyTask(), 0.9, 0.25, tmp_path)[0] == pytest.approx(0.1 * -25)
    assert judged(TinyTask(), 0.9, -0.01, tmp_path)[0] == pytest.approx(0.1 * 1), "better than the float network"


def test_reward_of_other_metrics_is_relative(tmp_path: Path) -> None:
    assert judged(Loss(), 20.0, 5.0, tmp_path)[0] == pytest.approx(0.1 * -25)
    assert judged(Loss(), 0.5, 0.25, tmp_path)[0] == pytest.approx(0.1 * -50)
    assert judged(TinyTask(), 30.0, 3.0, tmp_path)[0] == pytest.approx(0.1 * -10), "such as a BLEU score"
    assert judged(Loss(), 20.0, 1e30, tmp_path)[0] == -100, "numbers that no network could learn from are cut"


@pytest.mark.parametrize("drop", [0.02, 0.3])
def test_reward_where_the_drop_is_limited(drop: float, tmp_path: Path) -> None:
    found, trial = judged(TinyTask(), 0.9, drop, tmp_path, quality_drop=0.1)
    bench = make_bench()
    share = trial.cost["weight_bytes"] / bench.pricing.reference("float")["weight_bytes"]
    assert found == pytest.approx(-10 * (share + 10 * max(drop - 0.1, 0) / 0.9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warm_up": -1}, r"strategy\.warm_up=-1 must be at least 0"),
        ({"finetune_steps": -5}, r"strategy\.finetune_steps=-5 must be at least 0"),
        ({"evaluations": 0}, r"strategy\.evaluations=0 must be at least 1"),
        ({"seconds": 0}, r"strategy\.seconds=0 must be above 0"),
    ],
)
def test_wrong_settings(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Haq(**settings)
