"""An integer program over flat arrays: pick one choice of every unit, at the least total, within limits on totals.

Positions count the choices of all units, one unit after the other; every number of a choice stands at its position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from search.solve.problem import Boundary, Choices, Column, Link, Problem

NOISE = 1e-15  # relative rounding error of a difference of two sums


class NotFoundError(RuntimeError):
    """The solver stopped before it found a selection within the limits, or proved that there is none."""


@dataclass(frozen=True)
class Limit:
    """The most that the total of `numbers`, one per position, may be."""

    numbers: np.ndarray
    most: float


@dataclass(frozen=True)
class Ban:
    """Positions of several units of which a selection may take at most `most`."""

    at: np.ndarray
    most: int


@dataclass(frozen=True)
class Program:
    """Minimise the largest total of the `objective`, usually a single column, within `limits`.

    Attributes:
        sizes: Number of choices of every unit.
        objective: Columns of one number per position; several where a peak is minimised.
        limits: What totals may be.
        links: Units that must agree.
        bans: What may not be picked together.
        decided: Number of units, the first ones, whose choices fix those of the others through links.
    """

    sizes: tuple[int, ...]
    objective: tuple[np.ndarray, ...]
    limits: tuple[Limit, ...] = ()
    links: tuple[Link, ...] = ()
    bans: tuple[Ban, ...] = ()
    decided: int = 0

    @cached_property
    def starts(self) -> np.ndarray:
        """Position of every unit's first choice, shape `(units,)`."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]])

    @property
    def positions(self) -> int:
        """Number of choices of all units."""
        return sum(self.sizes)

    @cached_property
    def is_decided(self) -> np.ndarray:
        """Whether each position belongs to a unit that others follow, shape `(positions,)`."""
        return np.repeat(np.arange(len(self.sizes)) < (self.decided or len(self.sizes)), self.sizes)

    def agreeing(self, is_open: np.ndarray) -> np.ndarray:
        """Closes the positions whose label is closed in a linked unit."""
        still = is_open.copy()
        for link in self.links:
            parts = [still[self.starts[unit] :][: self.sizes[unit]] for unit in link.units]
            common = set.intersection(
                *(set(labels[part].tolist()) for labels, part in zip(link.labels, parts, strict=True))
            )
            for labels, part in zip(link.labels, parts, strict=True):
                part &= np.isin(labels, list(common))
        return still

    def at(self, choices: Choices) -> np.ndarray:
        """Positions of a selection, shape `(units,)`."""
        positions: np.ndarray = self.starts + np.asarray(choices)
        return positions

    def total(self, numbers: np.ndarray, choices: Choices) -> float:
        """The sum of a selection's numbers, correctly rounded."""
        return math.fsum(numbers[self.at(choices)].tolist())

    def value(self, choices: Choices) -> float:
        """What is minimised: the largest total of the objective."""
        return max(self.total(column, choices) for column in self.objective)

    def overshot(self, choices: Choices) -> list[Limit]:
        """The limits that a selection does not keep."""
        return [limit for limit in self.limits if self.total(limit.numbers, choices) > limit.most]

    def admits(self, choices: Choices) -> bool:
        """Whether a selection honours links and bans."""
        at = self.at(choices)
        linked = all(
            len({int(labels[choices[unit]]) for unit, labels in zip(link.units, link.labels, strict=True)}) == 1
            for link in self.links
        )
        return linked and all(np.isin(at, ban.at).sum() <= ban.most for ban in self.bans)

    def least(self, numbers: np.ndarray, is_open: np.ndarray) -> np.ndarray:
        """Smallest number among each unit's open choices, shape `(units,)`."""
        smallest: np.ndarray = np.minimum.reduceat(np.where(is_open, numbers, np.inf), self.starts)
        return smallest

    def above_least(self, numbers: np.ndarray, is_open: np.ndarray) -> np.ndarray:
        """By how much each number exceeds its unit's smallest, zero at closed positions, shape `(positions,)`."""
        above: np.ndarray = np.where(is_open, numbers - np.repeat(self.least(numbers, is_open), self.sizes), 0.0)
        return above

    def ranges(self, numbers: np.ndarray, is_open: np.ndarray) -> np.ndarray:
        """Difference of the largest and the smallest number among each unit's open choices, shape `(units,)`."""
        spread: np.ndarray = np.maximum.reduceat(self.above_least(numbers, is_open), self.starts)
        return spread

    def room(self, limit: Limit, is_open: np.ndarray) -> tuple[float, float]:
        """What a limit leaves above the cheapest open choices, and the rounding error of that."""
        largest = np.maximum.reduceat(np.abs(limit.numbers), self.starts)
        noise = NOISE * (abs(limit.most) + float(largest.sum()))
        return limit.most - math.fsum(self.least(limit.numbers, is_open).tolist()), noise

    def without(self, choices: Choices) -> Program:
        """The program without the selections that make these choices for its first units."""
        at = self.starts[: len(choices)] + np.asarray(choices)
        return replace(self, bans=(*self.bans, Ban(at, len(at) - 1)))


