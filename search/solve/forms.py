"""Scores and costs as quadratic forms over positions: every choice of every unit in one flat row.

A selection is a 0/1 vector x over positions with one 1 per unit, or in short the chosen positions `at`, of shape
`(units,)`. Since x_i^2 = x_i, and two choices of one unit never meet, everything that a unit has to itself is linear,
and a form's pairs are zero within units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from search.solve.problem import Boundary, Column, Problem


@dataclass(frozen=True)
class Form:
    """The function `linear @ x + x @ pairs @ x / 2`.

    Attributes:
        linear: Shape `(positions,)`.
        pairs: Symmetric, shape `(positions, positions)`, zero within units; None where nothing interacts.
    """

    linear: np.ndarray
    pairs: np.ndarray | None = None

    def slopes(self, at: np.ndarray) -> np.ndarray:
        """What each position adds to a selection at the positions `at` of all other units, shape `(positions,)`."""
        return self.linear.copy() if self.pairs is None else self.linear + self.pairs[at].sum(axis=0)

    def value(self, at: np.ndarray) -> float:
        """The form of a selection."""
        return float((self.linear[at] + self.slopes(at)[at]).sum()) / 2


@dataclass(frozen=True)
class Layout:
    """Where units and their choices are among the positions.

    Attributes:
        sizes: Choices per unit, shape `(units,)`.
    """

    sizes: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """First position of every unit, shape `(units,)`."""
        starts: np.ndarray = np.cumsum(self.sizes) - self.sizes
        return starts

    @cached_property
    def unit_of(self) -> np.ndarray:
        """The unit of every position, shape `(positions,)`."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def within_units(self) -> np.ndarray:
        """Which pairs of positions belong to one unit, a boolean matrix."""
        same: np.ndarray = np.equal.outer(self.unit_of, self.unit_of)
        return same


def layout_of(problem: Problem) -> Layout:
    """The layout of a problem's choices."""
    return Layout(np.array(problem.sizes))


def score_form(problem: Problem) -> Form:
    """The score of a problem."""
    linear = np.concatenate(problem.scores)
    if problem.interactions is None:
        return Form(linear)
    pairs = np.where(layout_of(problem).within_units(), 0.0, problem.interactions)
    return Form(linear + np.diagonal(problem.interactions) / 2, pairs)


def cost_forms(problem: Problem, name: str) -> tuple[Form, ...]:
    """The forms whose largest is a cost: one for costs that add up, one per cut for peaks.

    Raises:
        ValueError: If there is no such cost.
    """
    if name in problem.peaks:
        return tuple(Form(np.concatenate(cut)) for cut in problem.peaks[name])
    linear = np.concatenate(problem.column(name))
    met = [boundary for boundary in problem.boundaries if name in boundary.costs]
    return (Form(linear, _meeting(problem, met, name) if met else None),)


def least_meeting(problem: Problem, name: str) -> Column:
    """A cost column that adds up to no more than the cost: what a choice pays at boundaries whatever it meets there."""
    column = [numbers.copy() for numbers in problem.column(name)]
    for boundary in problem.boundaries:
        if name in boundary.costs:
            rows, columns_ = boundary.labels
            column[boundary.units[0]] += np.asarray(boundary.costs[name])[np.ix_(rows, columns_)].min(axis=1)
    return tuple(column)


def linearised(problem: Problem, scores: np.ndarray | None = None) -> Problem:
    """The same problem with scores that only add up.

    Args:
        problem: The problem.
        scores: What they are, shape `(positions,)`; by default what every choice scores with itself.
    """
    flat = score_form(problem).linear if scores is None else scores
    return replace(problem, scores=columns(flat, layout_of(problem)), interactions=None)


def columns(flat: np.ndarray, layout: Layout) -> Column:
    """Splits an array over positions by units."""
    return tuple(np.split(flat, layout.starts[1:]))


def _meeting(problem: Problem, boundaries: list[Boundary], name: str) -> np.ndarray:
    """What boundaries charge for every pair of positions, symmetric."""
    layout = layout_of(problem)
    charged = np.zeros((len(layout.unit_of), len(layout.unit_of)))
    for boundary in boundaries:
        (first, second), (rows, columns_) = boundary.units, boundary.labels
        at = [slice(layout.starts[unit], layout.starts[unit] + layout.sizes[unit]) for unit in (first, second)]
        block = np.asarray(boundary.costs[name])[np.ix_(rows, columns_)]
        charged[at[0], at[1]] += block
        charged[at[1], at[0]] += block.T
    return charged
