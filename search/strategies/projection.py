"""Bringing policies within the budget: the nearest one that keeps it, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from search.assignment import assignment_problem, selection_points, unit_choice_matrix, variable_limits
from search.pricing import Pricing
from search.sensitivity.choices import starts_of
from search.solve.linear import solve


class Projection:
    """Finds the nearest point within limits on costs.

    Near is what changes few decisions by few steps: the distance of two points is the sum over all decisions of how
    many formats apart they are, and of all nearest points the one that steps down least is taken. It is an exact
    multiple-choice problem, so that limits on several costs, peaks, and boundary costs are kept, too.
    """

    def __init__(self, pricing: Pricing, limits: Mapping[str, float]) -> None:
        """Prepares the projection.

        Args:
            pricing: The space and its prices.
            limits: Absolute limits on costs.
        """
        self._pricing = pricing
        self._limits = dict(limits)
        self._within = variable_limits(pricing, limits)
        self._made = unit_choice_matrix(pricing.space)
        self._problem = assignment_problem(pricing)
        starts = starts_of(pricing.space)
        sizes = np.diff([*starts, self._made.shape[1]])
        self._levels = np.concatenate([np.arange(size) for size in sizes])
        self._decisions = np.repeat(np.arange(len(sizes)), sizes)

    def nearest(self, point: Sequence[int]) -> tuple[int, ...]:
        """Returns the nearest point within the limits, `point` itself where it keeps them.

        Raises:
            ValueError: If no point keeps the limits.
        """
        costs = self._pricing.costs(self._pricing.space.decode(point))
        if all(costs[name] <= limit for name, limit in self._limits.items()):
            return tuple(int(level) for level in point)
        steps = self._levels - np.asarray(point)[self._decisions]
        distances = np.abs(steps) - steps / (2 * len(self._levels) * (1 + self._levels.max()))
        units = np.cumsum([len(unit.choices) for unit in self._pricing.space.units])[:-1]
        found = solve(replace(self._problem, scores=tuple(np.split(self._made @ distances, units))), self._within)
        if found is None:
            raise ValueError(f"no point keeps the limits {self._limits}")
        return tuple(selection_points(self._pricing.space, [found])[0].tolist())
