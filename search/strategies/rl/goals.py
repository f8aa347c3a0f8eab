"""The budgets that an agent is trained for: a grid around the one that is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from search.assignment import assignment_problem, variable_limits
from search.pricing import Pricing
from search.solve.linear import solve
from search.strategies.rl.ceiling import ROUNDING
from search.strategies.rl.course import Course

STEPS = 4  # goals to either side of the wanted budget
CAPS = 16  # goals along the primary cost where the drop of quality is limited
WANTED = 0.5  # share of the episodes at the goal that is wanted


@dataclass
class Goals:
    """Limits to train for, from tight to wide.

    Attributes:
        limits: The limits of every goal.
        wanted: Index of the goal that the search is about.
    """

    limits: tuple[Mapping[str, float], ...]
    wanted: int

    def draw(self, rng: np.random.Generator) -> int:
        """Draws a goal: often the wanted one, else any, those near it rather than those far off."""
        if rng.random() < WANTED:
            return self.wanted
        near = 1.0 / (1 + np.abs(np.arange(len(self.limits)) - self.wanted))
        return int(rng.choice(len(near), p=near / near.sum()))


def around(course: Course, limits: Mapping[str, float], span: Sequence[float]) -> Goals:
    """Goals around limits.

    Args:
        course: The priced space.
        limits: The limits that are wanted.
        span: Least and largest share of the wanted limits' room above the cheapest that goals leave.
    """
    least = course.least()
    low, high = span
    shares = (*np.linspace(low, 1, STEPS + 1)[:-1].tolist(), *np.linspace(1, high, STEPS + 1)[1:].tolist())

    def scaled(share: float) -> dict[str, float]:
        room = {name: max(limit - least[name], 0.0) for name, limit in limits.items()}
        return {name: least[name] + share * room[name] for name in limits}

    wanted = dict(limits)
    tight = [goal for goal in map(scaled, shares) if _is_tighter(goal, wanted)]
    wide = [goal for goal in map(scaled, shares) if _is_tighter(wanted, goal)]
    return _goals(course.pricing, tight, wanted, wide)


def along(course: Course, limits: Mapping[str, float], primary: str) -> Goals:
    """Goals along the primary cost, other limits kept; the widest is wanted until it is known what is enough."""
    least, most = course.least()[primary], min(course.most()[primary], limits.get(primary, np.inf))
    caps = least + (most - least) * np.arange(1, CAPS + 1) / CAPS
    widest = {**limits, primary: limits.get(primary, most * (1 + ROUNDING))}
    tight = [{**limits, primary: float(cap)} for cap in caps]
    return _goals(course.pricing, [goal for goal in tight if _is_tighter(goal, widest)], widest)


def _is_tighter(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    """Whether some limit is lower by more than rounding."""
    return any(first[name] < second[name] * (1 - ROUNDING) for name in first)


def _goals(
    pricing: Pricing,
    tight: Sequence[Mapping[str, float]],
    wanted: Mapping[str, float],
    wide: Sequence[Mapping[str, float]] = (),
) -> Goals:
    """The goals without those that no policy keeps, which are the tightest."""
    problem = assignment_problem(pricing)
    for number, goal in enumerate(tight):
        if solve(problem, variable_limits(pricing, goal)) is not None:
            return Goals((*tight[number:], wanted, *wide), len(tight) - number)
    return Goals((wanted, *wide), 0)
