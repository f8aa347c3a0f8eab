"""The environment: both libraries' checkers, and that every episode ends within its budget."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_by_gymnasium
from stable_baselines3.common.env_checker import check_env as check_by_stable_baselines
from test_assignment_costs import Conversions
from tiny import Bench, SlowToUnpack, make_bench

from search.errors import ConfigError
from search.strategies.projection import Projection
from search.strategies.rl import course as courses
from search.strategies.rl.agent import describe
from search.strategies.rl.course import Course, Walk, action_for, settle
from search.strategies.rl.env import PolicyEnv
from search.strategies.rl.goals import Goals, along, around


def make_course(bench: Bench, names: tuple[str, ...]) -> Course:
    about = describe(bench.pricing, names, bench.scores())
    return Course(bench.pricing, names, np.array(about["scaling"]), np.array(about["losses"]))


def quantiles(bench: Bench, shares: dict[str, float]) -> dict[str, float]:
    return {name: float(np.quantile(bench.costs(name), share)) for name, share in shares.items()}


def make_env(bench: Bench, limits: dict[str, float]) -> PolicyEnv:
    course = make_course(bench, tuple(limits))
    return PolicyEnv(course, around(course, limits, (0.5, 1.5)), lambda point, goal: float(sum(point)))


@pytest.mark.filterwarnings("ignore:.*action space.*:UserWarning")
@pytest.mark.parametrize("shares", [{}, {"weight_bytes": 0.4}, {"bit_ops": 0.5, "activation_bytes": 0.5}])
def test_both_checkers_pass(bench: Bench, shares: dict[str, float]) -> None:
    env = make_env(bench, quantiles(bench, shares))
    check_by_stable_baselines(env)
    check_by_gymnasium(env, skip_render_check=True)
    assert isinstance(env, gymnasium.Env)


LIMITED = [
    ("plain", {"weight_bytes": 0.1}),
    ("plain", {"bit_ops": 0.2}),
    ("plain", {"weight_bytes": 0.3, "bit_ops": 0.2, "activation_bytes": 0.5}),
    ("slow", {"weight_bytes": 0.4, "latency_s": 0.5}),  # that exclude each other format by format
    ("conversions", {"latency_s": 0.5}),
]


@pytest.fixture(scope="module")
def benches() -> dict[str, Bench]:
    return {
        "plain": make_bench(),
        "slow": make_bench(cost_model=SlowToUnpack()),
        "conversions": make_bench(cost_model=Conversions("zen5")),
    }


@pytest.mark.parametrize(("name", "shares"), LIMITED)
def test_every_episode_ends_within_its_budget(benches: dict[str, Bench], name: str, shares: dict[str, float]) -> None:
    bench = benches[name]
    env = make_env(bench, quantiles(bench, shares))
    env.action_space.seed(0)
    env.reset(seed=0)
    goals = set()
    for _ in range(40):
        seen, _ = env.reset()
        ended, steps = False, 0
        while not ended:
            assert env.observation_space.contains(seen)
            seen, reward, ended, truncated, info = env.step(env.action_space.sample())
            assert not truncated
            steps += 1
        assert steps == len(bench.space.free)
        assert reward == sum(info["point"])
        costs = bench.pricing.costs(bench.space.decode(info["point"]))
        assert all(costs[cost] <= limit for cost, limit in info["limits"].items())
        goals.add(info["goal"])
    assert len(goals) > 1, "budgets are drawn"


def test_one_limit_needs_no_repair(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = quantiles(bench, {"weight_bytes": 0.1})
    course = make_course(bench, ("weight_bytes",))
    rng = np.random.default_rng(0)
    for _ in range(30):
        walk, actions = Walk(course, limits), list(rng.uniform(-1, 1, course.steps))
        for action in actions:
            walk.take(action)
        assert settle(course, limits, actions) == tuple(walk.point)


def test_repair_takes_less_and_then_the_nearest(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = benches["conversions"]
    limits = quantiles(bench, {"latency_s": 0.3})
    course = make_course(bench, ("latency_s",))
    rng = np.random.default_rng(0)
    over = 0
    for _ in range(30):
        walk, actions = Walk(course, limits), list(rng.uniform(-1, 1, course.steps))
        for action in actions:
            walk.take(action)
        if course.costs(tuple(walk.point))["latency_s"] <= limits["latency_s"]:
            continue
        over += 1  # conversions come on top of what the ceiling sees
        monkeypatch.setattr(courses, "AGAIN", 3)
        assert course.costs(settle(course, limits, actions))["latency_s"] <= limits["latency_s"]
        monkeypatch.setattr(courses, "AGAIN", 0)
        assert settle(course, limits, actions) == Projection(bench.pricing, limits).nearest(walk.point)
    assert over


def test_every_point_within_one_limit_can_be_walked_to(bench: Bench) -> None:
    limits = quantiles(bench, {"weight_bytes": 0.3})
    course = make_course(bench, ("weight_bytes",))
    for policy in list(bench.space)[::5]:
        point = bench.space.encode(policy)
        walk = Walk(course, limits)
        for decision in course.ceiling.order:
            walk.take(action_for(point[decision], len(bench.space.decisions[decision].formats)))
        is_within = bench.pricing.costs(policy)["weight_bytes"] <= limits["weight_bytes"]
        assert (tuple(walk.point) == point) == is_within


def test_what_the_agent_sees_of_the_budget(bench: Bench) -> None:
    """The goal's share of the room, the slack that is left, and what is ahead; all used up by the end."""
    course = make_course(bench, ("weight_bytes",))
    costs = bench.costs("weight_bytes")
    goal = len(courses.FEATURES) + 2
    walk = Walk(course, {"weight_bytes": (min(costs) + max(costs)) / 2})
    assert walk.observation()[goal : goal + 3] == pytest.approx([0.5, 1.0, 0.5], rel=1e-5)
    left = []
    while not walk.is_over:
        left.append(walk.observation()[goal + 1])
        walk.take(1.0)
    assert (np.diff(left) <= 0).all()
    assert left[-1] < 1
    assert not walk.observation().any()
    wide = Walk(course, {"weight_bytes": 10 * max(costs)})
    assert wide.observation()[goal : goal + 3] == pytest.approx([1.0, 1.0, 1.0])


