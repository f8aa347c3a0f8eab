"""Anytime-valid tests and intervals: closed forms, coverage under every number of looks, and power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from search.quality import sequential
from search.quality.sequential import (
    BETS,
    NORMAL_FROM,
    betting_capital,
    combined_capital,
    mean_interval,
    normal_capital,
)

ALPHA = 0.05
SURE = -math.log(ALPHA)


def outcomes(count: int, up: float, down: float) -> np.ndarray:
    """A set of paired differences of right-or-wrong scores."""
    ups, downs = round(count * up), round(count * down)
    return np.array([1.0] * ups + [-1.0] * downs + [0.0] * (count - ups - downs))


def orders(values: np.ndarray, repetitions: int, seed: int = 0) -> np.ndarray:
    """The set in many random orders, shape `(repetitions, samples)`."""
    return np.random.default_rng(seed).permuted(np.tile(values, (repetitions, 1)), axis=1)


def by_hand(samples: list[float], population: int, mean: float) -> list[float]:
    """The gamblers' mean stakes for samples in [0, 1], one sample at a time."""
    stakes, found, total = [1.0] * len(BETS), [], 0.0
    for drawn, sample in enumerate(samples):
        rest = (population * mean - total) / (population - drawn)
        stakes = [stake * (1 + bet * (sample / rest - 1)) for stake, bet in zip(stakes, BETS, strict=True)]
        total += sample
        found.append(sum(stakes) / len(BETS))
    return found


def test_stakes_by_hand() -> None:
    samples = [1.0, 0.0, 0.5, 1.0]
    found = betting_capital(np.array(samples), 9, 0.6, 0.0, 1.0)
    assert np.exp(found) == pytest.approx(by_hand(samples, 9, 0.6))
    scaled = betting_capital(2 * np.array(samples) - 1, 9, 0.2, -1.0, 1.0)
    assert scaled == pytest.approx(found), "only where a sample lies between the bounds matters"


def test_a_bet_is_fair_if_the_hypothesis_is_true() -> None:
    """Over all orders of a small set the stakes are 1 on average, after every sample."""
    from itertools import permutations

    values = [0.0, 0.2, 0.5, 0.5, 0.9, 1.0]
    every = np.array(list(permutations(values)))
    stakes = np.exp(betting_capital(every, 6, float(np.mean(values)), 0.0, 1.0))
    assert stakes[:, :5].mean(0) == pytest.approx(np.ones(5))
    above = np.exp(betting_capital(every, 6, float(np.mean(values)) + 0.1, 0.0, 1.0))
    assert (above[:, :5].mean(0) < 1).all(), "and fall where the mean is smaller than supposed"


def test_samples_that_rule_a_mean_out_by_themselves() -> None:
    found = betting_capital(np.array([1.0, 1.0, 1.0, 0.0]), 10, 0.2, 0.0, 1.0)
    assert np.isfinite(found[:2]).all()
    assert found[3] == np.inf, "three ones of ten cannot have the mean 0.2"


@given(
    st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=30),
    st.floats(-0.99, 0.9),
    st.floats(0.001, 0.1),
    st.integers(0, 40),
)
def test_stakes_fall_with_the_mean_supposed(values: list[float], mean: float, more: float, unseen: int) -> None:
    samples, population = np.array(values), len(values) + unseen
    low, high = (betting_capital(samples, population, m, -1.0, 1.0) for m in (mean, mean + more))
    assert (high <= low + 1e-9).all()
    low, high = (normal_capital(samples, population, m) for m in (mean, mean + more))
    assert (high <= low + 1e-9).all()


@pytest.mark.parametrize("population", [350, 2000])
@pytest.mark.parametrize(("up", "down"), [(0.05, 0.05), (0.02, 0.01), (0.3, 0.1), (0.01, 0.0)])
def test_bounded_samples_are_rarely_misjudged_at_any_look(population: int, up: float, down: float) -> None:
    """The worst case of the hypothesis: the mean is exactly the largest it allows. Ville: at most alpha."""
    values = outcomes(population, up, down)
    stakes = betting_capital(orders(values, 1000), population, values.mean(), -1.0, 1.0)
    assert (stakes.max(1) >= SURE).mean() <= ALPHA


def test_an_interval_for_one_look_would_often_misjudge() -> None:
    """What the simulation above must be able to show: a t-test after every sample is wrong several times as often."""
    values = outcomes(2000, 0.05, 0.05)
    seen = orders(values, 1000)[:, :1000]
    count = np.arange(1, 1001)
    means = seen.cumsum(1) / count
    spread = np.sqrt(((seen**2).cumsum(1) / count - means**2) / count)
    naive = means[:, 100:] > stats.norm.ppf(1 - ALPHA) * spread[:, 100:]
    assert naive.any(1).mean() > 3 * ALPHA


