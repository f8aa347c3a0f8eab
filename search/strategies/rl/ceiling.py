"""Which formats a budget leaves open while a policy is put together, decision by decision.

Costs that add up couple decisions in one way only: units that read the same tensor share its input format. The walk
therefore goes tensor by tensor, first its input format and then the weights of the units that read it, each of which
then is free of the others. What every decision may still cost above the cheapest completion follows from minima that
are computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from search.assignment import assignment_problem
from search.pricing import Pricing
from search.solve.problem import Column
from search.space import SearchSpace

ROUNDING = 1e-9
"""Share of a limit by which sums in another order may differ; who ends a walk looks at the true costs."""


@dataclass(frozen=True)
class Row:
    """One sum that must stay within a limit: a cost that adds up, or one of the cuts that a peak is the largest of.

    Attributes:
        name: The cost.
        column: For every unit, one number per choice.
        fixed: What no choice changes.
    """

    name: str
    column: Column
    fixed: float = 0.0


def rows_of(pricing: Pricing, names: Sequence[str]) -> tuple[Row, ...]:
    """The sums behind limits on some costs; what boundaries between units cost is left out."""
    problem = assignment_problem(pricing)
    rows: list[Row] = []
    for name in names:
        if name in problem.costs:
            rows.append(Row(name, problem.costs[name], pricing.fixed[name]))
        rows += [Row(name, cut) for cut in problem.peaks.get(name, ())]
    return tuple(rows)


class Ceiling:
    """The rise of every format above the cheapest completion, and which rises some slack allows.

    With a single row a format is called reachable exactly where the decisions after it can be completed within the
    limit. With several rows that is asked of each row alone, so that all of them together may yet be out of reach.

    Attributes:
        order: The open decisions in the order of the walk.
        rows: The sums that are watched.
        least: The least that each can be, with what is fixed, shape `(rows,)`.
        most: The most, likewise.
        ahead: By how much the decisions from each step on can rise at most, shape `(steps + 1, rows)`.
    """

    def __init__(self, space: SearchSpace, rows: Sequence[Row]) -> None:
        """Prepares the minima.

        Args:
            space: What may be decided.
            rows: The sums that are watched; may be none.
        """
        self.rows = tuple(rows)
        self._space = space
        units: dict[int, list[int]] = {}
        for number, unit in enumerate(space.units):
            units.setdefault(unit.input, []).append(number)
        order: list[int] = []
        self._rises: dict[int, np.ndarray] = {}  # input: (rows, inputs); weight: (rows, inputs, weights)
        fixed = np.array([row.fixed for row in rows])
        self.least, self.most = fixed.copy(), fixed.copy()
        for input_, members in units.items():
            priced = [self._priced(number) for number in members]
            lowest = np.sum([costs.min(2) for costs in priced], axis=0)
            self._rises[input_] = lowest - lowest.min(1, keepdims=True)
            self.least += lowest.min(1)
            self.most += np.sum([costs.max(2) for costs in priced], axis=0).max(1)
            for number, costs in zip(members, priced, strict=True):
                self._rises[space.units[number].weight] = costs - costs.min(2, keepdims=True)
            order += [input_, *(space.units[number].weight for number in members)]
        self.order = tuple(index for index in order if space.decisions[index].is_free)
        self._input_of = {unit.weight: unit.input for unit in space.units}
        tops = [self._rises[index].max(axis=tuple(range(1, self._rises[index].ndim))) for index in self.order]
        tops.append(np.zeros(len(rows)))
        self.ahead = np.cumsum(tops[::-1], axis=0)[::-1]

    def slack(self, limits: Mapping[str, float]) -> np.ndarray:
        """What limits leave above the cheapest policy, shape `(rows,)`; negative where it is too dear already."""
        allowed = np.array([limits[row.name] * (1 + ROUNDING) for row in self.rows])
        return np.asarray(allowed - self.least)

    def rises(self, decision: int, point: Sequence[int]) -> np.ndarray:
        """What each format of a decision costs above its cheapest, shape `(rows, formats)`.

        Args:
            decision: Index of the decision.
            point: The decisions so far; of a weight decision, its unit's input must be among them.
        """
        rises = self._rises[decision]
        return rises[:, point[self._input_of[decision]]] if rises.ndim == 3 else rises

    def _priced(self, number: int) -> np.ndarray:
        """What the choices of a unit cost, shape `(rows, inputs, weights)`."""
        unit = self._space.units[number]
        shape = len(self.rows), *(len(self._space.decisions[index].formats) for index in (unit.weight, unit.input))
        costs = np.array([row.column[number] for row in self.rows]).reshape(shape)
        return costs.transpose(0, 2, 1)


def reachable(rises: np.ndarray, slack: np.ndarray) -> np.ndarray:
    """Which formats keep every row within its slack; where none does, those that exceed it least.

    Args:
        rises: What the formats cost above the cheapest, shape `(rows, formats)`.
        slack: What is left above the cheapest completion, shape `(rows,)`.

    Returns:
        Booleans of shape `(formats,)`, at least one of them true.
    """
    kept = np.asarray((rises <= slack[:, None]).all(0))
    if kept.any():
        return kept
    scale = np.maximum(np.ptp(rises, axis=1), np.abs(slack))
    over = ((rises - slack[:, None]) / np.where(scale > 0, scale, 1.0)[:, None]).max(0)
    return np.asarray(over == over.min())