def test_goals_lie_around_the_wanted_budget(bench: Bench) -> None:
    course = make_course(bench, ("weight_bytes",))
    limits = quantiles(bench, {"weight_bytes": 0.4})
    goals = around(course, limits, (0.5, 2.0))
    assert len(goals.limits) == 9
    assert goals.limits[goals.wanted] == limits
    least = min(bench.costs("weight_bytes"))
    room = [goal["weight_bytes"] - least for goal in goals.limits]
    assert room == sorted(room)
    assert room[0] / room[goals.wanted] == pytest.approx(0.5)
    assert room[-1] / room[goals.wanted] == pytest.approx(2.0)
    drawn = [goals.draw(np.random.default_rng(seed)) for seed in range(200)]
    assert 0.5 < np.mean(np.array(drawn) == goals.wanted) < 0.8


def test_goals_that_nothing_keeps_are_left_out(bench: Bench) -> None:
    course = make_course(bench, ("weight_bytes",))
    tight = {"weight_bytes": min(bench.costs("weight_bytes"))}
    assert around(course, tight, (0.5, 2.0)) == Goals((tight,), 0)
    assert along(course, tight, "weight_bytes") == Goals((tight,), 0)


def test_goals_along_a_cost_keep_the_other_limits(bench: Bench) -> None:
    course = make_course(bench, ("weight_bytes", "bit_ops"))
    limits = quantiles(bench, {"bit_ops": 0.5})
    goals = along(course, limits, "weight_bytes")
    assert {goal["bit_ops"] for goal in goals.limits} == {limits["bit_ops"]}
    caps = [goal["weight_bytes"] for goal in goals.limits]
    assert caps == sorted(set(caps))
    assert caps[-1] >= max(bench.costs("weight_bytes"))
    assert goals.wanted == len(caps) - 1


def test_a_cost_that_the_device_does_not_know(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="does not know latency_s"):
        make_course(bench, ("latency_s",))
