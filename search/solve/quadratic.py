"""Selection with scores that interact: swap search from the optima of additive scores, and what is proved about it."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from search.solve.bound import ROUNDS, relax
from search.solve.exact import branch
from search.solve.forms import linearised, score_form
from search.solve.linear import solve
from search.solve.problem import Choices, Problem, Solution
from search.solve.swaps import Swaps

RESTARTS = 20
SEARCHING = 0.5  # share of the seconds for searching where a bound is wanted too
COARSE = 1e-3  # gap to which a second start is solved
BISECTIONS = 10  # budgets tried while a cost is minimised


def solve_quadratic(
    problem: Problem,
    limits: Mapping[str, float],
    minimise: str | None = None,
    max_score: float | None = None,
    *,
    starts: Sequence[Choices] = (),
    restarts: int = RESTARTS,
    seed: int = 0,
    seconds: float | None = None,
    gap: float = 0.0,
    rounds: int = ROUNDS,
) -> Solution | None:
    """Finds a selection of low score, or of low cost, within limits, and bounds how much better another can be.

    Swap search starts from the optimum of the scores that choices have with themselves, and from that of the scores at
    what it finds; restarts kick the best. A convex relaxation then bounds the score from below and drops the choices
    that no better selection contains; branch and bound searches the rest, to the end where it is small enough. Where a
    cost is minimised, the budget of that cost is bisected, and a swap search lowers the cost itself.

    Args:
        problem: What may be selected; without interactions the answer is that of `search.solve.linear.solve`.
        limits: Cost name to the most its total may be.
        minimise: Cost to minimise in place of the score; among equally cheap selections the score decides.
        max_score: The most the score may be.
        starts: Selections to start from besides, within the limits or not.
        restarts: Kicks.
        seed: Of the kicks.
        seconds: Time limit, checked between steps; what is found within one may differ from run to run.
        gap: Relative gap between score and bound at which to stop.
        rounds: Rounds of raising the bound, each as costly as inverting a matrix over all choices; 0 for no bound.

    Returns:
        The best selection found, `optimal` where that is proved to `gap`, with its bound on the score or, where a cost
        is minimised, on that; None where none was found, which proves that there is none unless `max_score` is given.

    Raises:
        ValueError: If a limit or `minimise` names no cost, or the interactions are not positive semidefinite.
    """
    if problem.interactions is None:
        return solve(problem, limits, minimise, max_score)
    if max(problem.sizes, default=1) == 1:  # nothing to choose
        only = problem.solution((0,) * len(problem.sizes), True)
        is_within = all(only.costs[name] <= limit for name, limit in limits.items())
        return only if is_within and (max_score is None or only.score <= max_score) else None
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    rng = np.random.default_rng(seed)
    pause = deadline if not rounds or seconds is None else deadline - (1 - SEARCHING) * seconds
    if minimise is None:
        best = search(Swaps(problem, limits, deadline=pause), starts, restarts, rng)
        if best is not None and rounds:
            best = prove(problem, limits, best, rounds, gap, deadline)
    else:
        best = _cheapest(problem, limits, minimise, max_score, (starts, restarts, rng), (rounds, pause, deadline))
    if best is None or (max_score is not None and best.score > max_score):
        return None
    return kept(best, limits)


def near_quadratic(problem: Problem, solution: Solution, limits: Mapping[str, float], count: int) -> list[Solution]:
    """Finds up to `count` of the best selections within limits besides one, best first.

    From the solution outwards, the neighbours of the best selection whose neighbours are not known yet are looked at,
    until that is none of the best `count`.
    """
    swaps = Swaps(problem, limits)
    known = {solution.choices: solution}
    frontier = [(solution.score, solution.choices)]
    for _ in range(count + 1):
        ranked = sorted(each.score for each in known.values())
        if not frontier or (len(ranked) > count and frontier[0][0] > ranked[count]):
            break
        swaps.start(heapq.heappop(frontier)[1])
        for choices in swaps.neighbours(count):
            found = problem.solution(choices, optimal=False)
            within = all(found.costs[name] <= most for name, most in limits.items())
            if within and choices not in known:
                known[choices] = found
                heapq.heappush(frontier, (found.score, choices))
    del known[solution.choices]
    return sorted(known.values(), key=lambda each: (each.score, each.choices))[:count]


def kept(solution: Solution, limits: Mapping[str, float]) -> Solution:
    """Makes sure that a solution keeps its limits.

    Raises:
        RuntimeError: If it does not, which is a defect of the solver.
    """
    for name, most in limits.items():
        if solution.costs[name] > most:
            raise RuntimeError(f"the solver overshoots {name}: {solution.costs[name]!r}, limited to {most!r}")
    return solution


def search(
    swaps: Swaps,
    starts: Sequence[Choices],
    restarts: int,
    rng: np.random.Generator,
    best: Solution | None = None,
    linear: bool = True,
) -> Solution | None:
    """Descends from every start, then again and again from the best selection, kicked.

    Args:
        swaps: The problem, with its limits.
        starts: Selections that honour the links.
        restarts: Kicks.
        rng: Source of the kicks.
        best: A selection within the limits to better; None where none is known.
        linear: Whether to start from optima of additive scores, too.

    Returns:
        The best selection; None where none was found, and no additive score has an optimum.
    """

    def better(choices: Choices, kicked: int = 0) -> None:
        nonlocal best
        swaps.start(choices)
        swaps.kick(rng, kicked)
        if swaps.repair():
            swaps.descend()
            found = swaps.solution()
            best = found if best is None or swaps.worth(found) < swaps.worth(best) else best

    if linear:
        first = solve(linearised(swaps.problem), swaps.limits, seconds=swaps.seconds_left())
        if first is None:
            return best
        starts = [first.choices, *starts]
    for choices in starts:
        better(choices)
    if linear and best is not None and not swaps.is_late:
        slopes = score_form(swaps.problem).slopes(swaps.problem.positions(best.choices))
        again = solve(linearised(swaps.problem, slopes), swaps.limits, gap=COARSE, seconds=swaps.seconds_left())
        if again is not None:
            better(again.choices)
    for _ in range(restarts):
        if best is None or swaps.is_late:
            break
        better(best.choices, int(rng.integers(2, 5)))
    return best


def prove(
    problem: Problem, limits: Mapping[str, float], best: Solution, rounds: int, gap: float, deadline: float
) -> Solution:
    """Bounds the score, and betters the selection where branch and bound finds a better one."""
    convex = relax(problem, limits, best, rounds, gap, deadline)
    found, bound = best, convex.bound
    if bound < best.score - gap * abs(best.score):
        found, bound = branch(convex, deadline=deadline)
    bound = min(bound, found.score)
    return replace(found, bound=bound, optimal=found.score - bound <= gap * abs(found.score))


def _cheapest(
    problem: Problem,
    limits: Mapping[str, float],
    cost: str,
    max_score: float | None,
    searching: tuple[Sequence[Choices], int, np.random.Generator],
    proving: tuple[int, float, float],
) -> Solution | None:
    """Minimises a cost while the score has a limit."""
    starts, restarts, rng = searching
    rounds, pause, deadline = proving
    lowest = solve(linearised(problem), limits, minimise=cost)
    if lowest is None:
        return None
    swaps = Swaps(problem, {**limits, cost: lowest.costs[cost]}, deadline=pause)
    low = lowest.bound
    known = problem.solution(lowest.choices, optimal=False)
    best = search(swaps, [*starts, known.choices], restarts, rng, known if swaps.meets(known) else None)
    if max_score is not None and (best is None or best.score > max_score):
        best = _bisected(swaps, cost, max_score, limits, (*starts, known.choices), restarts, rng)
    if best is None:
        return None
    if max_score is None or best.costs[cost] <= low or not rounds:
        return replace(best, bound=low, optimal=best.costs[cost] <= low)
    convex = relax(problem, {**limits, cost: best.costs[cost]}, best, rounds, 0.0, deadline, drop=False)
    constant, scores = convex.tangent()
    proved = solve(linearised(problem, scores), limits, minimise=cost, max_score=max_score - constant)
    if proved is not None:
        low = min(max(low, proved.bound), best.costs[cost])
    return replace(best, bound=low, optimal=best.costs[cost] <= low)


def _bisected(
    swaps: Swaps,
    cost: str,
    max_score: float,
    limits: Mapping[str, float],
    starts: Sequence[Choices],
    restarts: int,
    rng: np.random.Generator,
) -> Solution | None:
    """Lowers the budget of a cost as far as a score can still be kept, then the cost itself, by swaps."""
    problem, low = swaps.problem, swaps.limits[cost]
    swaps.limit({**limits, cost: limits.get(cost, math.inf)})
    best = search(swaps, starts, restarts, rng)
    if best is None or best.score > max_score:
        return None
    tried = best
    for _ in range(BISECTIONS):
        budget = (low + best.costs[cost]) / 2
        if swaps.is_late or not low < budget < best.costs[cost]:
            break
        swaps.limit({**limits, cost: budget})
        tried = search(swaps, [tried.choices, best.choices], restarts // 4, rng, linear=False) or tried
        if tried.score <= max_score and tried.costs[cost] <= budget:
            best = tried
        else:
            low = budget
    if cost in problem.costs:
        lowering = Swaps(problem, limits, cost, max_score, swaps.deadline)
        best = search(lowering, [best.choices], restarts, rng, best, linear=False) or best
    swaps.limit({**limits, cost: best.costs[cost]})
    return search(swaps, [best.choices], restarts // 4, rng, best, linear=False)
