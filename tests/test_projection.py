"""The nearest point within limits, against every point of a small space; randomness that stays its own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SlowToUnpack, make_bench

from search.strategies.projection import Projection
from search.strategies.randomness import own_randomness

BENCHES = {"bytes": make_bench(), "slow": make_bench(cost_model=SlowToUnpack())}


def distance(first, second) -> int:
    return int(np.abs(np.subtract(first, second)).sum())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["weight_bytes", "activation_bytes", "latency_s"]), st.floats(0.02, 0.9), st.integers(0, 10**6))
def test_nothing_within_the_limits_is_nearer(cost: str, share: float, seed: int) -> None:
    bench = BENCHES["slow" if cost == "latency_s" else "bytes"]
    every = [bench.space.encode(policy) for policy in bench.space]
    costs = bench.costs(cost)
    limit = float(np.quantile(costs, share))
    within = [point for point, value in zip(every, costs, strict=True) if value <= limit]
    point = every[seed % len(every)]
    found = Projection(bench.pricing, {cost: limit}).nearest(point)
    assert found in within
    assert distance(found, point) == min(distance(other, point) for other in within)
    if point in within:
        assert found == point


def test_of_several_nearest_points_the_largest_is_taken() -> None:
    bench = BENCHES["slow"]
    lowest = [0] * len(bench.space.decisions)
    limit = bench.pricing.costs(bench.space.decode(lowest))["latency_s"] * 0.999
    found = Projection(bench.pricing, {"latency_s": limit}).nearest(lowest)
    assert sum(found) == 1, "on this device more bits are faster"


def test_limits_that_nothing_keeps() -> None:
    bench = BENCHES["bytes"]
    with pytest.raises(ValueError, match="no point keeps"):
        Projection(bench.pricing, {"weight_bytes": 1.0}).nearest([0] * len(bench.space.decisions))


def test_global_generators_are_seeded_and_put_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with own_randomness(3):
        first = draw()
    with own_randomness(3):
        assert draw() == first
    with own_randomness(4):
        assert draw() != first
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
