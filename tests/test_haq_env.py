"""HAQ's walk, what the agent sees on it, the environment, and the wall: against numbers and loops written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium.utils.env_checker
import numpy as np
import pytest
import stable_baselines3.common.env_checker
from conformance import NETWORK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import Bench, SlowToUnpack, make_bench

from hwmodels import Layer
from search.space import build_space
from search.strategies.haq.env import WalkEnv
from search.strategies.haq.walk import Walk, describe
from search.strategies.haq.wall import ActionWall


@pytest.fixture(scope="module")
def bench() -> Bench:
    return make_bench()


@pytest.fixture(scope="module")
def prices(bench: Bench) -> dict[str, list[float]]:
    """Costs of every policy."""
    return {name: bench.costs(name) for name in ("weight_bytes", "bit_ops", "activation_bytes")}


def walk_of(bench: Bench) -> Walk:
    return Walk.through(bench.network, bench.space)


def names(bench: Bench, walk: Walk) -> list[str]:
    return [f"{bench.space.decisions[i].side} {bench.space.decisions[i].name}" for i in walk.decisions]


def test_walks_layer_by_layer_the_weight_before_the_input(bench: Bench) -> None:
    """`left` and `right` read the same tensor: its format is decided at `left`."""
    expected = ["weight stem", "input input", "weight left", "input relu", "weight right", "weight head", "input mean"]
    assert names(bench, walk_of(bench)) == expected
    assert walk_of(bench).weights == (True, False, True, False, True, True, False)
    assert walk_of(bench).sizes == (3, 2, 3, 2, 3, 3, 2)


def test_leaves_out_what_is_pinned_and_takes_a_tie_once() -> None:
    bench = make_bench(pins={"first": "int8/uint8"}, ties=[["left", "right"]])
    walk = walk_of(bench)
    assert names(bench, walk) == ["weight left", "input relu", "weight head", "input mean"]
    assert walk.layers[:, 7].tolist() == [0.5, 0.5, 1, 1], "of three units, the pinned one counted"
    assert walk.point([0, 0, 0, 0]) == (0,) * len(bench.space.decisions)


def test_states_by_hand() -> None:
    """Rows of the network in conformance.py, normalised by hand: least 0, largest 1."""
    space = build_space(NETWORK, ["int2", "int4", "int8"], ["uint4", "uint8"])
    walk = Walk.through(NETWORK, space)
    assert len(walk) == 6
    conv = [0, (3 - 3) / 125, 0, 0, 0, (216 - 72) / 1208, 0, 0]
    depthwise = [1, (8 - 3) / 125, 0, 0, 0, 0, 0, 0.5]
    fc = [0, 1, 1, 0, 0, 1, 1, 1]
    levels = [0, 1, 2, 0, 1]
    before = [1, 1 / 3, 2 / 2, 3 / 3, 1 / 2, 2 / 3]
    expected = [conv, conv, depthwise, depthwise, fc, fc]
    for step in range(6):
        found = walk.state(step, levels[:step])
        assert found.dtype == np.float32
        assert found == pytest.approx([*expected[step], before[step], (step + 1) % 2])


def layer(
    kind: str, weight: tuple[int, ...], read: tuple[int, ...], groups: int = 1, stride: int | None = None, **more
) -> Layer:
    """A layer whose stride is the same along all axes, its kernel that of the weight."""
    if stride:
        more |= {"kernel": weight[2:], "stride": (stride,) * len(weight[2:])}
    return Layer("layer", kind, ("x",), ("layer",), weight_shape=weight, input_shape=read, groups=groups, **more)


@pytest.mark.parametrize(
    ("given", "expected"),
    [  # depthwise, c_in, c_out, stride, kernel, weights, feature map, place
        (layer("conv2d", (8, 3, 3, 5), (2, 3, 6, 4), stride=2), (0, 3, 8, 2, 3, 360, 24, 7)),
        (layer("conv2d", (8, 1, 3, 3), (2, 8, 4, 4), groups=8, stride=1), (1, 8, 8, 1, 3, 72, 16, 7)),
        (layer("conv2d", (16, 1, 3, 3), (2, 8, 4, 4), groups=8, stride=1), (1, 8, 16, 1, 3, 144, 16, 7)),
        (layer("conv2d", (8, 4, 1, 1), (2, 8, 4, 4), groups=2, stride=1), (0, 8, 8, 1, 1, 32, 16, 7)),
        (layer("conv2d", (4, 1, 3, 3), (2, 1, 8, 8), stride=1), (0, 1, 4, 1, 3, 36, 64, 7)),
        (layer("conv1d", (6, 4, 9), (2, 4, 50), stride=3), (0, 4, 6, 3, 9, 216, 50, 7)),
        (layer("conv3d", (6, 4, 3, 3, 3), (2, 4, 5, 6, 7), stride=2), (0, 4, 6, 2, 3, 648, 210, 7)),
        (
            layer("conv_transpose2d", (8, 3, 2, 2), (2, 8, 4, 4), groups=2, stride=2, channel_axis=1),
            (0, 8, 6, 2, 2, 96, 16, 7),
        ),
        (layer("linear", (10, 128), (2, 128)), (0, 128, 10, 0, 1, 1280, 128, 7)),
        (layer("linear", (10, 32), (2, 20, 32)), (0, 32, 10, 0, 1, 320, 20, 7)),
        (layer("embedding", (1000, 16), (2, 20)), (0, 1000, 16, 0, 1, 16000, 20, 7)),
        (layer("lstm", (64, 12), (2, 20, 12)), (0, 12, 64, 0, 1, 768, 20, 7)),
    ],
    ids=lambda value: value.kind if isinstance(value, Layer) else "",
)
def test_describes_every_kind_of_layer(given: Layer, expected: tuple[float, ...]) -> None:
    assert describe(given, 7) == expected


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.floats(-1, 1), min_size=7, max_size=7))
def test_states_are_between_0_and_1(actions: list[float], bench: Bench) -> None:
    walk = walk_of(bench)
    levels = [walk.level(step, action) for step, action in enumerate(actions)]
    for step in range(len(walk)):
        state = walk.state(step, levels[:step])
        assert state.min() >= 0
        assert state.max() <= 1


def test_actions_are_stretches_of_the_same_length(bench: Bench) -> None:
    walk = walk_of(bench)
    levels = [walk.level(0, action) for action in np.linspace(-1, 1, 3001)]
    assert np.bincount(levels).tolist() == [1000, 1000, 1001]
    assert [walk.level(1, action) for action in (-1, -0.01, 0.01, 1)] == [0, 0, 1, 1]


@pytest.mark.parametrize("bits", range(1, 9))
def test_actions_stand_for_haqs_bits(bits: int) -> None:
    """Where formats are 1 to 8 bits: `round(0.5 + 8 a)` for an action in [0, 1], as HAQ rounds."""
    walk = Walk((0,), (8,), np.zeros((1, 8)), (True,), 1)
    for action in np.linspace(0, 1, 1001):
        if round(0.5 + 8 * action) == bits and abs(8 * action % 1) > 1e-6:
            assert walk.level(0, 2 * action - 1) + 1 == bits


def test_points_have_actions_that_lead_there(bench: Bench) -> None:
    walk = walk_of(bench)
    for policy in list(bench.space)[::7]:
        point = bench.space.encode(policy)
        levels = [walk.level(step, action) for step, action in enumerate(walk.actions(point))]
        assert walk.point(levels) == point


def first_format_share(point: tuple[int, ...]) -> float:
    return -float(np.mean(np.array(point) == 0))


def test_environment_passes_both_checkers(bench: Bench) -> None:
    env = WalkEnv(walk_of(bench), first_format_share)
    stable_baselines3.common.env_checker.check_env(env)
    gymnasium.utils.env_checker.check_env(env, skip_render_check=True)


def test_an_episode_walks_once_and_is_rewarded_at_its_end(bench: Bench) -> None:
    walk, judged = walk_of(bench), []
    env = WalkEnv(walk, lambda point: judged.append(point) or 4.0)
    for _ in range(2):
        state, info = env.reset()
        assert info == {}
        levels: list[int] = []
        for step, action in enumerate(np.linspace(-0.97, 0.97, 7)):
            assert np.array_equal(state, walk.state(step, levels))
            state, reward, done, truncated, info = env.step(np.array([action], np.float32))
            levels.append(walk.level(step, action))
            assert (reward, done, truncated) == (4.0 if step == 6 else 0.0, step == 6, False)
        assert np.array_equal(state, walk.state(6, levels[:6])), "the last state again"
        assert info == {"point": walk.point(levels)} == {"point": judged.pop()}
        assert not judged


def reference_wall(bench: Bench, limits: dict[str, float], walk: Sequence[int], point: Sequence[int]) -> list[int]:
    """Every step priced on its own."""

    def over() -> bool:
        costs = bench.pricing.costs(bench.space.decode(lower))
        return any(costs[name] > limit for name, limit in limits.items())

    lower = list(point)
    while over() and any(lower[decision] for decision in walk):
        for decision in reversed(walk):
            lower[decision] = max(lower[decision] - 1, 0)
            if not over():
                break
    return lower


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), share=st.floats(0.02, 0.9))
def test_wall_as_a_loop_does_it(data: st.DataObject, share: float, bench: Bench, prices) -> None:
    limits = {
        name: float(np.quantile(prices[name], share))
        for name in data.draw(st.lists(st.sampled_from(list(prices)), min_size=1, max_size=2, unique=True))
    }
    point = [data.draw(st.integers(0, len(decision.formats) - 1)) for decision in bench.space.decisions]
    walk = walk_of(bench).decisions
    found = ActionWall(bench.pricing, limits, walk).confine(point)
    expected = reference_wall(bench, limits, walk, point)
    costs = bench.pricing.costs(bench.space.decode(expected))
    if all(costs[name] <= limit for name, limit in limits.items()):
        assert list(found) == expected
    else:
        assert ActionWall(bench.pricing, limits, walk)._keeps(found), "the nearest point, where lowering does not do"


def test_wall_lowers_the_last_input_first_then_the_last_weight(bench: Bench) -> None:
    walk = walk_of(bench)
    top = [size - 1 for size in np.array(walk.sizes)[np.argsort(walk.decisions)]]
    way = ActionWall(bench.pricing, {}, walk.decisions).way_down(top)
    assert len(way) == sum(top), "every step takes one format away, down to the lowest"
    assert not way[-1].any()
    lowered = [int(np.flatnonzero(step)[0]) for step in np.diff([top, *way], axis=0)]
    changed = [names(bench, walk)[walk.decisions.index(decision)] for decision in lowered]
    assert changed[:7] == names(bench, walk)[::-1]
    assert changed[7:] == ["weight head", "weight right", "weight left", "weight stem"], "inputs are at their lowest"


def test_wall_leaves_what_is_within_every_limit(bench: Bench) -> None:
    walk = walk_of(bench)
    point = (1, 2, 0, 1, 1, 0, 1)
    costs = bench.pricing.costs(bench.space.decode(point))
    limits = {name: costs[name] for name in ("weight_bytes", "bit_ops", "activation_bytes")}
    assert ActionWall(bench.pricing, limits, walk.decisions).confine(point) == point


def test_wall_falls_back_on_the_nearest_point_where_fewer_bits_cost_more() -> None:
    """Lowering makes it slower, so that only the largest formats are fast enough: no way down leads there."""
    bench = make_bench(cost_model=SlowToUnpack())
    walk = walk_of(bench)
    every = bench.costs("latency_s")
    limit = float(np.quantile(every, 0.05))
    wall = ActionWall(bench.pricing, {"latency_s": limit}, walk.decisions)
    points = map(bench.space.encode, bench.space)
    feasible = [point for point, cost in zip(points, every, strict=True) if cost <= limit]
    for point in [(1, 1, 1, 1, 0, 1, 0), (0, 0, 0, 0, 0, 0, 0), (2, 2, 1, 0, 1, 1, 1)]:
        found = wall.confine(point)
        assert found in feasible
        assert np.abs(np.subtract(found, point)).sum() == min(np.abs(np.subtract(p, point)).sum() for p in feasible)


def test_wall_says_where_nothing_keeps_the_limits(bench: Bench) -> None:
    wall = ActionWall(bench.pricing, {"weight_bytes": 1.0}, walk_of(bench).decisions)
    with pytest.raises(ValueError, match="no point keeps the limits"):
        wall.confine([0] * len(bench.space.decisions))
