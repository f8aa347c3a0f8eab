"""Exact selection with additive scores: a multiple-choice integer program for HiGHS, guarded against its tolerances.

HiGHS works to absolute tolerances near 1e-6. Every limit is therefore turned into a share of the room it leaves above the
cheapest choices, the objective is stretched until its tolerance is negligible, choices that cannot be part of an optimum
are put aside so that it can be stretched further, and what comes back is added up again: a selection beyond a limit is
forbidden and the program solved again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from search.solve.problem import Column, Problem, Solution, total

STRETCH = 1e6  # largest objective coefficient; HiGHS stops at an absolute gap of 1e-6
ROW = 1e3
GRAIN = 1e-8  # shares of a limit are rounded down to multiples of it, as smaller ones mislead HiGHS
MARGIN = 1e-7  # share by which limits are widened, so that rounding keeps no selection out; overshoots are caught later
NOISE = 1e-15  # relative error of a difference of two sums
TIGHTEN = 2e-6  # twice the violation that HiGHS lets pass in a row of order one
MAX_BANS = 30  # selections forbidden one by one before the limit itself is tightened
MAX_NODES = 200_000  # branch-and-bound nodes, a limit that the same machine always meets alike
RESOLUTION = 1e-9  # ratio of objective ranges that HiGHS can weigh against each other
PROVED, STOPPED, INFEASIBLE = 0, 1, 2  # statuses of scipy's milp


def solve(
    problem: Problem, limits: Mapping[str, float], minimise: str | None = None, max_score: float | None = None
) -> Solution | None:
    """Finds the selection of least score, or of least cost, within limits.

    Args:
        problem: What may be selected.
        limits: Cost name to the most its total may be.
        minimise: Cost to minimise in place of the score; among the cheapest selections the score decides.
        max_score: The most the total score may be.

    Returns:
        The optimum, the same on every call; None where no selection meets the limits.

    Raises:
        ValueError: If a limit or `minimise` names no cost of the problem, or a limit is NaN.
    """
    program = _program(problem, limits, max_score)
    if minimise is None:
        return _optimum(program)
    cheapest = _optimum(replace(program, objective=problem.column(minimise)))
    if cheapest is None:
        return None
    floor = _Limit(problem.column(minimise), cheapest.costs[minimise])
    return _optimum(replace(program, limits=(*program.limits, floor))) or cheapest


def solve_all(problem: Problem, limits: Sequence[Mapping[str, float]]) -> list[Solution | None]:
    """Solves one problem under several sets of limits, each on its own."""
    return [solve(problem, each) for each in limits]


def least(problem: Problem, cost: str) -> Solution:
    """Finds the selection of least cost that honours the links; among several the one of least score.

    Raises:
        ValueError: If the problem has no such cost, or its links contradict each other.
    """
    solution = solve(problem, {}, minimise=cost)
    if solution is None:
        raise ValueError("no selection honours all links: the labels they have in common contradict each other")
    return solution


def near(problem: Problem, solution: Solution, limits: Mapping[str, float], count: int) -> list[Solution]:
    """Finds the `count` best selections within limits besides `solution`, best first; fewer where there are no more."""
    program = replace(_program(problem, limits), banned=(solution.choices,))
    found: list[Solution] = []
    while len(found) < count:
        following = _optimum(program)
        if following is None:
            break
        found.append(following)
        program = replace(program, banned=(*program.banned, following.choices))
    return found


def sweep(problem: Problem, cost: str, count: int, upper: float | None = None) -> list[Solution]:
    """Solves for `count` budgets of one cost, evenly spaced, without repeating a solution.

    Args:
        problem: What may be selected.
        cost: The cost that is limited.
        count: Number of budgets, at least two.
        upper: The largest budget; by default what the best score without any budget costs, beyond which nothing changes.

    Returns:
        Distinct solutions, from the least cost upwards.

    Raises:
        ValueError: If there is no such cost, or `count` is below two.
    """
    if count < 2:
        raise ValueError(f"a sweep needs at least two budgets, got {count}")
    lowest = least(problem, cost)
    best = solve(problem, {})
    top = best.costs[cost] if upper is None and best else upper
    budgets = np.linspace(lowest.costs[cost], top or 0.0, count)[1:]
    found = [lowest, *(solve(problem, {cost: float(budget)}) for budget in budgets)]
    return list({solution.choices: solution for solution in found if solution}.values())


@dataclass(frozen=True)
class _Limit:
    """The most that the total of a column may be."""

    column: Column
    most: float


@dataclass(frozen=True)
class _Program:
    """Minimise the total of `objective` within `limits`, leaving out the selections `banned`."""

    problem: Problem
    objective: Column
    limits: tuple[_Limit, ...] = ()
    banned: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class _Matrices:
    """A program over its open choices: minimise `cost @ x`, `upper @ x <= bound`, `equal @ x == target`, x binary."""

    cost: np.ndarray
    upper: sparse.csr_array
    bound: np.ndarray
    equal: sparse.csr_array
    target: np.ndarray


Open = tuple[np.ndarray, ...]
"""Per unit the indices of the choices that are not ruled out."""


def _program(problem: Problem, limits: Mapping[str, float], max_score: float | None = None) -> _Program:
    columns = [_Limit(problem.column(name), most) for name, most in limits.items()]
    if max_score is not None:
        columns.append(_Limit(problem.scores, max_score))
    if any(np.isnan(limit.most) for limit in columns):
        raise ValueError(f"a limit is NaN: {dict(limits)}, max_score={max_score}")
    return _Program(problem, problem.scores, tuple(limit for limit in columns if limit.most != np.inf))


def _optimum(program: _Program) -> Solution | None:
    """Solves a program on ever finer scales.

    After each solution, choices that the Lagrangian bound shows to be worse are put aside. Where objective ranges remain
    that are too small to be weighed against the largest, the units of the large ones keep their choices.
    """
    open_: Open | None = _reachable(program)
    best, proved = None, True
    while open_ is not None:
        found, matrices, certain = _within_limits(program, open_)
        proved &= certain
        if found is not None and (best is None or total(program.objective, found) < total(program.objective, best)):
            best = found
        if best is None:
            return None
        ranges = _ranges(program.objective, open_)
        if matrices is not None:
            open_ = _undominated(program, open_, best, matrices)
        left = _ranges(program.objective, open_)
        if left.max() > ranges.max() / 10:
            too_small = (left > 0) & (left < RESOLUTION * left.max())
            if not too_small.any():
                break
            large = left > 1e-4 * left.max()
            open_ = tuple(
                np.array([choice]) if is_large else choices
                for is_large, choice, choices in zip(large, best, open_, strict=True)
            )
        if not left.any():
            break
    return None if best is None else program.problem.solution(best, proved)


def _ranges(column: Column, open_: Open) -> np.ndarray:
    """Difference of the largest and the smallest number among each unit's open choices, shape `(units,)`."""
    return np.array([np.ptp(numbers[choices]) for numbers, choices in zip(column, open_, strict=True)])


