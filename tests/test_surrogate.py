"""The surrogate against Gaussian process regression done by scikit-learn, and what it must never get wrong."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from search.strategies.surrogate import NOISE, Surrogate, chance_below, expected_improvement, likeness


def study(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    points = np.unique(rng.integers(3, size=(4 * count, 10)), axis=0)
    points = rng.permutation(points)[:count]
    forecasts = points @ rng.random((10, 2)) + 0.1 * rng.random((len(points), 2))
    return points, forecasts, forecasts @ [0.7, 0.2] + 0.05 * rng.random(len(points))


def test_residuals_are_learnt_as_scikit_learn_learns_them() -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import PairwiseKernel

    points, forecasts, losses = study(40, 0)
    surrogate = Surrogate.fit(points[:25], forecasts[:25], losses[:25])
    trend = surrogate.weights[0] + ((forecasts - surrogate.centre) / surrogate.spread) @ surrogate.weights[1:]

    # A Laplacian kernel of one-hot coded points: each differing decision adds 2 to their distance.
    coded = (points[:, :, None] == np.arange(3)).reshape(len(points), -1).astype(float)
    kernel = PairwiseKernel(metric="laplacian", gamma=0.5 / 1.5, gamma_bounds="fixed")
    process = GaussianProcessRegressor(kernel, alpha=NOISE, optimizer=None)
    process.fit(coded[:25], (losses - trend)[:25])
    expected, deviation = process.predict(coded[25:], return_std=True)

    mean, found = surrogate.posterior(points[25:], forecasts[25:])

    np.testing.assert_allclose(mean, trend[25:] + expected, atol=1e-9)
    np.testing.assert_allclose(found, surrogate.deviation * np.sqrt(deviation**2 + NOISE), rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_predictors_never_count_against_loss_and_useless_ones_little(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, forecasts, losses = study(60, seed)
    useless = rng.random(len(points))

    weights = Surrogate.fit(points, np.column_stack([forecasts, useless]), losses).weights

    assert (weights[1:] >= 0).all()
    assert weights[3] < 0.2 * weights[1:3].max()


def test_one_measurement_is_enough_to_rank_by_forecast() -> None:
    points, forecasts, losses = study(30, 1)
    surrogate = Surrogate.fit(points[:1], forecasts[:1], losses[:1])

    mean, deviation = surrogate.posterior(points, np.repeat(np.arange(30.0)[:, None], 2, 1))

    assert np.isfinite(mean).all()
    assert (deviation > 0).all()


def test_all_measured_alike_is_no_error() -> None:
    points, forecasts, _ = study(10, 2)
    mean, deviation = Surrogate.fit(points, forecasts, np.zeros(10)).posterior(points, forecasts)

    assert np.isfinite(mean).all()
    assert np.isfinite(deviation).all()


def test_likeness_falls_with_every_differing_decision() -> None:
    points = np.array([[0] * 20, [1] + [0] * 19, [1, 1] + [0] * 18])

    assert likeness(points, points)[0] == pytest.approx([1, np.exp(-1 / 3), np.exp(-2 / 3)])


def test_expected_improvement_is_the_mean_of_what_lies_below() -> None:
    draws = np.random.default_rng(0).normal(0.3, 0.2, 400_000)

    found = expected_improvement(np.array([0.3]), np.array([0.2]), 0.25)

    assert found == pytest.approx([np.maximum(0.25 - draws, 0).mean()], rel=0.01)
    assert chance_below(np.array([0.3]), np.array([0.2]), 0.25) == pytest.approx([norm.cdf(-0.25)])
