"""Baselines: what any search must beat."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hwmodels import FLOAT, Format
from hwmodels.precision import Side
from search.objective import Objective
from search.policy import Policy
from search.space import Decision, SearchSpace
from search.strategies.asked import Asked, Point
from search.strategies.base import Strategy
from search.strategies.projection import Projection

REPEATS = 300  # policies drawn in a row that were all known: hardly any is left


class RandomSearch(Strategy):
    """Draws policies uniformly and brings those over budget within it, one random step down at a time.

    On devices where fewer bits may cost more, steps down may not lead there: then the nearest policy within the budget
    stands for what was drawn. What was measured is not measured again, and once hundreds of draws in a row bring
    nothing new, the search ends.
    """

    name = "random"

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        asked = Asked(objective)
        asked.begin()
        asked.measure_each(self._drawn(space, objective, rng, asked))

    def _drawn(
        self, space: SearchSpace, objective: Objective, rng: np.random.Generator, asked: Asked
    ) -> Iterator[Point]:
        """Draws points that were neither asked for nor drawn before."""
        projection = Projection(objective.pricing, objective.limits)
        known = set(asked.trials)
        repeats = 0
        while repeats < REPEATS and not (known and objective.is_out_of_time):
            drawn = space.sample(rng)
            point = space.encode(lower_until_feasible(space, objective, drawn, rng))
            if not objective.is_feasible(space.decode(point)):
                point = projection.nearest(space.encode(drawn))
            repeats = repeats + 1 if point in known else 0
            if not repeats:
                known.add(point)
                yield point


class Uniform(Strategy):
    """Measures every uniform precision of the space that keeps the budget, the one of least expected noise first.

    Every weight format goes with every input format; what is pinned stays so. Where no uniform precision keeps the
    budget, the policy within it that is nearest to the one of most expected noise is measured, so that there is a plan.
    """

    name = "uniform"

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        asked = Asked(objective)
        asked.begin()
        points = uniform_points(space)
        within = [point for point in points if objective.is_feasible(space.decode(point))]
        asked.measure_each(within or [Projection(objective.pricing, objective.limits).nearest(points[-1])])


def uniform_points(space: SearchSpace) -> list[Point]:
    """The points of all uniform precisions, the one of least expected noise first.

    Rounding to b bits leaves noise of power proportional to `4**-b`, and that of weights and inputs adds up (Widrow and
    Kollár, "Quantization Noise", 2008, chapter 1): precisions are sorted by that sum.
    """
    weights, inputs = _formats(space, "weight"), _formats(space, "input")
    found: dict[Point, float] = {}
    for weight in weights:
        for input_ in inputs:
            wanted = {"weight": weight, "input": input_}
            point = tuple(_level(decision, wanted[decision.side]) for decision in space.decisions)
            found.setdefault(point, 4.0**-weight.bits + 4.0**-input_.bits)
    return sorted(found, key=lambda point: found[point])


def lower_until_feasible(space: SearchSpace, objective: Objective, policy: Policy, rng: np.random.Generator) -> Policy:
    """Lowers random decisions of `policy` by one format until it keeps the budget or nothing is left to lower."""
    point = np.array(space.encode(policy))
    while not objective.is_feasible(policy) and point.any():
        point[rng.choice(np.flatnonzero(point))] -= 1
        policy = space.decode(point.tolist())
    return policy


def _formats(space: SearchSpace, side: Side) -> list[Format]:
    """The formats that open decisions about one side may take; float where none is open."""
    found = [
        format
        for decision in space.decisions
        if decision.side == side and decision.is_free
        for format in decision.formats
    ]
    return list(dict.fromkeys(found)) or [FLOAT]


def _level(decision: Decision, wanted: Format) -> int:
    """Index of the wanted format, or of the one with the nearest number of bits."""
    if wanted in decision.formats:
        return decision.formats.index(wanted)
    return min(range(len(decision.formats)), key=lambda level: abs(decision.formats[level].bits - wanted.bits))