def _room(limit: _Limit, open_: Open) -> tuple[float, float]:
    """What a limit leaves above the cheapest open choices, and the rounding error of that."""
    cheapest = [int(choices[numbers[choices].argmin()]) for numbers, choices in zip(limit.column, open_, strict=True)]
    noise = NOISE * (abs(limit.most) + sum(float(np.abs(numbers).max()) for numbers in limit.column))
    return limit.most - total(limit.column, cheapest), noise


def _reachable(program: _Program) -> Open | None:
    """Drops choices that no link or limit admits whatever the other units do; None where a unit has none left."""
    keep = [np.ones(size, dtype=bool) for size in program.problem.sizes]
    for link in program.problem.links:
        for unit, labels in zip(link.units, link.labels, strict=True):
            keep[unit] &= np.isin(labels, link.common)
    if not all(mask.any() for mask in keep):
        return None
    open_ = tuple(np.flatnonzero(mask) for mask in keep)
    for limit in program.limits:
        room, noise = _room(limit, open_)
        if room < -noise:
            return None
        open_ = tuple(
            choices[numbers[choices] - numbers[choices].min() <= max(room, 0.0) + noise]
            for numbers, choices in zip(limit.column, open_, strict=True)
        )
    return open_


def _within_limits(program: _Program, open_: Open) -> tuple[tuple[int, ...] | None, _Matrices | None, bool]:
    """Solves over the open choices, again and again until nothing overshoots a limit.

    Returns:
        The selection, None where there is none; the matrices of the last try; whether optimality is proved.
    """
    tighten, bans = 0.0, 0
    while True:
        matrices = _matrices(program, open_, tighten)
        constraints = [LinearConstraint(matrices.equal, matrices.target, matrices.target)]
        if len(matrices.bound):
            constraints.append(LinearConstraint(matrices.upper, ub=matrices.bound))
        answer = milp(
            matrices.cost,
            constraints=constraints,
            integrality=np.ones(len(matrices.cost)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "node_limit": MAX_NODES},
        )
        if answer.status == INFEASIBLE:
            return None, None, not tighten
        if answer.x is None or answer.status not in (PROVED, STOPPED):
            raise RuntimeError(f"the integer program was not solved: {answer.message}")
        parts = np.split(answer.x, np.cumsum([len(choices) for choices in open_])[:-1])
        found = tuple(int(choices[part.argmax()]) for choices, part in zip(open_, parts, strict=True))
        allowed = program.problem.agrees(found) and found not in program.banned
        if allowed and all(total(limit.column, found) <= limit.most for limit in program.limits):
            return found, matrices, answer.status == PROVED and not tighten
        if not allowed or tighten:
            raise RuntimeError(f"the integer program was solved beyond its tolerances: {answer.message}")
        bans += 1
        program = replace(program, banned=(*program.banned, found))
        tighten = TIGHTEN if bans > MAX_BANS else 0.0


