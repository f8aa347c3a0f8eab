"""The exact solver as a strategy: solve on forecasts, measure what comes out, and let measurements teach the rest."""

from __future__ import annotations

import numpy as np

from search.errors import ConfigError
from search.objective import Objective
from search.space import SearchSpace
from search.strategies.base import Strategy, checks_types
from search.strategies.forecaster import Forecaster, forecasters
from search.strategies.neighbourhood import neighbours, stacked, within
from search.strategies.surrogate import Surrogate, chance_below, expected_improvement
from search.trials import Trial

RUNNERS_UP = 8  # best points of every forecaster that are considered at the budget
PARENTS = 6  # best trials whose neighbourhood is searched
NEIGHBOURS = 1024  # drawn for every measurement, cheap beside it
COARSE = 24  # points of the front among which the cheapest of enough quality is looked for first


class Solver(Strategy):
    """Solving on sensitivities, then true measurements.

    Every predictor there is (the one that the table names, or several kinds where it is `auto`) proposes its optimum
    at the budget. Those are measured; then a surrogate that has learnt from all measurements picks, one after
    the other, the candidate with the largest expected improvement among the predictors' next-best solutions and the
    neighbours of the best policies measured. A share of the evaluations goes to optima at smaller budgets, for the
    front. Where the budget limits the quality drop instead, candidates lie along the predictors' fronts, and what is
    expected to improve is the cost, times the chance that the drop is allowed. Policies to start from are measured
    first; the surrogate learns from them, and their neighbours are candidates.

    With a `batch` above 1, so many candidates are picked at once, for workers to measure side by side: those picked
    already are believed to be as good as the surrogate thinks.
    """

    name = "solver"

    @checks_types
    def __init__(
        self,
        evaluations: int = 40,
        seconds: float | None = None,
        start_from: str | None = None,
        front: float = 0.2,
        batch: int = 1,
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.
            front: Share of the evaluations for optima at smaller budgets, where the budget limits costs.
            batch: Candidates picked at once; what is found depends on it, and not on who measures them.

        Raises:
            ConfigError: If an allowance, a share or the batch is out of range.
        """
        super().__init__(evaluations, seconds, start_from)
        if not 0 <= front < 1:
            raise ConfigError(f"strategy.front={front} must be at least 0 and below 1")
        if batch < 1:
            raise ConfigError(f"strategy.batch={batch} must be at least 1")
        self.front = front
        self.batch = batch

    @property
    def proposes_one(self) -> bool:
        return self.batch == 1

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        sources = forecasters(objective.sensitivity, objective.pricing, seed=int(rng.integers(2**31)))
        study = Study(objective, sources, rng, self.batch)
        starts = np.array([space.encode(policy) for policy in objective.starts], dtype=np.int64)
        study.measure(starts.reshape(-1, len(space.decisions)))
        if objective.quality_drop is None:
            best = [source.best(study.limits, RUNNERS_UP) for source in sources]
            study.measure(stacked([points[:1] for points in best], len(space.decisions)))
            shares = max(int(self.front * self.evaluations), 0)
            study.improve(stacked(best, len(space.decisions)), reserve=shares)
            if shares:
                study.measure(sources[0].front(objective.primary_cost, shares + 1, study.limits)[::-1])
        else:
            along = [source.front(objective.primary_cost, COARSE, study.limits) for source in sources]
            study.measure(along[0][[len(along[0]) // 2]])
            study.improve(stacked(along, len(space.decisions)))
        study.improve(np.empty((0, len(space.decisions)), dtype=np.int64))


class Study:
    """The measurements of one search and what they teach."""

    def __init__(
        self, objective: Objective, sources: list[Forecaster], rng: np.random.Generator, batch: int = 1
    ) -> None:
        self.limits = {name: limit - objective.pricing.fixed.get(name, 0.0) for name, limit in objective.limits.items()}
        self._objective = objective
        self._sources = sources
        self._rng = rng
        self._batch = batch
        self._trials: list[Trial] = []
        self._points: list[tuple[int, ...]] = []

    def measure(self, points: np.ndarray) -> None:
        """Measures points that keep the budget and were not measured, in order."""
        objective, decode = self._objective, self._objective.space.decode
        new = [point for point in dict.fromkeys(map(tuple, points.tolist())) if point not in self._points]
        for point in objective.ahead([point for point in new if objective.is_feasible(decode(point))], decode):
            self._trials.append(objective(decode(point)))
            self._points.append(point)

    def improve(self, candidates: np.ndarray, reserve: float = 0) -> None:
        """Measures the most promising candidates and neighbours of good trials, until `reserve` evaluations are left.

        Ends early where there is nothing new within the budget.
        """
        while (left := self._objective.remaining - reserve) >= 1:
            following = self._next(candidates, min(self._batch, int(left)))
            if not len(following):
                return
            self.measure(following)

    def _next(self, candidates: np.ndarray, count: int) -> np.ndarray:
        """The most promising points that are feasible and new, at most `count` rows."""
        objective, space = self._objective, self._objective.space
        pool = [candidates]
        if self._trials:
            order = sorted(range(len(self._trials)), key=lambda number: objective.rank(self._trials[number]))
            parents = np.array([self._points[number] for number in order[:PARENTS]])
            drawn = neighbours(space, parents, NEIGHBOURS, self._rng)
            pool.append(within(objective.pricing, drawn, objective.limits))
        known = set(self._points)
        fresh = [point for point in stacked(pool, len(space.decisions)) if tuple(point.tolist()) not in known]
        if not fresh:
            return np.empty((0, len(space.decisions)), dtype=np.int64)
        points, picked = np.array(fresh), list[int]()
        for _ in range(count):
            ranked = (at for at in self._ranked(points, points[picked]).tolist() if at not in picked)
            at = next((at for at in ranked if objective.is_feasible(space.decode(points[at].tolist()))), None)
            if at is None:
                break
            picked.append(at)
        return points[picked]

    def _ranked(self, points: np.ndarray, believed: np.ndarray) -> np.ndarray:
        """Indices of the points that are worth measuring, the most promising first.

        Args:
            points: The points.
            believed: Points that are measured already, as it were, with what the surrogate thinks of them.
        """
        forecasts = self._forecasts(points)
        measured = [number for number, trial in enumerate(self._trials) if trial.is_measured]
        if not measured:
            return np.argsort(forecasts[:, 0], kind="stable")
        objective, trials = self._objective, [self._trials[number] for number in measured]
        seen = np.array([self._points[number] for number in measured])
        limit = objective.quality_drop
        losses = np.array([trial.drop if limit is None else trial.certain_drop for trial in trials])
        surrogate = Surrogate.fit(seen, self._forecasts(seen), losses)
        costs = [objective.primary(trial) for trial in trials]
        if len(believed):
            losses = np.concatenate([losses, surrogate.posterior(believed, self._forecasts(believed))[0]])
            seen = np.concatenate([seen, believed])
            costs += objective.pricing.totals(believed)[objective.primary_cost].tolist()
            surrogate = Surrogate.fit(seen, self._forecasts(seen), losses)
        mean, deviation = surrogate.posterior(points, forecasts)
        if limit is None:
            return np.lexsort((mean, -expected_improvement(mean, deviation, float(losses.min()))))
        allowed = [cost for cost, loss in zip(costs, losses, strict=True) if loss <= limit]
        prices = objective.pricing.totals(points)[objective.primary_cost]
        saved = np.maximum(min(allowed) - prices, 0) if allowed else np.ones(len(points))
        order = np.lexsort((mean, -saved * chance_below(mean, deviation, limit)))
        return order[saved[order] > 0]

    def _forecasts(self, points: np.ndarray) -> np.ndarray:
        """What every predictor foretells, shape `(policies, predictors)`."""
        return np.stack([source.losses(points) for source in self._sources], axis=1)
