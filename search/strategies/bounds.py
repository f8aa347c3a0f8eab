"""What many points of a space cost at once where limits look, boundaries and peaks included."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from search.assignment import assignment_problem, variable_limits
from search.pricing import Pricing
from search.solve.problem import Problem
from search.solve.totals import Totals


class Bounds:
    """Limits on costs, held against many points of a space; `Objective.is_feasible` decides the last digit."""

    def __init__(self, pricing: Pricing, limits: Mapping[str, float], problem: Problem | None = None) -> None:
        """Lays out the sums that the limits look at.

        Args:
            pricing: The space and its prices.
            limits: Absolute limits on costs.
            problem: What `assignment_problem` makes of the prices, where it was made before.
        """
        space = pricing.space
        problem = problem or assignment_problem(pricing)
        self._weights = [unit.weight for unit in space.units]
        self._inputs = [unit.input for unit in space.units]
        self._counts = np.array([len(space.decisions[unit.input].formats) for unit in space.units])
        self._problem = problem
        self._limits = dict(limits)
        self._within = variable_limits(pricing, limits)
        self._totals = Totals(problem, self._within)

    def excess(self, points: np.ndarray) -> np.ndarray:
        """By how much points exceed the limits, in shares of what choices can change; 0 where they keep all of them.

        Args:
            points: Shape `(policies, decisions)`.

        Returns:
            Shape `(policies,)`.
        """
        return self._totals.excess(self._totals.of(self._selections(points)))

    def keep(self, points: np.ndarray) -> np.ndarray:
        """Which points keep all limits, but for rounding, shape `(policies,)`."""
        return self._totals.fit(self._totals.of(self._selections(points)))

    def price(self, points: np.ndarray) -> np.ndarray:
        """What the choices of points cost, as a share of every limit, added up over the limits, shape `(policies,)`.

        Of a peak, what counts is the mean over all moments that may be the peak, so that every tensor that is alive at
        one of them counts for something.
        """
        chosen = self._selections(points)
        shares = [totals.of(chosen).mean(1) / self._limits[name] for name, totals in self._each.items()]
        price: np.ndarray = np.sum(shares, axis=0) if shares else np.zeros(len(points))
        return price

    @cached_property
    def _each(self) -> dict[str, Totals]:
        """The sums that every single limit looks at."""
        return {name: Totals(self._problem, {name: most}) for name, most in self._within.items()}

    def _selections(self, points: np.ndarray) -> np.ndarray:
        """Index of every unit's choice, shape `(policies, units)`."""
        chosen: np.ndarray = points[:, self._weights] * self._counts + points[:, self._inputs]
        return chosen
