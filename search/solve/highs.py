"""One integer program given to HiGHS, guarded against its absolute tolerances of about 1e-6.

Every limit becomes a share of the room that it leaves above the cheapest choices, and the objective is stretched until
the tolerance is negligible. What comes back is added up again: a selection that overshoots a limit is forbidden and
the program solved again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from search.solve.problem import Choices, Column, Problem, total

STRETCH = 1e6  # largest objective coefficient; HiGHS stops at an absolute gap of 1e-6
NEGLIGIBLE = 1e-6  # shares of a limit below this count as nothing, since such small coefficients mislead HiGHS
MARGIN = 1e-6  # share by which limits are widened, so that rounding keeps no selection out; overshoots are caught
TOLERANCE = 2e-6  # twice the violation that HiGHS lets pass in a row of order one
NOISE = 1e-15  # relative rounding error of a difference of two sums
MAX_OVERSHOOTS = 30  # selections forbidden one by one before the limits themselves are tightened
MAX_NODES = 200_000  # branch-and-bound nodes: unlike a limit in seconds, met alike by every run
PROVED, STOPPED, INFEASIBLE = 0, 1, 2  # statuses of scipy's milp

Open = tuple[np.ndarray, ...]
"""Per unit the indices of the choices that are not ruled out, ascending."""


@dataclass(frozen=True)
class Limit:
    """The most that the total of a column may be."""

    column: Column
    most: float

    def room(self, open_: Open) -> tuple[float, float]:
        """What is left above the cheapest open choices, and the rounding error of that."""
        cheapest = [int(open_[unit][numbers[open_[unit]].argmin()]) for unit, numbers in enumerate(self.column)]
        noise = NOISE * (abs(self.most) + sum(float(np.abs(numbers).max()) for numbers in self.column))
        return self.most - total(self.column, cheapest), noise


@dataclass(frozen=True)
class Program:
    """Minimise the total of `objective` within `limits`, leaving out the selections in `banned`."""

    problem: Problem
    objective: Column
    limits: tuple[Limit, ...] = ()
    banned: tuple[Choices, ...] = ()

    def meets_limits(self, choices: Choices) -> bool:
        """Whether the totals of a selection, added up without error, are within every limit."""
        return all(total(limit.column, choices) <= limit.most for limit in self.limits)


@dataclass(frozen=True)
class Matrices:
    """A program over its open choices: minimise `cost @ x`, `upper @ x <= bound`, `equal @ x == target`, x binary."""

    cost: np.ndarray
    upper: sparse.csr_array
    bound: np.ndarray
    equal: sparse.csr_array
    target: np.ndarray


def reachable(program: Program) -> Open | None:
    """Finds the choices that links and limits admit, each taken on its own; None where a unit has none."""
    keep = [np.ones(size, dtype=bool) for size in program.problem.sizes]
    for link in program.problem.links:
        for unit, labels in zip(link.units, link.labels, strict=True):
            keep[unit] &= np.isin(labels, link.common)
    if not all(mask.any() for mask in keep):
        return None
    open_: Open = tuple(np.flatnonzero(mask) for mask in keep)
    for limit in program.limits:
        room, noise = limit.room(open_)
        if room < -noise:
            return None
        open_ = tuple(
            choices[numbers[choices] - numbers[choices].min() <= max(room, 0.0) + noise]
            for numbers, choices in zip(limit.column, open_, strict=True)
        )
    return open_


def select(program: Program, open_: Open) -> tuple[Choices | None, bool]:
    """Solves a program over its open choices, again and again until nothing overshoots a limit.

    Returns:
        The selection, None where there is none, and whether that is proved.

    Raises:
        RuntimeError: If HiGHS fails.
    """
    overshoots = 0
    while True:
        tighten = overshoots > MAX_OVERSHOOTS
        matrices = write(program, open_, tighten)
        constraints = [LinearConstraint(matrices.equal, matrices.target, matrices.target)]
        if len(matrices.bound):
            constraints.append(LinearConstraint(matrices.upper, ub=matrices.bound))
        with _quiet():
            answer = milp(
                matrices.cost,
                constraints=constraints,
                integrality=np.ones(len(matrices.cost)),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": 0.0, "node_limit": MAX_NODES},
            )
        if answer.status == INFEASIBLE:
            return None, not tighten
        if answer.x is None or answer.status not in (PROVED, STOPPED):
            raise RuntimeError(f"HiGHS did not solve the integer program: {answer.message}")
        parts = np.split(answer.x, np.cumsum([len(choices) for choices in open_])[:-1])
        found = tuple(int(choices[part.argmax()]) for choices, part in zip(open_, parts, strict=True))
        if found in program.banned or not program.problem.agrees(found):
            raise RuntimeError(f"HiGHS returned a selection that is ruled out: {found}; {answer.message}")
        if program.meets_limits(found):
            return found, answer.status == PROVED and not tighten
        if tighten:
            raise RuntimeError(f"HiGHS overshoots a limit beyond its tolerance: {found}; {answer.message}")
        overshoots += 1
        program = replace(program, banned=(*program.banned, found))


def write(program: Program, open_: Open, tighten: bool = False) -> Matrices:
    """Writes a program down, every number of order one but the objective, whose largest is `STRETCH`.

    Args:
        program: What to write down.
        open_: The choices that get a variable, unit by unit.
        tighten: Narrows the limits by more than HiGHS may overshoot them, at the price of losing selections near them.
    """
    widths = [len(choices) for choices in open_]
    starts = np.concatenate([[0], np.cumsum(widths)])
    upper, bound = [], []
    for limit in program.limits:
        room, noise = limit.room(open_)
        share = _above_least(limit.column, open_) / (max(room, noise) or 1.0)
        upper.append(np.where(share < NEGLIGIBLE, 0.0, share))
        whole = (max(room, 0.0) + noise) / (max(room, noise) or 1.0)
        bound.append(whole - TOLERANCE - len(open_) * NEGLIGIBLE if tighten else whole + MARGIN)
    for selection in program.banned:
        at = [np.flatnonzero(choices == choice) for choice, choices in zip(selection, open_, strict=True)]
        if all(len(found) for found in at):  # otherwise it is out already
            row = np.zeros(starts[-1])
            row[starts[:-1] + np.concatenate(at)] = 1.0
            upper.append(row)
            bound.append(len(open_) - 1.0)

    equal = [np.repeat(np.eye(len(open_)), widths, axis=1)]  # one choice per unit
    for link in program.problem.links:
        has_label = []
        for unit, labels in zip(link.units, link.labels, strict=True):
            rows = np.zeros((len(link.common), starts[-1]))
            rows[:, starts[unit] : starts[unit + 1]] = np.equal.outer(link.common, labels[open_[unit]])
            has_label.append(rows)
        equal.extend(has_label[0] - rows for rows in has_label[1:])
    stacked = np.concatenate(equal)

    cost = _above_least(program.objective, open_)
    return Matrices(
        cost * (STRETCH / cost.max()) if cost.max() else cost,
        sparse.csr_array(np.array(upper).reshape(len(upper), starts[-1])),
        np.array(bound),
        sparse.csr_array(stacked),
        (np.arange(len(stacked)) < len(open_)).astype(np.float64),
    )


def drop_worse(program: Program, open_: Open, best: Sequence[int]) -> Open:
    """Drops the choices that no selection as good as `best` can contain.

    With multipliers y of limits and links, the sum of each unit's least reduced cost plus `y @ bound` is a lower bound
    on every selection (Lagrangian relaxation), and a choice raises it by the excess of its reduced cost over its unit's
    least. The multipliers come from the linear relaxation, but the bound holds for any.
    """
    matrices = write(program, open_)
    limited = {"A_ub": matrices.upper, "b_ub": matrices.bound} if len(matrices.bound) else {}
    with _quiet():
        relaxed = linprog(matrices.cost, A_eq=matrices.equal, b_eq=matrices.target, bounds=(0, 1), **limited)
    if relaxed.status != PROVED:
        return open_
    units = len(open_)
    reduced = matrices.cost - matrices.equal[units:].T @ relaxed.eqlin.marginals[units:]
    bound = 0.0
    if limited:
        multipliers = np.minimum(relaxed.ineqlin.marginals, 0.0)
        reduced = reduced - matrices.upper.T @ multipliers
        bound = float(multipliers @ matrices.bound)

    edges = np.cumsum([len(choices) for choices in open_])[:-1]
    parts = np.split(reduced, edges)
    bound += sum(float(part.min()) for part in parts)
    is_best = np.concatenate([choices == choice for choices, choice in zip(open_, best, strict=True)])
    error = 10 * NOISE * (abs(bound) + sum(float(np.abs(part).max()) for part in parts))
    gap = float(matrices.cost[is_best].sum()) - bound + error
    keep = np.concatenate([part - part.min() <= gap for part in parts]) | is_best
    return tuple(choices[kept] for choices, kept in zip(open_, np.split(keep, edges), strict=True))


def ranges(column: Column, open_: Open) -> np.ndarray:
    """Difference of the largest and the smallest number among each unit's open choices, shape `(units,)`."""
    return np.array([np.ptp(numbers[choices]) for numbers, choices in zip(column, open_, strict=True)])


def _above_least(column: Column, open_: Open) -> np.ndarray:
    """By how much each open choice exceeds its unit's smallest number, concatenated."""
    return np.concatenate(
        [numbers[choices] - numbers[choices].min() for numbers, choices in zip(column, open_, strict=True)]
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discards what HiGHS 1.12 prints to the C standard output, past its log settings, when it repairs a solution."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
