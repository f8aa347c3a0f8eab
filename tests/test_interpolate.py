"""Interpolation of utilisation: exact where measured, exact for planes, bounded by its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.interpolate import RIDGE, Interpolator


def grid(dimensions: int, side: int = 6) -> np.ndarray:
    axes = np.meshgrid(*[np.arange(side, dtype=float)] * dimensions, indexing="ij")
    return np.stack([axis.ravel() for axis in axes], axis=1)


def made(dimensions: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    points = grid(dimensions)
    limits = np.exp2(points.sum(axis=1)) * 1e-6
    return points, limits, limits / rng.uniform(0.2, 0.9, len(points))


@pytest.mark.parametrize("scheme", ["plane", "mean"])
@pytest.mark.parametrize("dimensions", [1, 2, 3, 5])
def test_a_measured_point_gets_what_was_measured(scheme: str, dimensions: int) -> None:
    points, limits, seconds = made(dimensions)
    found = Interpolator(points, limits, seconds, scheme=scheme)  # type: ignore[arg-type]
    assert found.predict(points, limits) == pytest.approx(seconds, rel=1e-12)


def test_points_measured_several_times_count_by_their_geometric_mean() -> None:
    points = np.array([[0.0], [0.0], [1.0]])
    found = Interpolator(points, np.ones(3), np.array([2.0, 8.0, 3.0]))
    assert found.predict(np.array([[0.0]]), np.ones(1)) == pytest.approx([4.0])


def test_the_mean_is_that_of_inverse_squared_distance() -> None:
    points = np.array([[0.0], [3.0]])
    found = Interpolator(points, np.ones(2), np.exp([0.0, 1.0]), neighbours=2, scheme="mean")
    # weights 1 and 1/4 at distances 1 and 2
    assert found.predict(np.array([[1.0]]), np.ones(1)) == pytest.approx(np.exp([0.2]))


def test_the_plane_follows_a_plane() -> None:
    points = grid(3)
    logs = -2.0 + points @ [0.1, 0.2, -0.15]
    found = Interpolator(points, np.ones(len(points)), np.exp(-logs))
    inside = np.random.default_rng(0).uniform(1, 4, (50, 3))
    expected = np.exp(-2.0 + inside @ [0.1, 0.2, -0.15])
    assert found.utilisation(inside) == pytest.approx(expected, rel=10 * RIDGE)
    mean = Interpolator(points, np.ones(len(points)), np.exp(-logs), scheme="mean")
    off = [np.abs(one.utilisation(inside) / expected - 1).mean() for one in (found, mean)]
    assert off[0] < off[1] / 3


def test_beyond_the_measured_sizes_utilisation_is_the_boundarys() -> None:
    points, limits, seconds = made(2)
    found = Interpolator(points, limits, seconds)
    far = found.utilisation(np.array([[50.0, 50.0]]))
    measured = limits / seconds
    assert measured.min() <= far[0] <= measured.max()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 12), st.sampled_from(["plane", "mean"]))
def test_no_utilisation_leaves_the_measured_ones(seed: int, dimensions: int, neighbours: int, scheme: str) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(30, dimensions))
    limits, seconds = rng.uniform(1, 2, 30), rng.uniform(2, 9, 30)
    found = Interpolator(points, limits, seconds, neighbours, scheme)  # type: ignore[arg-type]
    there = rng.normal(size=(20, dimensions)) * 3
    used = found.utilisation(there)
    measured = limits / seconds
    assert (used >= measured.min() * (1 - 1e-9)).all()
    assert (used <= measured.max() * (1 + 1e-9)).all()
    # Doubling every limit and every time changes no utilisation; doubling the limits asked for doubles the times.
    assert Interpolator(points, 2 * limits, 2 * seconds, neighbours, scheme).utilisation(there) == pytest.approx(used)  # type: ignore[arg-type]
    assert found.predict(there, 2 * np.ones(20)) == pytest.approx(2 * found.predict(there, np.ones(20)))


def test_the_order_of_measurements_does_not_matter() -> None:
    points, limits, seconds = made(2)
    order = np.random.default_rng(1).permutation(len(points))
    there = np.random.default_rng(2).uniform(0, 5, (40, 2))
    one = Interpolator(points, limits, seconds, neighbours=5).utilisation(there)
    other = Interpolator(points[order], limits[order], seconds[order], neighbours=5).utilisation(there)
    assert other == pytest.approx(one)


def test_sites_are_left_out_whole() -> None:
    points, limits, seconds = made(2)
    sites = points[:, 0]  # each line of the grid
    found = Interpolator(points, limits, seconds)
    predicted = found.held_out(sites, folds=6)
    for site in range(6):
        held = sites == site
        alone = Interpolator(points[~held], limits[~held], seconds[~held])
        assert predicted[held] == pytest.approx(alone.predict(points[held], limits[held]))
    assert found.holdout_error(sites, folds=6) == np.median(np.abs(predicted / seconds - 1))


def test_one_measurement_is_enough_and_none_is_not() -> None:
    one = Interpolator(np.zeros((1, 2)), np.ones(1), np.full(1, 4.0))
    assert one.predict(np.ones((3, 2)), np.full(3, 2.0)).tolist() == [8.0] * 3
    assert one.predict(np.empty((0, 2)), np.empty(0)).shape == (0,)
    with pytest.raises(ValueError, match="must be points"):
        Interpolator(np.empty((0, 2)), np.empty(0), np.empty(0))
    with pytest.raises(ValueError, match="with N limits"):
        Interpolator(np.zeros((2, 2)), np.ones(1), np.ones(2))
    with pytest.raises(ValueError, match="allowed: plane, mean"):
        Interpolator(np.zeros((1, 2)), np.ones(1), np.ones(1), scheme="cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neighbours"):
        Interpolator(np.zeros((1, 2)), np.ones(1), np.ones(1), neighbours=0)
    with pytest.raises(ValueError, match=r"\(M, 2\)"):
        one.utilisation(np.zeros((1, 3)))