def test_other_bounded_samples_are_rarely_misjudged() -> None:
    values = np.random.default_rng(1).beta(0.3, 2.0, 600)
    stakes = betting_capital(orders(values, 2000), 600, values.mean(), 0.0, 1.0)
    assert (stakes.max(1) >= SURE).mean() <= ALPHA


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("normal", ALPHA), ("t3", ALPHA), ("laplace", ALPHA), ("exponential", ALPHA), ("long tail below", 0.06)],
)
@pytest.mark.parametrize("population", [300, 3000])
def test_unbounded_samples_are_rarely_misjudged(name: str, allowed: float, population: int) -> None:
    rng = np.random.default_rng(2)
    draw = {
        "normal": lambda: rng.normal(3.0, 2.0, population),
        "t3": lambda: rng.standard_t(3, population),
        "laplace": lambda: rng.laplace(size=population),
        "exponential": lambda: rng.exponential(size=population),
        "long tail below": lambda: -rng.exponential(size=population),
    }[name]
    missed = [
        (normal_capital(orders(values, 300, seed), population, values.mean()).max(1) >= SURE).mean()
        for seed, values in enumerate(draw() for _ in range(6))
    ]
    assert np.mean(missed) <= allowed


def test_the_normal_mixture_is_the_integral_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of exp(l s - l^2 t / 2) over a half-normal l; without our correction and with the spread known."""
    monkeypatch.setattr(sequential, "PHANTOMS", 0)
    samples = np.random.default_rng(3).normal(size=80)
    mean, population = -0.1, 10**9
    scaled = (samples - mean).sum() / samples.std()
    ratio = (-2 * math.log(0.1) + math.log(1 - 2 * math.log(0.1))) / sequential.TIGHTEST_AT
    expected, _ = integrate.quad(
        lambda bet: 2 * stats.norm.pdf(bet, scale=math.sqrt(ratio)) * math.exp(bet * scaled - bet**2 * 80 / 2), 0, 10
    )
    assert normal_capital(samples, population, mean)[-1] == pytest.approx(math.log(expected), abs=1e-5)
    assert normal_capital(samples, population, 1e6)[-1] < -10, "also where everything speaks for the hypothesis"


def test_nothing_is_concluded_from_few_or_equal_unbounded_samples() -> None:
    samples = np.random.default_rng(4).normal(5.0, 0.1, 200)
    found = normal_capital(samples, 1000, 0.0)
    assert (found[: NORMAL_FROM - 1] == 0).all()
    assert found[NORMAL_FROM - 1] > SURE
    assert normal_capital(np.full(200, 5.0), 1000, 0.0).max() <= 0, "no spread, no scale"


@pytest.mark.parametrize(
    ("up", "down", "within"), [(0.2, 0.05, 100), (0.1, 0.02, 180), (0.05, 0.01, 320), (0.02, 0.0, 400)]
)
def test_bounded_samples_are_told_apart_early(up: float, down: float, within: int) -> None:
    """Of 5,000 samples, a few hundred show a real difference on average."""
    stakes = betting_capital(orders(outcomes(5000, up, down), 200), 5000, 0.0, -1.0, 1.0)
    assert (stakes >= SURE).any(1).all()
    assert (stakes >= SURE).argmax(1).mean() < within


@pytest.mark.parametrize(("shift", "within"), [(0.1, 800), (0.2, 250), (0.5, 80)])
def test_unbounded_samples_are_told_apart_early(shift: float, within: int) -> None:
    values = np.random.default_rng(5).normal(size=5000)
    stakes = normal_capital(orders(values - values.mean() + shift, 200), 5000, 0.0)
    assert (stakes >= SURE).argmax(1).mean() < within


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), None], ids=["bounded", "unbounded"])
def test_intervals_hold_at_all_looks_at_once(bounds: tuple[float, float] | None) -> None:
    rng = np.random.default_rng(6)
    missed = 0
    for repetition in range(60):
        values = outcomes(400, 0.1, 0.04) if bounds else rng.normal(0.3, 1.0, 400)
        samples = orders(values, 1, repetition)[0]
        ends = [mean_interval(samples[:look], 400, ALPHA, bounds) for look in (64, 128, 256)]
        missed += any(not low <= values.mean() <= high for low, high in ends)
        widths = [high - low for low, high in ends]
        assert widths[0] > widths[1] > widths[2]
    assert missed <= 3


def test_intervals_shrink_to_the_mean_as_the_set_runs_out() -> None:
    values = orders(outcomes(300, 0.1, 0.04), 1)[0]
    low, high = mean_interval(values, 300, ALPHA, (-1.0, 1.0))
    assert low <= values.mean() <= high
    assert high - low < 0.02
    assert mean_interval(values[:1], 300, ALPHA, (-1.0, 1.0)) == pytest.approx((-1, 1), abs=0.05)
    assert mean_interval(values[:10], 300, ALPHA) == (-math.inf, math.inf)


def test_stakes_on_several_hypotheses() -> None:
    capitals = np.array([[0.0, 1.0], [2.0, -1.0]])
    expected = np.log(0.75 * np.exp(capitals[0]) + 0.25 * np.exp(capitals[1]))
    assert combined_capital(capitals, np.array([0.75, 0.25])) == pytest.approx(expected)
    assert combined_capital(np.array([[np.inf], [0.0]]), np.array([0.5, 0.5])) == np.inf


def test_impossible_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"samples must lie within \[0.0, 1.0\], found -0.5 to 1.0"):
        betting_capital(np.array([1.0, -0.5]), 10, 0.5, 0.0, 1.0)
    with pytest.raises(ValueError, match="3 samples cannot be drawn from 2 without replacement"):
        normal_capital(np.zeros(3), 2, 0.0)
