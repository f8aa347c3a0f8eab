"""Policies near good ones: a few decisions changed, or taken from another good policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from search.pricing import Pricing
from search.space import SearchSpace

CHANGES = (1, 2, 2, 3)  # decisions changed at once; exchanging bits between two takes two


def neighbours(
    space: SearchSpace, parents: np.ndarray, count: int, rng: np.random.Generator, crossed: float = 0.25
) -> np.ndarray:
    """Draws points near others, each once, none of them a parent; fewer than `count` where they repeat.

    Args:
        space: What may be decided.
        parents: Points, shape `(parents, decisions)`, at least one.
        count: How many are drawn.
        rng: Where chance comes from.
        crossed: Share that takes every decision from one of two parents, before it is changed.
    """
    free, sizes = np.array(space.free), np.array([len(decision.formats) for decision in space.decisions])
    if not len(free):
        return np.empty((0, len(sizes)), dtype=np.int64)
    points = parents[rng.integers(len(parents), size=count)].copy()
    others = parents[rng.integers(len(parents), size=count)]
    taken = (rng.random(points.shape) < 0.5) & (rng.random((count, 1)) < crossed)
    points[taken] = others[taken]
    changes = np.minimum(np.array(CHANGES)[rng.integers(len(CHANGES), size=count)], len(free))
    for number in range(int(changes.max())):
        rows = np.flatnonzero(changes > number)
        columns = free[rng.integers(len(free), size=len(rows))]
        steps = 1 + rng.integers(sizes[columns] - 1)  # never the format it has
        points[rows, columns] = (points[rows, columns] + steps) % sizes[columns]
    known = set(map(bytes, np.ascontiguousarray(parents)))
    fresh = {bytes(point): point for point in points if bytes(point) not in known}
    return np.array(list(fresh.values()), dtype=np.int64).reshape(-1, len(sizes))


def within(pricing: Pricing, points: np.ndarray, limits: Mapping[str, float]) -> np.ndarray:
    """The points whose additive costs keep the limits; limits on other costs are not looked at."""
    totals = pricing.totals(points)
    keeps = [totals[name] <= limit for name, limit in limits.items() if name in totals]
    return points[np.all(keeps, axis=0)] if keeps else points


def stacked(points: Sequence[np.ndarray], decisions: int) -> np.ndarray:
    """Puts points together, each once, in the order in which they first come."""
    every = np.concatenate([np.empty((0, decisions), dtype=np.int64), *points]).astype(np.int64)
    return np.array(list({bytes(point): point for point in every}.values()), dtype=np.int64).reshape(-1, decisions)
