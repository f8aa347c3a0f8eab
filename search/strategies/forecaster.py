"""Predictors as sources of candidates: what each holds for the best policies within limits, and along a whole front."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from search.assignment import assignment_problem, selection_points, unit_choice_matrix
from search.errors import InfeasibleError
from search.pricing import Pricing
from search.sensitivity.choices import starts_of
from search.sensitivity.settings import AUTO, MEASURED, SUPERPOSITION
from search.sensitivity.table import PREFERRED, SensitivityTable
from search.solve.front import solve_front
from search.solve.linear import near
from search.solve.problem import Solution
from search.solve.program import NotFoundError
from search.solve.quadratic import near_quadratic, solve_quadratic
from search.solve.superposition import search_superposition

GENERATIONS = 2  # of a search on the superposition, and its random starts; measurements refine what it finds
LARGEST = 2000  # choices of units, whose bound takes a matrix of that size to be inverted again and again
FALLBACK = "kl"  # besides the preferred predictors, what adds up


class Forecaster:
    """One predictor over one priced space.

    Attributes:
        name: The predictor's name.
        problem: What it forecasts and what choices cost, as the solvers take it.
    """

    def __init__(self, name: str, table: SensitivityTable, pricing: Pricing, seed: int = 0) -> None:
        self.name = name
        self._table = table
        self._space = pricing.space
        self._starts = starts_of(pricing.space)
        self._seed = seed
        self.problem = assignment_problem(pricing, *table.parts(name))

    def losses(self, points: np.ndarray) -> np.ndarray:
        """Forecasts the losses of points of the space, `(policies, decisions)` to `(policies,)`."""
        return self._table.predict(points + self._starts, self.name)

    def best(self, limits: Mapping[str, float], count: int) -> np.ndarray:
        """The best `count` points within limits by its forecast, best first; fewer where there are no more.

        Raises:
            InfeasibleError: If the solver gives up before it finds any.
        """
        problem = self.problem
        try:
            first = solve_quadratic(problem, limits, seed=self._seed, rounds=0)
        except NotFoundError as error:
            raise InfeasibleError(f"no policy was found that keeps all limits of the budget: {error}") from error
        if first is None:
            return np.empty((0, len(self._space.decisions)), dtype=np.int64)
        if self.name == SUPERPOSITION:
            found = self._superpose(limits, [first], count)
        elif count == 1:
            found = [first]
        elif problem.interactions is None:
            found = [first, *near(problem, first, limits, count - 1)]
        else:
            found = [first, *near_quadratic(problem, first, limits, count - 1)]
        return selection_points(self._space, found[:count])

    def proved(self, limits: Mapping[str, float], seconds: float) -> Solution | None:
        """The optimum of its forecast within limits, as far as it is proved in that time; None where there is none.

        What a superposition foretells has no bound; nor have interactions of which some were measured, or of more
        choices than `LARGEST`.
        """
        is_large = self.problem.interactions is not None and sum(self.problem.sizes) > LARGEST
        if is_large or self.name in (SUPERPOSITION, MEASURED):
            return None
        return solve_quadratic(self.problem, limits, seed=self._seed, seconds=seconds)

    def front(self, cost: str, count: int, limits: Mapping[str, float]) -> np.ndarray:
        """Points along the front of its forecast against one cost, within limits, cheapest first."""
        solutions = solve_front(self.problem, cost, count, limits, seed=self._seed)
        if self.name == SUPERPOSITION:
            within = ({**limits, cost: solution.costs[cost]} for solution in solutions)
            solutions = [self._superpose(each, [s], 1, 0)[0] for each, s in zip(within, solutions, strict=True)]
        return selection_points(self._space, solutions)

    def _superpose(
        self, limits: Mapping[str, float], starts: list[Solution], count: int, generations: int = GENERATIONS
    ) -> list[Solution]:
        """The best of what a search from `starts` finds on predicted outputs."""
        kept = self._table.superposition
        assert kept is not None
        seen = kept.seen_by(kept.reading)
        return search_superposition(
            self.problem,
            seen.base,
            self._unit_changes,
            seen.targets,
            kept.reading,
            limits,
            starts=[solution.choices for solution in starts],
            keep=count,
            restarts=generations,
            generations=generations,
            rng=np.random.default_rng(self._seed),
        )

    @cached_property
    def _unit_changes(self) -> np.ndarray:
        """What every choice of every unit changes in the outputs, shape `(choices of all units, rows, outputs)`."""
        kept = self._table.superposition
        assert kept is not None
        changes = kept.seen_by(kept.reading).changes
        made = unit_choice_matrix(self._space).astype(np.float32) @ changes.reshape(len(changes), -1)
        return np.asarray(made).reshape(-1, *changes.shape[1:])


def proofs(
    table: SensitivityTable, pricing: Pricing, limits: Mapping[str, float], seconds: float = 3.0
) -> dict[str, dict[str, float]]:
    """How far the optimum of every forecaster is proved, by its name: its `score`, a `bound` on all others, the `gap`.

    Args:
        table: The sensitivities.
        pricing: The space and its prices.
        limits: What policies may cost, without what no choice changes.
        seconds: Time limit of each proof.
    """
    found = {source.name: source.proved(limits, seconds) for source in forecasters(table, pricing)}
    return {
        name: {"score": solution.score, "bound": solution.bound, "gap": gap_of(solution)}
        for name, solution in found.items()
        if solution and math.isfinite(solution.bound)
    }


def gap_of(solution: Solution) -> float:
    """By which share of its score a solution may be above the optimum."""
    if solution.optimal:
        return 0.0
    above = max(solution.score - solution.bound, 0.0)
    return above / abs(solution.score) if above else 0.0


def forecasters(table: SensitivityTable, pricing: Pricing, seed: int = 0) -> list[Forecaster]:
    """One forecaster for the predictor that the settings name; where they leave it open, the best of every kind."""
    if table.predictor != AUTO:
        names = [table.predictor]
    else:
        names = [name for name in PREFERRED if name in table.predictors and not _is_scaled_too(name, table)]
        names += [name for name in table.columns if name == FALLBACK or not names][:1]
    return [Forecaster(name, table, pricing, seed) for name in names]


def _is_scaled_too(name: str, table: SensitivityTable) -> bool:
    return f"{name}_scaled" in table.predictors
