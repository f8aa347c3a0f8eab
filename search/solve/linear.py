"""Exact selection with additive scores: the best within limits, the next best, the cheapest, and a whole front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from search.solve.highs import Limit, Program, drop_worse, ranges, reachable, select
from search.solve.problem import Problem, Solution, total

RESOLUTION = 1e-9  # ratio of objective ranges that one program can weigh against each other


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
    floor = Limit(problem.column(minimise), cheapest.costs[minimise])
    best = _optimum(replace(program, limits=(*program.limits, floor)))
    return cheapest if best is None else replace(best, optimal=best.optimal and cheapest.optimal)


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
        raise ValueError("no selection honours all links: the labels that units have in common contradict each other")
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
    """Solves for `count` budgets of one cost, evenly spaced from the least, without repeating a solution.

    Args:
        problem: What may be selected.
        cost: The cost that is limited.
        count: Number of budgets, at least two.
        upper: The largest budget; by default the least that allows the best score, beyond which nothing changes.

    Returns:
        Distinct solutions, from the smallest budget upwards.

    Raises:
        ValueError: If there is no such cost, `count` is below two, or `upper` below the least cost.
    """
    if count < 2:
        raise ValueError(f"a sweep needs at least two budgets, got {count}")
    lowest = least(problem, cost)
    if upper is None:
        best = _optimum(_program(problem, {})) or lowest
        cheapest_best = solve(problem, {}, minimise=cost, max_score=best.score) or best
        upper = cheapest_best.costs[cost]
    if upper < lowest.costs[cost]:
        raise ValueError(f"the largest budget, {upper}, is below the least {cost}, {lowest.costs[cost]}")
    budgets = np.linspace(lowest.costs[cost], upper, count)[1:]
    found = [lowest, *(solve(problem, {cost: float(budget)}) for budget in budgets)]
    return list({solution.choices: solution for solution in found if solution is not None}.values())


def _program(problem: Problem, limits: Mapping[str, float], max_score: float | None = None) -> Program:
    bounds = [Limit(problem.column(name), most) for name, most in limits.items()]
    if max_score is not None:
        bounds.append(Limit(problem.scores, max_score))
    if any(np.isnan(bound.most) for bound in bounds):
        raise ValueError(f"a limit is NaN: {dict(limits)}, max_score={max_score}")
    return Program(problem, problem.scores, tuple(bound for bound in bounds if bound.most != np.inf))


def _optimum(program: Program) -> Solution | None:
    """Solves a program on ever finer scales, until nothing is left that a finer one could tell apart.

    After each solution the choices that a bound shows to be worse are dropped, so that the objective can be stretched
    further. Where ranges remain that are too small to be weighed against the largest, the units of the large ones keep
    their choices.
    """
    open_ = reachable(program)
    best, proved = None, True
    while open_ is not None:
        found, certain = select(program, open_)
        proved = proved and certain
        if found is not None and (best is None or total(program.objective, found) < total(program.objective, best)):
            best = found
        if best is None:
            return None
        before = ranges(program.objective, open_)
        open_ = drop_worse(program, open_, best)
        left = ranges(program.objective, open_)
        if left.max() > before.max() / 10:
            if not (left[left > 0] < RESOLUTION * left.max()).any():
                break
            large = left > 1e-4 * left.max()
            pairs = zip(large, best, open_, strict=True)
            open_ = tuple(np.array([choice]) if fixed else choices for fixed, choice, choices in pairs)
        if not left.any():
            break
    return None if best is None else program.problem.solution(best, proved)
