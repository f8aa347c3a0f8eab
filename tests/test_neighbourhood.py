"""Neighbours are new, legal and near."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from search.strategies.neighbourhood import CHANGES, neighbours, stacked, within
from tests.tiny import make_bench

BENCH = make_bench(pins={"head": "int8/uint8"})


@given(st.integers(0, 1000))
def test_neighbours_of_one_point_differ_in_few_free_decisions(seed: int) -> None:
    space, rng = BENCH.space, np.random.default_rng(seed)
    parent = np.array([space.encode(space.sample(rng))])

    found = neighbours(space, parent, 40, rng)

    differing = found != parent
    assert len(set(map(bytes, found))) == len(found) > 0
    assert set(differing.sum(1)) <= set(range(1, max(CHANGES) + 1))
    assert set(np.flatnonzero(differing.any(0))) <= set(space.free)
    sizes = [len(decision.formats) for decision in space.decisions]
    assert ((found >= 0) & (found < sizes)).all()


def test_within_keeps_what_pricing_keeps() -> None:
    space, pricing = BENCH.space, BENCH.pricing
    points = np.array([space.encode(policy) for policy in space])
    costs = pricing.totals(points)

    exact = [pricing.costs(space.decode(point)) for point in points[:50]]
    for name in ("weight_bytes", "bit_ops", "average_weight_bits", "effective_bits"):
        np.testing.assert_allclose(costs[name][:50], [each[name] for each in exact], rtol=1e-12)
    limit = float(np.median(costs["weight_bytes"]))
    kept = within(pricing, points, {"weight_bytes": limit, "activation_bytes": 0.0})
    assert len(kept) == (costs["weight_bytes"] <= limit).sum()


def test_stacked_keeps_the_first_of_each() -> None:
    found = stacked([np.array([[1, 2], [3, 4]]), np.empty((0, 2)), np.array([[3, 4], [0, 0]])], 2)

    assert found.tolist() == [[1, 2], [3, 4], [0, 0]]
    assert stacked([], 2).shape == (0, 2)


def test_a_space_with_nothing_open_has_no_neighbours() -> None:
    space = make_bench(weight=("int8",), input=("uint8",)).space

    assert neighbours(space, np.zeros((1, len(space.decisions)), int), 10, np.random.default_rng(0)).shape[0] == 0