def _matrices(program: _Program, open_: Open, tighten: float) -> _Matrices:
    """Writes the program down, every number of order one but the objective, which is stretched to `STRETCH`."""
    widths = [len(choices) for choices in open_]
    starts = np.concatenate([[0], np.cumsum(widths)])
    ranges = _ranges(program.objective, open_)
    stretch = STRETCH / ranges.max() if ranges.max() else 0.0

    upper, bound = [], []
    for limit in program.limits:
        room, noise = _room(limit, open_)
        row = _above_least(limit.column, open_)
        unit = max(room, noise) or 1.0
        upper.append(ROW * np.floor(row / unit / GRAIN) * GRAIN)
        bound.append(ROW * ((max(room, 0.0) + noise) / unit + (MARGIN if not tighten else -tighten)))
    for selection in program.banned:
        at = [np.flatnonzero(choices == choice) for choice, choices in zip(selection, open_, strict=True)]
        if all(len(found) for found in at):
            row = np.zeros(starts[-1])
            row[starts[:-1] + np.concatenate(at)] = 1.0
            upper.append(row)
            bound.append(len(open_) - 1.0)

    equal = [np.repeat(np.eye(len(open_)), widths, axis=1)]
    for link in program.problem.links:
        first, *others = (
            (unit, labels[open_[unit]]) for unit, labels in zip(link.units, link.labels, strict=True)
        )
        for unit, labels in others:
            rows = np.zeros((len(link.common), starts[-1]))
            rows[:, starts[first[0]] : starts[first[0] + 1]] = np.equal.outer(link.common, first[1])
            rows[:, starts[unit] : starts[unit + 1]] = -np.equal.outer(link.common, labels).astype(float)
            equal.append(rows)
    stacked = np.concatenate(equal)
    return _Matrices(
        stretch * _above_least(program.objective, open_),
        sparse.csr_array(np.array(upper).reshape(len(upper), starts[-1])),
        np.array(bound),
        sparse.csr_array(stacked),
        (np.arange(len(stacked)) < len(open_)).astype(float),
    )


def _above_least(column: Column, open_: Open) -> np.ndarray:
    """By how much each open choice exceeds its unit's smallest number, concatenated."""
    return np.concatenate(
        [numbers[choices] - numbers[choices].min() for numbers, choices in zip(column, open_, strict=True)]
    )


def _undominated(program: _Program, open_: Open, best: Sequence[int], matrices: _Matrices) -> Open:
    """Drops the choices that no selection as good as `best` can contain.

    With multipliers y of the limits and links, `sum of each unit's least reduced cost + y @ bound` is a lower bound on
    every selection (Lagrangian relaxation), and a choice raises it by the excess of its reduced cost over its unit's
    least. The multipliers come from the linear relaxation, but the bound holds for any.
    """
    relaxed = linprog(
        matrices.cost,
        A_ub=matrices.upper if len(matrices.bound) else None,
        b_ub=matrices.bound if len(matrices.bound) else None,
        A_eq=matrices.equal,
        b_eq=matrices.target,
        bounds=(0, 1),
    )
    if relaxed.status != 0:
        return open_
    reduced = matrices.cost - matrices.equal[len(open_) :].T @ relaxed.eqlin.marginals[len(open_) :]
    bound = 0.0
    if len(matrices.bound):
        multipliers = np.minimum(relaxed.ineqlin.marginals, 0.0)
        reduced = reduced - matrices.upper.T @ multipliers
        bound = float(multipliers @ matrices.bound)
    edges = np.cumsum([len(choices) for choices in open_])[:-1]
    per_unit = np.split(reduced, edges)
    costs = np.split(matrices.cost, edges)
    value = sum(
        float(cost[choices == choice].sum()) for cost, choices, choice in zip(costs, open_, best, strict=True)
    )
    bound += sum(float(part.min()) for part in per_unit)
    slack = value - bound + 10 * NOISE * (abs(bound) + sum(float(np.abs(part).max()) for part in per_unit))
    return tuple(
        choices[(part - part.min() <= slack) | (choices == choice)]
        for choices, part, choice in zip(open_, per_unit, best, strict=True)
    )
