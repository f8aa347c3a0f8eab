"""The exact solver as a strategy: solve on predicted losses, measure around the optimum, improve on that."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from search.assignment import assignment_problem, solution_policy, variable_limits
from search.errors import ConfigError
from search.objective import Objective
from search.policy import Policy
from search.solve.linear import near, solve, sweep
from search.solve.problem import Problem
from search.space import SearchSpace
from search.strategies.base import Strategy
from search.trials import Trial


class Solver(Strategy):
    """Exact multiple-choice integer programming on single-choice sensitivities, then true measurements.

    It measures the optimum at the budget, the next-best solutions there, and optima at smaller budgets for the front;
    what is left of the evaluations goes to the neighbours of the best policy measured, likeliest first. Where the
    budget limits the quality drop instead, it looks for the least cost: measured drops calibrate the predicted losses
    through a monotone map, which says up to which loss to solve next.
    """

    name = "solver"

    def __init__(
        self, evaluations: int = 40, seconds: float | None = None, front: float = 0.3, near: float = 0.3
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring it may spend; None is no limit.
            front: Share of the evaluations for optima at smaller budgets.
            near: Share of the evaluations for the next-best solutions at the budget.

        Raises:
            ConfigError: If an allowance or share is out of range.
        """
        super().__init__(evaluations, seconds)
        if min(front, near) < 0 or front + near > 1:
            raise ConfigError(
                f"strategy.front={front} and strategy.near={near} must be at least 0 and add up to at most 1"
            )
        self.front = front
        self.near = near

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        peaks = set(objective.limits) - set(objective.pricing.fixed)
        if peaks:
            raise ConfigError(
                f"budget.{peaks.pop()} is a peak, not a sum over layers, so strategy=solver cannot keep it; "
                "use strategy=tpe or strategy=random, or drop the limit"
            )
        problem = assignment_problem(objective.pricing, objective.sensitivity)
        limits = variable_limits(objective.pricing, objective.limits)
        if objective.quality_drop is None:
            trials = [objective(policy) for policy in self._predicted_best(problem, limits, objective)]
        else:
            trials = list(self._cheapest(problem, limits, objective))
        while True:
            tried = {trial.digest for trial in trials}
            around = [policy for policy in self._around(objective, trials) if policy.digest not in tried]
            if not around:
                return
            trials.append(objective(min(around, key=objective.predict)))

    def _around(self, objective: Objective, trials: list[Trial]) -> list[Policy]:
        """Neighbours of the best trial that keep the budget; only cheaper ones where cost is what is minimised."""
        best = min(trials, key=objective.rank)
        around = [policy for policy in objective.space.neighbours(best.policy) if objective.is_feasible(policy)]
        if objective.quality_drop is None or objective.rank(best)[0] > 0:
            return around
        cost = objective.primary_cost
        return [policy for policy in around if objective.pricing.costs(policy)[cost] < objective.primary(best)]

    def _predicted_best(self, problem: Problem, limits: dict[str, float], objective: Objective) -> list[Policy]:
        """The optimum at the budget, its runners-up, and the optima of smaller budgets, each once."""
        best = solve(problem, limits)
        if best is None:
            return []
        cost, space = objective.primary_cost, objective.space
        runners_up = near(problem, best, limits, int(self.near * self.evaluations))
        budgets = int(self.front * self.evaluations)
        smaller = sweep(problem, cost, budgets, upper=limits.get(cost)) if budgets > 1 else []
        policies = [solution_policy(space, solution) for solution in (best, *runners_up, *smaller)]
        return [policy for policy in dict.fromkeys(policies) if objective.is_feasible(policy)]

    def _cheapest(self, problem: Problem, limits: dict[str, float], objective: Objective) -> Iterator[Trial]:
        """Measures the cheapest policies that the calibrated prediction allows, until it proposes nothing new."""
        losses: list[float] = []
        drops: list[float] = []
        tried: set[Policy] = set()
        solved: set[float] = set()
        ends = [*sweep(problem, objective.primary_cost, 5), solve(problem, limits)]
        allowed = [solution.score for solution in ends if solution]
        while allowed:
            solution = solve(problem, limits, minimise=objective.primary_cost, max_score=allowed.pop())
            policy = solution_policy(objective.space, solution) if solution else None
            if policy and policy not in tried:
                tried.add(policy)
                trial = objective(policy)
                yield trial
                if trial.is_measured:
                    losses.append(objective.predict(policy))
                    drops.append(trial.certain_drop)
            if not allowed:
                loss = allowed_loss(np.array(losses), np.array(drops), objective.quality_drop or 0.0)
                if loss is not None and loss not in solved:
                    solved.add(loss)
                    allowed = [loss]


def allowed_loss(losses: np.ndarray, drops: np.ndarray, limit: float) -> float | None:
    """Returns the predicted loss at which the drop is expected to reach `limit`.

    The measured drops are made monotone in the predicted loss (isotonic regression) and interpolated linearly.

    Args:
        losses: Predicted losses, shape `(trials,)`.
        drops: Measured drops, shape `(trials,)`.
        limit: The drop that is allowed.

    Returns:
        The loss, or None where nothing was measured.
    """
    if not len(losses):
        return None
    from scipy.optimize import isotonic_regression

    order = np.argsort(losses, kind="stable")
    losses, fitted = losses[order], isotonic_regression(drops[order]).x
    inside = int(np.searchsorted(fitted, limit, side="right"))
    if inside == 0:
        return float(losses[0] / 2)
    if inside == len(losses):
        return float(losses[-1] * 2)
    share = (limit - fitted[inside - 1]) / (fitted[inside] - fitted[inside - 1])
    return float(losses[inside - 1] + share * (losses[inside] - losses[inside - 1]))
