"""Intervals of paired drops against worked numbers, scipy and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from search.quality.interval import paired_interval


def outcomes(up: int, down: int, same: int) -> np.ndarray:
    return np.array([1.0] * up + [-1.0] * down + [0.0] * same)


def test_agresti_min_by_hand() -> None:
    # n = 100, b = 12, c = 4: p = (12.5 - 4.5) / 102 = 0.078431; variance (17 - 64 / 102) / 102^2 = 0.00157368
    mean, low, high = paired_interval(outcomes(12, 4, 84))
    assert mean == pytest.approx(0.08)
    assert low == pytest.approx(0.0784314 - 1.959964 * 0.0396697, abs=1e-6)
    assert high == pytest.approx(0.0784314 + 1.959964 * 0.0396697, abs=1e-6)


def test_nothing_changed_still_leaves_doubt() -> None:
    mean, low, high = paired_interval(np.zeros(350))
    assert mean == 0
    assert high == -low == pytest.approx(1.959964 / 352, rel=1e-6)


def test_one_sided_interval_holds_the_mean() -> None:
    mean, low, high = paired_interval(outcomes(5, 0, 0))
    assert mean == high == 1.0
    assert low < 1


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=40))
def test_other_scores_get_students_t(differences: list[float]) -> None:
    values = np.array([*differences, 0.5, 0.25])
    mean, low, high = paired_interval(values)
    expected = stats.ttest_rel(values, np.zeros(len(values))).confidence_interval(0.95)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert low <= mean <= high


def test_students_t_against_scipys_interval() -> None:
    values = np.random.default_rng(0).normal(0.3, 2, 25)
    expected = stats.t.interval(0.95, 24, loc=values.mean(), scale=stats.sem(values))
    assert paired_interval(values)[1:] == pytest.approx(expected)


def test_a_single_sample_says_nothing() -> None:
    assert paired_interval(np.array([0.3])) == (0.3, -math.inf, math.inf)


@pytest.mark.parametrize(("up", "down"), [(0.02, 0.01), (0.05, 0.05), (0.2, 0.02)])
def test_coverage_of_right_or_wrong_scores(up: float, down: float) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        draw = rng.choice([1.0, -1.0, 0.0], 350, p=[up, down, 1 - up - down])
        _, low, high = paired_interval(draw)
        covered += low <= up - down <= high
    assert 0.93 <= covered / 2000 <= 0.99


def test_coverage_of_other_scores() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        _, low, high = paired_interval(rng.exponential(1.0, 200))
        covered += low <= 1 <= high
    assert covered / 1000 >= 0.93
