"""Whole fronts: the best selections over a grid of budgets of one cost, each solved with its neighbours' help."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from search.solve.linear import solve
from search.solve.problem import Problem, Solution
from search.solve.quadratic import kept, search, solve_quadratic
from search.solve.swaps import Swaps

RESTARTS = 2
ADDITIVE_EVERY = 8  # of so many budgets one is searched from optima of additive scores too


def solve_front(
    problem: Problem,
    cost: str,
    budgets: int | Sequence[float],
    limits: Mapping[str, float] | None = None,
    *,
    restarts: int = RESTARTS,
    seed: int = 0,
    seconds: float | None = None,
) -> list[Solution]:
    """Solves one problem for many budgets of a cost and keeps what no other solution beats.

    Additive scores are solved exactly at every budget, from the largest down: a solution that already costs no more
    than the next budget is the optimum there, too. Interacting scores are searched by swaps, at each budget from the
    solutions of both neighbours.

    Args:
        problem: What may be selected.
        cost: The cost that is limited.
        budgets: The budgets; or how many, at least two, evenly spaced from the least cost to that of the best score,
            beyond which nothing changes, or to the cost's own limit if that is less.
        limits: Further limits, cost name to the most its total may be.
        restarts: Kicks per budget where scores interact.
        seed: Of the kicks.
        seconds: Time limit of the swap searches.

    Returns:
        From the least cost upwards, every score below the one before; empty where no selection meets the limits.

    Raises:
        ValueError: If there is no such cost, or fewer than two budgets are asked for.
    """
    limits = dict(limits or {})
    lowest = solve_quadratic(problem, limits, minimise=cost, rounds=0, restarts=restarts, seed=seed)
    if lowest is None:
        return []
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    least = lowest.costs[cost]
    known: dict[float, Solution] = {}
    if isinstance(budgets, int):
        if budgets < 2:
            raise ValueError(f"a front needs at least two budgets, got {budgets}")
        best = _best(problem, cost, limits, restarts, seed) or lowest
        known = {least: lowest, best.costs[cost]: best}
        wanted = np.linspace(least, max(best.costs[cost], least), budgets).tolist()
    else:
        wanted = [float(budget) for budget in budgets]
    most = limits.get(cost, math.inf)
    grid = sorted({min(budget, most) for budget in wanted if budget >= least})
    if not grid:
        return []
    if problem.interactions is None:
        found = _additive(problem, cost, grid, limits, known)
    else:
        found = _interacting(
            problem, cost, grid, limits, known, lowest, restarts, np.random.default_rng(seed), deadline
        )
    return [kept(solution, limits) for solution in non_dominated(found, cost)]


def non_dominated(solutions: Iterable[Solution], cost: str) -> list[Solution]:
    """Keeps the solutions that no other beats in both cost and score, each once, from the least cost upwards."""
    front: list[Solution] = []
    for solution in sorted(solutions, key=lambda each: (each.costs[cost], each.score, each.choices)):
        if not front or solution.score < front[-1].score:
            front.append(solution)
    return front


def _best(problem: Problem, cost: str, limits: dict[str, float], restarts: int, seed: int) -> Solution | None:
    """The best score that no budget of the cost limits further; of additive scores, at the least cost."""
    best = solve_quadratic(problem, limits, rounds=0, restarts=restarts, seed=seed)
    if best is None or problem.interactions is not None:
        return best
    return solve(problem, limits, minimise=cost, max_score=best.score) or best


def _additive(
    problem: Problem, cost: str, grid: Sequence[float], limits: dict[str, float], known: Mapping[float, Solution]
) -> list[Solution]:
    """Optima from the largest budget down, none solved twice."""
    found: list[Solution] = []
    for budget in reversed(grid):
        if budget in known:
            found.append(known[budget])
        elif not found or found[-1].costs[cost] > budget:
            solution = solve(problem, {**limits, cost: budget})
            if solution is not None:
                found.append(solution)
    return found


def _interacting(
    problem: Problem,
    cost: str,
    grid: Sequence[float],
    limits: dict[str, float],
    known: Mapping[float, Solution],
    lowest: Solution,
    restarts: int,
    rng: np.random.Generator,
    deadline: float,
) -> list[Solution]:
    """Swap search at every budget: from the largest down, each from its neighbour's solution, then back up."""
    swaps = Swaps(problem, {**limits, cost: math.inf}, deadline=deadline)
    found: dict[float, Solution] = {}
    last = known[max(known)] if known else lowest
    for number, budget in enumerate(reversed(grid)):
        swaps.limit({**limits, cost: budget})
        first = known.get(budget)
        solution = search(swaps, [last.choices], 0, rng, first, linear=number % ADDITIVE_EVERY == 0)
        if solution is not None:
            found[budget] = last = solution
    last = lowest
    for budget in grid:
        swaps.limit({**limits, cost: budget})
        solution = search(swaps, [last.choices], restarts, rng, found.get(budget), linear=False)
        if solution is not None:
            found[budget] = last = solution
    return [*known.values(), *found.values()]
