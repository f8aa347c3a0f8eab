"""Totals of limited costs for many selections at once, boundaries and peaks included."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from search.solve.problem import Boundary, Problem

ROUNDING = 1e-12  # share of a limit that sums in another order may differ by; `Totals.meets` decides exactly


class Totals:
    """What selections cost where a problem's limits look: one column per limited sum.

    A limit on a peak is one sum per cut; limits of infinity are left out.

    Attributes:
        most: The most that each sum may be, shape `(sums,)`.
        additive: Whether every sum adds up over units, so that changes of different units add up too.
    """

    def __init__(self, problem: Problem, limits: Mapping[str, float]) -> None:
        """Lays out the sums that the limits look at.

        Raises:
            ValueError: If a limit names no cost of the problem, or is NaN.
        """
        self._problem = problem
        self._limits = {name: float(most) for name, most in limits.items() if most != np.inf}
        columns: list[np.ndarray] = []
        most: list[float] = []
        self._boundaries: list[tuple[int, Boundary, np.ndarray]] = []  # sum, where, costs
        for name, limit in self._limits.items():
            if np.isnan(limit):
                raise ValueError(f"the limit on {name} is NaN")
            met = [] if name in problem.peaks else [b for b in problem.boundaries if name in b.costs]
            self._boundaries += [(len(columns), boundary, np.asarray(boundary.costs[name])) for boundary in met]
            for column in problem.peaks[name] if name in problem.peaks else (problem.column(name),):
                columns.append(np.concatenate(column))
                most.append(limit)
        self._numbers = np.array(columns).reshape(len(columns), sum(problem.sizes))
        self._starts = np.concatenate([[0], np.cumsum(problem.sizes)[:-1]])
        self.most = np.array(most)
        self.additive = not self._boundaries
        spread = np.zeros(len(columns))
        for start, size in zip(self._starts, problem.sizes, strict=True):
            spread += np.ptp(self._numbers[:, start : start + size], axis=1)
        self._scale = np.where(spread > 0, spread, 1.0)
        self._slack = ROUNDING * np.abs(self._numbers).max(axis=1, initial=0.0) * len(problem.sizes)

    def of(self, selections: np.ndarray) -> np.ndarray:
        """Adds up selections, shape `(selections, units)`; the sums have shape `(selections, sums)`."""
        sums: np.ndarray = self._numbers[:, selections + self._starts].sum(-1).T
        for row, boundary, costs in self._boundaries:
            first, second = (
                labels[selections[:, unit]] for unit, labels in zip(boundary.units, boundary.labels, strict=True)
            )
            sums[:, row] += costs[first, second]
        return sums

    def excess(self, sums: np.ndarray) -> np.ndarray:
        """By how much sums exceed their limits, in shares of what choices can change, added up; 0 where none does."""
        over = sums - self.most
        excess: np.ndarray = np.where(over > self._slack, over / self._scale, 0.0).sum(-1)
        return excess

    def fit(self, sums: np.ndarray) -> np.ndarray:
        """Whether sums, shape `(..., sums)`, are within every limit, but for rounding."""
        fits: np.ndarray = (sums <= self.most + self._slack).all(-1)
        return fits

    def meets(self, choices: tuple[int, ...]) -> bool:
        """Whether one selection is within every limit, its costs added up without rounding."""
        return all(self._problem.cost(name, choices) <= most for name, most in self._limits.items())
