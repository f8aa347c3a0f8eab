"""The agent's search: its contract, known optima, what it learns from, and what it refuses."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conformance import StrategyContract
from synthetic import make_synthetic
from tiny import Bench, make_bench

from search.errors import ConfigError
from search.objective import SpentError
from search.strategies.rl.strategy import ALGORITHMS, Rl
from search.trials import TrialLog

QUICK = {"episodes": 4, "warmup": 4, "updates": 1, "batch": 16, "hidden": (8,)}


class TestRl(StrategyContract):
    evaluations = 5

    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Rl(evaluations, demonstrations=False, **QUICK)


def search(bench: Bench, strategy: Rl, folder: Path, limits: dict[str, float], seed: int = 0, **options):
    folder.mkdir(exist_ok=True)
    objective = bench.objective(folder / "trials.jsonl", limits, strategy, **options)
    with suppress(SpentError):
        strategy.search(bench.space, objective, np.random.default_rng(seed))
    return TrialLog(folder / "trials.jsonl").trials


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("demonstrations", [True, False])
def test_every_algorithm(algorithm: str, demonstrations: bool, tmp_path: Path) -> None:
    synthetic = make_synthetic()
    strategies = [Rl(3, algorithm=algorithm, demonstrations=demonstrations, **QUICK) for _ in range(2)]
    trials, again = (synthetic.search(s, tmp_path / f"{n}.jsonl")[0] for n, s in enumerate(strategies))
    assert len({trial.digest for trial in trials}) == 3
    assert {trial.state for trial in trials} == {"complete"}
    assert [trial.digest for trial in again] == [trial.digest for trial in trials]


def test_demonstrations_are_in_the_buffer(tmp_path: Path) -> None:
    """The first measurement is the solver's optimum, and its episode earns the reward of its policy."""
    synthetic = make_synthetic()
    strategy = Rl(1, **QUICK)
    trials, objective = synthetic.search(strategy, tmp_path / "trials.jsonl")
    within = [policy for policy in synthetic.policies() if objective.is_feasible(policy)]
    assert objective.predict(trials[0].policy) == pytest.approx(min(map(objective.predict, within)), rel=1e-9)
    buffer = strategy.trained.model.replay_buffer
    steps, point = len(synthetic.bench.space.free), synthetic.bench.space.encode(trials[0].policy)
    shown = [at for at, (ended, _) in buffer.ends.items() if ended == point]
    assert shown
    first = shown[0]
    assert buffer.dones[first - steps + 1 : first + 1, 0].tolist() == [0.0] * (steps - 1) + [1.0]
    assert not buffer.rewards[first - steps + 1 : first, 0].any()
    assert buffer.rewards[first, 0] > 0
    bare = Rl(1, demonstrations=False, **QUICK)
    synthetic.search(bare, tmp_path / "bare.jsonl")
    assert len(bare.trained.model.replay_buffer.ends) == bare.episodes
    assert len(buffer.ends) >= bare.episodes + 9, "one for every goal at least"


def test_rewards_follow_what_was_measured(tmp_path: Path) -> None:
    """Once policies are measured, the buffer's rewards at a goal fall with their true losses."""
    synthetic = make_synthetic()
    strategy = Rl(25, demonstrations=False, **QUICK)
    trials, _ = synthetic.search(strategy, tmp_path / "trials.jsonl")
    drops = {synthetic.bench.space.encode(trial.policy): trial.drop for trial in trials[:-1]}
    buffer = strategy.trained.model.replay_buffer
    for goal in {goal for _, goal in buffer.ends.values()}:
        told = {point: buffer.rewards[at, 0] for at, (point, at_goal) in buffer.ends.items() if at_goal == goal}
        known = sorted((drops[point], float(-told[point])) for point in told if point in drops)
        assert [reward for _, reward in known] == pytest.approx(sorted(reward for _, reward in known), abs=0.2)


def test_starts_are_measured_first(tmp_path: Path) -> None:
    synthetic = make_synthetic()
    starts = [
        policy
        for policy in synthetic.policies()[::100]
        if synthetic.bench.pricing.costs(policy)["weight_bytes"] <= synthetic.limits["weight_bytes"]
    ][:2]
    trials, _ = synthetic.search(Rl(4, **QUICK), tmp_path / "trials.jsonl", starts=lambda objective: starts)
    assert [trial.policy for trial in trials[:2]] == starts
    assert len({trial.digest for trial in trials}) == 4


@pytest.mark.parametrize("quality_drop", [None, 0.1])
def test_a_space_of_one_policy(quality_drop: float | None, tmp_path: Path) -> None:
    bench = make_bench(weight=("int8",), input=("uint8",))
    strategy = Rl(5, **QUICK)
    assert len(search(bench, strategy, tmp_path, {}, quality_drop=quality_drop)) == 1
    strategy.keep(tmp_path, None, [])
    assert not (tmp_path / "agent").exists()


def test_several_limits_and_a_floor_at_once(bench: Bench, tmp_path: Path) -> None:
    limits = {"bit_ops": float(np.quantile(bench.costs("bit_ops"), 0.3)), "weight_bytes": 600.0}
    trials = search(bench, Rl(6, **QUICK), tmp_path / "run", limits, quality_drop=0.2, primary_cost="bit_ops")
    assert trials
    assert all(trial.cost[name] <= limit for trial in trials for name, limit in limits.items())


def test_ends_when_nothing_new_is_left(tmp_path: Path) -> None:
    bench = make_bench(weight=("int4", "int8"), input=("uint8",))
    trials = search(bench, Rl(60, **QUICK), tmp_path, {"weight_bytes": 1.01 * min(bench.costs("weight_bytes"))})
    assert 1 <= len(trials) < 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "TD4"}, r"strategy.algorithm=TD4 is unknown \(did you mean 'TD3'\?\); allowed: DDPG, TD3"),
        ({"goals": (1.2, 2.0)}, r"strategy.goals=\[1.2, 2.0\] must be two shares"),
        ({"goals": (0.5,)}, r"strategy.goals=\[0.5\]"),
        ({"episodes": 0}, "strategy.episodes=0 must be at least 1"),
        ({"batch": 1}, "strategy.batch=1 must be at least 2"),
        ({"hidden": ()}, r"strategy.hidden=\[\] must name"),
        ({"learning_rate": 0.0}, "strategy.learning_rate=0.0 must be above 0"),
        ({"evaluations": 0}, "strategy.evaluations=0"),
    ],
)
def test_settings_out_of_range(settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rl(**settings)
