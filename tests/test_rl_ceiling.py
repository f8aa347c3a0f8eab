"""What the budget leaves open during a walk, against trying every completion."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Bench, make_bench

from search.strategies.rl.ceiling import Ceiling, Row, reachable, rows_of

BENCH = make_bench(weight=("int2", "int4", "int8"), input=("uint4", "uint8"))
SPACE = BENCH.space  # two of its units read the same tensor
EVERY = np.array(list(itertools.product(*(range(len(d.formats)) for d in SPACE.decisions))))


def random_row(rng: np.random.Generator) -> Row:
    """Costs in whole numbers, not monotone in the bits, so that sums are exact."""
    return Row("cost", tuple(rng.integers(0, 50, len(unit.choices)).astype(float) for unit in SPACE.units), 7.0)


def totals(row: Row, points: np.ndarray) -> np.ndarray:
    """What whole policies cost."""
    total = np.full(len(points), row.fixed)
    for number, unit in enumerate(SPACE.units):
        inputs = len(SPACE.decisions[unit.input].formats)
        total += row.column[number][points[:, unit.weight] * inputs + points[:, unit.input]]
    return total


def walk(ceiling: Ceiling, slack: np.ndarray, rng: np.random.Generator):
    """Walks at random among what is reachable; yields every decision with the formats that are, and the point."""
    point = [0] * len(SPACE.decisions)
    for decision in ceiling.order:
        rises = ceiling.rises(decision, point)
        open_ = reachable(rises, slack)
        yield decision, open_, point
        point[decision] = int(rng.choice(np.flatnonzero(open_)))
        slack = slack - rises[:, point[decision]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_one_limit_leaves_open_exactly_what_can_be_completed(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    row = random_row(rng)
    costs, ceiling = totals(row, EVERY), Ceiling(SPACE, [row])
    assert ceiling.least == costs.min()
    assert ceiling.most == costs.max()
    limit = float(np.quantile(costs, share))
    taken: list[int] = []
    for decision, open_, point in walk(ceiling, ceiling.slack({"cost": limit}), rng):
        agree = (EVERY[:, taken] == np.array(point)[taken]).all(1) & (costs <= limit)
        completable = [bool((agree & (EVERY[:, decision] == level)).any()) for level in range(len(open_))]
        assert open_.tolist() == completable
        taken.append(decision)
    assert totals(row, np.array([point]))[0] <= limit


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 1))
def test_several_limits_close_nothing_that_can_be_completed(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng), random_row(rng)]
    ceiling, costs = Ceiling(SPACE, rows), np.stack([totals(row, EVERY) for row in rows])
    kept = EVERY[int(rng.integers(len(EVERY)))]  # its costs are the limits, so that it keeps them
    limits = np.array([totals(row, kept[None])[0] for row in rows]) + share
    slack = limits - ceiling.least
    point = [0] * len(SPACE.decisions)
    for decision in ceiling.order:
        rises = ceiling.rises(decision, point)
        assert reachable(rises, slack)[kept[decision]]
        point[decision] = int(kept[decision])
        slack = slack - rises[:, point[decision]]
    assert slack == pytest.approx(limits - [totals(row, kept[None])[0] for row in rows])
    assert costs.shape == (2, len(EVERY))


def test_where_nothing_is_within_reach_the_least_over_stays_open() -> None:
    rises = np.array([[0.0, 4.0, 8.0], [6.0, 3.0, 0.0]])
    assert reachable(rises, np.array([8.0, 6.0])).tolist() == [True, True, True]
    assert reachable(rises, np.array([3.0, 4.0])).tolist() == [False, True, False]
    assert reachable(np.empty((0, 3)), np.empty(0)).tolist() == [True, True, True]


def test_rows_add_up_to_the_costs_of_policies(bench: Bench) -> None:
    names = ("weight_bytes", "bit_ops")
    rows = rows_of(bench.pricing, names)
    assert [row.name for row in rows] == list(names)
    for name, row in zip(names, rows, strict=True):
        assert totals(row, EVERY[::7]) == pytest.approx(
            [bench.pricing.costs(SPACE.decode(point))[name] for point in EVERY[::7].tolist()], rel=1e-12
        )


def test_a_peak_is_the_largest_of_its_rows(bench: Bench) -> None:
    rows = rows_of(bench.pricing, ["activation_bytes"])
    peaks = np.max([totals(row, EVERY[::7]) for row in rows], axis=0)
    assert peaks == pytest.approx(
        [bench.pricing.costs(SPACE.decode(point))["activation_bytes"] for point in EVERY[::7].tolist()], rel=1e-12
    )


def test_what_is_ahead_bounds_what_rises(bench: Bench) -> None:
    ceiling = Ceiling(SPACE, rows_of(bench.pricing, ["bit_ops"]))
    assert ceiling.ahead.shape == (len(ceiling.order) + 1, 1)
    assert ceiling.ahead[-1] == 0
    assert (np.diff(ceiling.ahead[:, 0]) <= 0).all()
    assert ceiling.ahead[0] >= ceiling.most - ceiling.least
