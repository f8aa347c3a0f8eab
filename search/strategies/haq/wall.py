"""HAQ's action wall: how an episode that is over budget is brought within it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from search.pricing import Pricing
from search.strategies.projection import Projection

SLACK = 1e-9  # by which sums of costs may be off, as a share; what they let pass is priced exactly


class ActionWall:
    """Lowers decisions along the walk, backwards, by one format each, round after round, until all limits are kept.

    Backwards, a layer's input is lowered before its weight, as the walk takes them the other way round. What is at its
    lowest stays there. This is `_final_action_wall` of HAQ's `lib/env/linear_quantize_env.py`; first and last layer
    stay as they are if the space pins them.

    Where a cost rises as bits are taken away, the lowest formats may be over budget while others are not: if no point
    on the way down keeps the limits, the nearest one to the agent's own that does is taken in its place (`Projection`).
    """

    def __init__(self, pricing: Pricing, limits: Mapping[str, float], walk: Sequence[int]) -> None:
        """Builds the wall.

        Args:
            pricing: The space and its prices.
            limits: Absolute limits on costs.
            walk: The decisions that may be lowered, in the order in which they are taken.
        """
        self._pricing = pricing
        self._limits = dict(limits)
        self._backwards = tuple(reversed(walk))

    def confine(self, point: Sequence[int]) -> tuple[int, ...]:
        """Returns the first point on the way down from `point` that keeps the limits, `point` itself where it does.

        Raises:
            ValueError: If no point of the space keeps the limits.
        """
        if not self._limits or self._keeps(point):
            return tuple(int(level) for level in point)
        way = self.way_down(point)
        totals = self._pricing.totals(way)
        near = [totals[name] <= limit * (1 + SLACK) for name, limit in self._limits.items() if name in totals]
        for lower in way[np.all(near, axis=0)] if near else way:
            if self._keeps(lower):
                return tuple(lower.tolist())
        return self._projection.nearest(point)

    def way_down(self, point: Sequence[int]) -> np.ndarray:
        """All points below `point` in the order in which the wall comes by, shape `(points, decisions)`."""
        lower, way = np.array(point), [np.array(point)]
        while lower[list(self._backwards)].any():
            for decision in self._backwards:
                if lower[decision]:
                    lower[decision] -= 1
                    way.append(lower.copy())
        return np.array(way[1:], dtype=np.int64).reshape(-1, len(lower))

    def _keeps(self, point: Sequence[int] | np.ndarray) -> bool:
        costs = self._pricing.costs(self._pricing.space.decode([int(level) for level in point]))
        return all(costs[name] <= limit for name, limit in self._limits.items())

    @cached_property
    def _projection(self) -> Projection:
        return Projection(self._pricing, self._limits)
