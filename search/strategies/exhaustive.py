"""Every policy within the budget: the truth, where the space is small enough to be told it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from search.errors import ConfigError, InfeasibleError
from search.objective import Objective
from search.pricing import Pricing
from search.space import SearchSpace
from search.strategies.asked import Asked
from search.strategies.base import Strategy, checks_types
from search.strategies.bounds import Bounds

LARGEST = 10_000
WIDEST = 20  # partial policies looked at side by side, in policies that may be measured


class Exhaustive(Strategy):
    """Measures every policy within the budget once, and ends.

    Where the budget limits costs, the dearest policies come first, as they tend to lose least; where it limits the drop
    of quality, the cheapest come first, so that the first one allowed is the optimum. No sensitivities are scored. A
    space with more policies within the budget than `largest` is refused before anything is measured; where
    `evaluations` are fewer, the search ends with them.
    """

    name = "exhaustive"

    @checks_types
    def __init__(
        self,
        evaluations: int = LARGEST,
        seconds: float | None = None,
        start_from: str | None = None,
        largest: int = LARGEST,
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.
            largest: Most policies within the budget that it agrees to measure.

        Raises:
            ConfigError: If an allowance is not positive.
        """
        super().__init__(evaluations, seconds, start_from)
        if largest < 1:
            raise ConfigError(f"strategy.largest={largest} must be at least 1")
        self.largest = largest

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        points = points_within(objective.pricing, objective.limits, WIDEST * self.largest)
        if points is None or len(points) > self.largest:
            found = "too many to count" if points is None else f"{len(points):,}"
            raise InfeasibleError(
                f"strategy=exhaustive measures every policy within the budget, and there are {found} of the space's "
                f"{readable(space.size)}; strategy.largest={self.largest} allows no more. Pin or tie layers "
                "(space.pins, space.ties), offer fewer formats (space.weight, space.input), lower the budget, raise "
                "strategy.largest and strategy.evaluations, or use strategy=auto"
            )
        asked = Asked(objective)
        asked.begin()
        costs = np.array([objective.pricing.costs(space.decode(p))[objective.primary_cost] for p in points.tolist()])
        order = np.argsort(costs if objective.quality_drop is not None else -costs, kind="stable")
        ordered = points[order].tolist()
        asked.measure_each(point for point in ordered if objective.is_feasible(space.decode(point)))


def points_within(pricing: Pricing, limits: Mapping[str, float], widest: int) -> np.ndarray | None:
    """Lists the points that may keep the limits, shape `(policies, decisions)`.

    Units are decided one after the other, and partial policies over a limit at the least that the others can cost are
    left out. The last digit is left to `Objective.is_feasible`.

    Args:
        pricing: The space and its prices.
        limits: Absolute limits on costs.
        widest: Most partial policies to look at side by side.

    Returns:
        None where there are more.
    """
    space = pricing.space
    limited = [name for name in limits if name in pricing.columns]
    columns = [[pricing.columns[name][number] for name in limited] for number in range(len(space.units))]
    least = np.array([[column.min() for column in unit] for unit in columns]).reshape(len(columns), len(limited))
    left = np.array([limits[name] * (1 + 1e-9) - pricing.fixed[name] for name in limited]) - least.sum(0)
    points = np.zeros((1, len(space.decisions)), dtype=np.int64)
    room = left[np.newaxis]
    decided: set[int] = set()
    for unit, unit_columns, unit_least in zip(space.units, columns, least, strict=True):
        weights, inputs = (len(space.decisions[index].formats) for index in (unit.weight, unit.input))
        for index, count in ((unit.weight, weights), (unit.input, inputs)):
            if index not in decided:
                levels = np.tile(np.arange(count), len(points))
                points, room = np.repeat(points, count, axis=0), np.repeat(room, count, axis=0)
                points[:, index] = levels
                decided.add(index)
        chosen = points[:, unit.weight] * inputs + points[:, unit.input]
        spent = np.array([column[chosen] for column in unit_columns]).reshape(len(limited), len(points)).T
        room = room - (spent - unit_least)
        kept = (room >= 0).all(1)
        points, room = points[kept], room[kept]
        if len(points) > widest:
            return None
    within: np.ndarray = points[Bounds(pricing, limits).keep(points)]
    return within


def readable(count: int) -> str:
    """A count in digits, or as a power of ten where it is long."""
    return f"{count:,}" if count < 10**9 else f"about 10^{len(str(count)) - 1}"