def additive(problem: Problem, names: frozenset[str]) -> Problem:
    """Writes a problem without boundaries: each becomes a unit whose choices are its pairs of labels.

    The unit is linked to either side by the label it has there, so that its choice is the pair that really meets. In
    the linear relaxation those links are the marginals of the pair: the tightest there is for one boundary.

    Args:
        problem: What may be selected; interactions are left out.
        names: The costs that matter; boundaries that cost nothing else are left out.

    Returns:
        A problem whose first units are those of `problem`, with equal totals of the costs that matter.
    """
    boundaries = [boundary for boundary in problem.boundaries if names & boundary.costs.keys()]
    links = list(problem.links)
    for unit, boundary in enumerate(boundaries, start=len(problem.sizes)):
        first, second = (labels.ravel() for labels in np.indices(_shape(boundary)))
        links.append(Link((boundary.units[0], unit), (boundary.labels[0], first)))
        links.append(Link((boundary.units[1], unit), (boundary.labels[1], second)))

    def column(numbers: Column, name: str = "") -> Column:
        free = (np.zeros(_shape(boundary)) for boundary in boundaries)
        return (*numbers, *(b.costs.get(name, zero).ravel() for b, zero in zip(boundaries, free, strict=True)))

    return Problem(
        column(problem.scores),
        {name: column(numbers, name) for name, numbers in problem.costs.items() if name in names},
        tuple(links),
        peaks={name: tuple(map(column, cuts)) for name, cuts in problem.peaks.items() if name in names},
    )


def limits_on(problem: Problem, most: Mapping[str, float]) -> tuple[Limit, ...]:
    """The limits on totals that limits on costs amount to: a peak's holds for each of its columns.

    Raises:
        ValueError: If a limit names no cost of the problem, or is NaN.
    """
    if any(math.isnan(value) for value in most.values()):
        raise ValueError(f"a limit is NaN: {dict(most)}")
    return tuple(
        Limit(column, value)
        for name, value in most.items()
        for column in columns_of(problem, name)
        if value != math.inf
    )


def columns_of(problem: Problem, name: str) -> tuple[np.ndarray, ...]:
    """The columns of a cost, each of shape `(positions,)`: one, or of a peak those whose largest total it is.

    Raises:
        ValueError: If there is no such cost.
    """
    return tuple(map(np.concatenate, problem.peaks.get(name) or (problem.column(name),)))


def reachable(program: Program, is_open: np.ndarray | None = None) -> np.ndarray | None:
    """Finds the choices that links and limits admit, each taken on its own.

    Args:
        program: What may be selected.
        is_open: The positions to look at, all by default.

    Returns:
        Whether each position is open, shape `(positions,)`; None where a unit has no choice left.
    """
    left = np.ones(program.positions, dtype=bool) if is_open is None else is_open
    before = -1
    while left.sum() != before:
        before = left.sum()
        left = program.agreeing(left)
        if not np.logical_or.reduceat(left, program.starts).all():
            return None
        for limit in program.limits:
            room, noise = program.room(limit, left)
            if room < -noise:
                return None
            left = left & (program.above_least(limit.numbers, left) <= max(room, 0.0) + noise)
    return left


def _shape(boundary: Boundary) -> tuple[int, ...]:
    """Number of labels on either side of a boundary."""
    return next(iter(boundary.costs.values())).shape
