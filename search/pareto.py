"""Which points no other point beats, and how much of the space they cover: pure functions on arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def front(points: np.ndarray, maximise: Sequence[bool]) -> np.ndarray:
    """Marks the points that are not dominated.

    A point is dominated if another is at least as good in every objective and better in one. Of equal points the first
    is kept.

    Args:
        points: Objectives, shape `(points, objectives)`.
        maximise: Per objective, whether more is better.

    Returns:
        A boolean mask, shape `(points,)`.

    Raises:
        ValueError: If shapes disagree or a value is NaN.
    """
    losses = _losses(points, maximise)
    mask = np.zeros(len(losses), dtype=bool)
    open_points = np.lexsort(losses.T[::-1])  # best first objective first; stable, hence equal points in their order
    while len(open_points):
        best = open_points[0]  # nothing after it in this order can dominate it
        mask[best] = True
        open_points = open_points[(losses[open_points] < losses[best]).any(axis=1)]
    return mask


def hypervolume(points: np.ndarray, reference: Sequence[float], maximise: Sequence[bool]) -> float:
    """Computes the volume that is dominated by the points and dominates the reference point.

    Points that are not better than the reference in every objective count for nothing. Computed by slicing objectives
    one at a time (While et al., "A Faster Algorithm for Calculating Hypervolume", IEEE TEC 2006), which is exact and
    meant for a few objectives.

    Args:
        points: Objectives, shape `(points, objectives)`.
        reference: The worst acceptable value of each objective, shape `(objectives,)`.
        maximise: Per objective, whether more is better.

    Raises:
        ValueError: If shapes disagree or a value is NaN.
    """
    corner = _losses(np.asarray(reference, dtype=np.float64)[np.newaxis], maximise)[0]
    losses = _losses(points, maximise)
    return _volume(losses[(losses < corner).all(axis=1)], corner)


def _volume(losses: np.ndarray, corner: np.ndarray) -> float:
    """Hypervolume of losses, shape `(points, objectives)`, that all lie below `corner`."""
    if not len(losses):
        return 0.0
    if len(corner) == 1:
        return float(corner[0] - losses.min())
    losses = losses[front(losses, [False] * len(corner))]
    losses = losses[np.argsort(losses[:, -1], kind="stable")]
    thickness = np.diff(losses[:, -1], append=corner[-1])
    slices = range(1, len(losses) + 1)  # between two neighbours, all points so far cover the other objectives
    return sum(
        (float(thickness[end - 1]) * _volume(losses[:end, :-1], corner[:-1]) for end in slices if thickness[end - 1]),
        0.0,
    )


def _losses(points: np.ndarray, maximise: Sequence[bool]) -> np.ndarray:
    """Turns objectives into losses, of which less is better."""
    array = np.asarray(points, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != len(maximise) or not len(maximise):
        raise ValueError(f"points must have shape (points, {len(maximise)}) to go with maximise, got {array.shape}")
    if np.isnan(array).any():
        raise ValueError("an objective is NaN; leave out points that were not measured")
    return np.where(np.asarray(maximise, dtype=bool), -array, array)
