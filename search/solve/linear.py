"""Exact selection with additive scores: the best within limits, the next best, the cheapest, and a whole front."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from search.solve.highs import Found
from search.solve.optimum import optimum
from search.solve.problem import Problem, Solution
from search.solve.program import Limit, NotFoundError, Program, additive, columns_of, limits_on


def solve(
    problem: Problem,
    limits: Mapping[str, float],
    minimise: str | None = None,
    max_score: float | None = None,
    gap: float = 0.0,
    seconds: float | None = None,
) -> Solution | None:
    """Finds the selection of least score, or of least cost, within limits.

    Interactions are left out: where there are any, what adds up is minimised, and nothing is proved about the score.

    Args:
        problem: What may be selected.
        limits: Cost name to the most it may be.
        minimise: Cost to minimise in place of the score; among the cheapest selections the score decides.
        max_score: The most the total score may be.
        gap: Relative distance between what is minimised and its bound at which to stop; 0 asks for the optimum.
        seconds: When to stop with the best selection found; None is no limit.

    Returns:
        The optimum, the same on every call without a limit in seconds. Where gap, seconds or HiGHS's nodes ended the
        search, the best selection found, with what is proved about all others in `bound`. None where no selection
        meets the limits.

    Raises:
        ValueError: If a limit or `minimise` names no cost of the problem, a limit is NaN, `gap` or `seconds` is
            negative, or `max_score` is given where scores interact.
        NotFoundError: If the search ended before any selection was found, or it was proved that there is none.
    """
    if problem.interactions is not None and max_score is not None:
        raise ValueError("max_score limits scores that add up; these interact, so solve one without its interactions")
    if not gap >= 0 or (seconds is not None and not seconds >= 0):
        raise ValueError(f"gap={gap} and seconds={seconds} must be at least 0")
    until = math.inf if seconds is None else time.monotonic() + seconds
    plain = additive(problem, frozenset(limits) if minimise is None else frozenset((*limits, minimise)))
    program = _program(plain, len(problem.sizes), limits, max_score)
    if minimise is None:
        return _solution(problem, limits, optimum(program, gap, until))

    columns = columns_of(plain, minimise)
    found = optimum(replace(program, objective=columns), gap, until)
    cheapest = _solution(problem, limits, found, minimise)
    if cheapest is None or time.monotonic() > until:
        return cheapest
    floor = tuple(Limit(column, cheapest.costs[minimise]) for column in columns)
    best = optimum(replace(program, limits=(*program.limits, *floor)), gap, until)
    cheapest_best = Found(best.choices or found.choices, found.bound, found.proved and best.proved)
    return _solution(problem, limits, cheapest_best, minimise)


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
    plain = additive(problem, frozenset(limits))
    program = _program(plain, len(problem.sizes), limits).without(solution.choices)
    found: list[Solution] = []
    while len(found) < count:
        following = _solution(problem, limits, optimum(program))
        if following is None:
            break
        found.append(following)
        program = program.without(following.choices)
    return found


def _program(plain: Problem, decided: int, limits: Mapping[str, float], max_score: float | None = None) -> Program:
    """The program that finds the least score of a problem without boundaries, whose first units were there before."""
    scores = np.concatenate(plain.scores)
    within = limits_on(plain, limits)
    if max_score is not None:
        if math.isnan(max_score):
            raise ValueError("max_score is NaN")
        within = (*within, Limit(scores, max_score))
    return Program(plain.sizes, (scores,), within, plain.links, decided=decided)


def _solution(
    problem: Problem, limits: Mapping[str, float], found: Found, minimised: str | None = None
) -> Solution | None:
    """Adds up what was found, and makes sure of the limits."""
    if found.choices is None:
        if found.bound < math.inf:
            raise NotFoundError(
                "the solver stopped before it found a selection within the limits, and before it proved that there is "
                "none; give it more seconds or a larger gap, or relax a limit a little"
            )
        return None
    says_nothing = minimised is None and problem.interactions is not None
    proved, bound = (False, -math.inf) if says_nothing else (found.proved, found.bound)
    solution = problem.solution(found.choices[: len(problem.sizes)], proved, bound)
    if any(solution.costs[name] > most for name, most in limits.items()):
        raise RuntimeError(f"the solver overshot a limit: {solution.costs}, limits {dict(limits)}")
    if minimised is None and bound >= solution.score:
        return replace(solution, optimal=True)  # proved at the very moment at which it was stopped
    return solution
