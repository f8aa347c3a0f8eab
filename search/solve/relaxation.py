"""What the linear relaxation of a program says about its choices, one by one."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from search.solve.highs import PROVED, relax, write
from search.solve.problem import Choices
from search.solve.program import NOISE, Program


@dataclass(frozen=True)
class Relaxation:
    """A lower bound on a program, and how far each choice raises it.

    With multipliers y of limits and links, the sum of each unit's least reduced cost plus `y @ most` is a lower bound
    on every selection (Lagrangian relaxation), and a choice raises it by the excess of its reduced cost over its unit's
    least. The multipliers come from the linear relaxation, but the bound holds for any. All numbers are on the scale of
    the program's matrices, above the least of every unit.

    Attributes:
        program: The program.
        cost: What each position costs, zero at closed ones, shape `(positions,)`.
        excess: By how much each position raises the bound, infinite at closed ones, shape `(positions,)`.
        bound: The lower bound, less its rounding error.
        offset: Least total of the objective.
        scale: What one is worth in the objective.
    """

    program: Program
    cost: np.ndarray
    excess: np.ndarray
    bound: float
    offset: float
    scale: float

    def total(self, excess: float) -> float:
        """No selection that takes a position of that excess has a smaller total."""
        return self.offset + self.scale * (self.bound + excess)

    def above_bound(self, choices: Choices) -> float:
        """How far a selection is above the bound: nothing as good takes a position of more excess."""
        return float(self.cost[self.program.at(choices)].sum()) - self.bound


def relaxation(program: Program, is_open: np.ndarray, until: float = math.inf) -> Relaxation | None:
    """Relaxes a program with a single objective; None where there is no solution, or not before `until`."""
    matrices = write(program, is_open)
    relaxed = relax(matrices, until - time.monotonic())
    if relaxed.status != PROVED:
        return None
    units = len(program.sizes)
    reduced = matrices.cost - matrices.equal[units:].T @ relaxed.eqlin.marginals[units:]
    bound = 0.0
    if len(matrices.most):
        multipliers = np.minimum(relaxed.ineqlin.marginals, 0.0)
        reduced = reduced - matrices.upper.T @ multipliers
        bound = float(multipliers @ matrices.most)

    spread, cost = np.zeros(len(is_open)), np.zeros(len(is_open))
    spread[is_open], cost[is_open] = reduced, matrices.cost
    bound += float(program.least(spread, is_open).sum())
    error = 10 * NOISE * (abs(bound) + float(np.maximum.reduceat(np.abs(spread), program.starts).sum()))
    excess = np.where(is_open, program.above_least(spread, is_open), np.inf)
    return Relaxation(program, cost, excess, bound - error, matrices.offset, matrices.scale)
