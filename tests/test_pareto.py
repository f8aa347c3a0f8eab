"""Fronts and hypervolumes against brute force, and against Optuna's implementation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from search.pareto import front, hypervolume

GRID = st.integers(1, 3).flatmap(
    lambda objectives: st.tuples(
        st.integers(0, 8).flatmap(
            lambda count: arrays(np.float64, (count, objectives), elements=st.integers(0, 4).map(float))
        ),
        st.lists(st.booleans(), min_size=objectives, max_size=objectives),
    )
)


def front_by_definition(points: np.ndarray, maximise: list[bool]) -> list[bool]:
    signs = np.where(maximise, -1.0, 1.0)
    losses = [tuple(row) for row in points * signs]

    def beaten(index: int) -> bool:
        own = losses[index]
        dominated = any(other != own and all(o <= s for o, s in zip(other, own, strict=True)) for other in losses)
        return dominated or own in losses[:index]

    return [not beaten(index) for index in range(len(losses))]


@given(GRID)
def test_front_is_what_the_definition_says(case: tuple[np.ndarray, list[bool]]) -> None:
    points, maximise = case
    assert front(points, maximise).tolist() == front_by_definition(points, maximise)


@given(GRID)
def test_hypervolume_counts_the_dominated_cells_of_a_grid(case: tuple[np.ndarray, list[bool]]) -> None:
    points, maximise = case
    reference = [0.0 if more else 4.0 for more in maximise]
    cells = np.stack(np.meshgrid(*[np.arange(4) + 0.5] * len(maximise), indexing="ij"), -1).reshape(-1, len(maximise))
    signs = np.where(maximise, -1.0, 1.0)
    covered = [any(((point - cell) * signs <= 0).all() for point in points) for cell in cells]
    assert hypervolume(points, reference, maximise) == pytest.approx(sum(covered))


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_hypervolume_is_optunas(objectives: int) -> None:
    compute_hypervolume = pytest.importorskip("optuna._hypervolume").compute_hypervolume
    points = np.random.default_rng(objectives).uniform(0, 1.2, (30, objectives))
    reference = np.ones(objectives)
    inside = points[(points < reference).all(axis=1)]
    expected = compute_hypervolume(inside, reference)
    assert hypervolume(points, reference, [False] * objectives) == pytest.approx(expected)


def test_two_accuracies_and_sizes() -> None:
    points = np.array([[0.9, 100.0], [0.8, 50.0], [0.85, 120.0], [0.9, 100.0], [0.95, 200.0]])
    assert front(points, [True, False]).tolist() == [True, True, False, False, True]
    assert hypervolume(points, [0.5, 250.0], [True, False]) == pytest.approx(0.45 * 50 + 0.4 * 100 + 0.3 * 50)


def test_infinitely_bad_points_are_only_kept_where_nothing_beats_them() -> None:
    points = np.array([[np.inf, 1.0], [1.0, 2.0], [np.inf, 2.0]])
    assert front(points, [False, False]).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("points", "message"),
    [(np.zeros((2, 3)), r"shape \(points, 2\)"), (np.zeros(2), "shape"), (np.array([[1.0, np.nan]]), "NaN")],
)
def test_wrong_points_are_refused(points: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        front(points, [True, False])
