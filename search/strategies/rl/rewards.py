"""What policies are worth: forecasts of many, put right by the measurements of a few.

The loss of a policy is what a surrogate holds for it that has learnt from all measurements so far, or what was
measured. A reward compares it with the other policies within the same budget, so that every goal has its best at 1 and
rewards of tight and of wide budgets are alike: `exp(-(loss - best) / spread)`, where the spread leads from the best to
the better quarter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from search.objective import Objective
from search.strategies.forecaster import Forecaster
from search.strategies.rl.course import Course
from search.strategies.rl.goals import Goals
from search.strategies.surrogate import Surrogate, chance_below, expected_improvement
from search.trials import Trial

QUARTER = 0.25

Point = tuple[int, ...]


class Ledger:
    """Every policy that was walked, what it is forecast to lose, and what was measured of it.

    Attributes:
        points: The points, in the order in which they were first met.
    """

    def __init__(self, objective: Objective, course: Course, goals: Goals, sources: Sequence[Forecaster]) -> None:
        """Opens the ledger.

        Args:
            objective: Says what is minimised.
            course: Prices points.
            goals: The budgets that rewards compare within; where the drop is limited, which is wanted is kept here.
            sources: The predictors, the preferred one first.
        """
        self.points: list[Point] = []
        self._objective = objective
        self._course = course
        self._goals = goals
        self._sources = tuple(sources)
        self._number: dict[Point, int] = {}
        self._forecasts: list[np.ndarray] = []
        self._costs: list[list[float]] = []
        self._losses: list[float] = []
        self._trials: dict[Point, Trial] = {}
        self._surrogate: Surrogate | None = None
        self._best = np.zeros(len(goals.limits))
        self._spread = np.ones(len(goals.limits))

    def judge(self, point: Point, goal: int) -> float:
        """The reward of a policy at a goal; it enters the ledger."""
        return float(self._rewards(np.array([self._losses[self._enter(point)]]), np.array([goal]))[0])

    def judged(self, ends: Sequence[tuple[Point, int]]) -> np.ndarray:
        """The rewards of many policies and goals, as things stand."""
        numbers = [self._number[point] for point, _ in ends]
        return self._rewards(np.array(self._losses)[numbers], np.array([goal for _, goal in ends]))

    def knows(self, point: Point) -> bool:
        """Whether a policy was measured."""
        return point in self._trials

    def record(self, trial: Trial) -> None:
        """Writes down a measurement."""
        point = self._course.pricing.space.encode(trial.policy)
        self._enter(point)
        self._trials[point] = trial

    def best(self, count: int) -> list[Point]:
        """The best policies measured, best first."""
        measured = [point for point, trial in self._trials.items() if trial.is_measured]
        return sorted(measured, key=lambda point: self._objective.rank(self._trials[point]))[:count]

    def refit(self) -> None:
        """Learns from the measurements, and judges every policy anew."""
        points, forecasts = np.array(self.points), np.array(self._forecasts)
        measured = [point for point, trial in self._trials.items() if trial.is_measured]
        losses = forecasts[:, 0]
        if measured:
            at = [self._number[point] for point in measured]
            known = np.array([self._loss(self._trials[point]) for point in measured])
            self._surrogate = Surrogate.fit(points[at], forecasts[at], known)
            losses = self._surrogate.posterior(points, forecasts)[0]
            losses[at] = known
        self._losses = losses.tolist()
        costs = np.array(self._costs).reshape(len(points), -1)
        for goal, limits in enumerate(self._goals.limits):
            within = losses[(costs <= [limits[name] for name in self._course.names]).all(1)]
            if len(within):
                self._best[goal] = within.min()
                spread = float(np.quantile(within, QUARTER) - within.min())
                self._spread[goal] = spread if spread > 0 else max(float(np.ptp(within)), 1e-12)
        if measured and (most := self._objective.quality_drop) is not None:
            enough = np.flatnonzero(self._best <= most)
            self._goals.wanted = int(enough[0]) if len(enough) else len(self._goals.limits) - 1

    def promising(self) -> Point | None:
        """The policy most worth measuring among those that keep the wanted budget and were not; None without any."""
        fresh = [number for number, point in enumerate(self.points) if point not in self._trials]
        if not fresh:
            return None
        points, forecasts = np.array(self.points)[fresh], np.array(self._forecasts)[fresh]
        for at in self._ranked(points, forecasts, np.array(self._costs).reshape(len(self.points), -1)[fresh]):
            point = self.points[fresh[int(at)]]
            if self._objective.is_feasible(self._course.pricing.space.decode(point)):
                return point
        return None

    def _ranked(self, points: np.ndarray, forecasts: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """Indices of the points that are worth measuring, the most promising first."""
        objective, names = self._objective, self._course.names
        limits = self._goals.limits[-1] if objective.quality_drop is not None else objective.limits
        within = np.flatnonzero((costs <= [limits[name] for name in names]).all(1))
        points, forecasts, costs = points[within], forecasts[within], costs[within]
        if self._surrogate is None:
            return np.asarray(within[self._starting(forecasts[:, 0], costs)])
        mean, deviation = self._surrogate.posterior(points, forecasts)
        trials = [trial for trial in self._trials.values() if trial.is_measured]
        most = objective.quality_drop
        if most is None:
            best = min(trial.drop for trial in trials)
            return np.asarray(within[np.lexsort((mean, -expected_improvement(mean, deviation, best)))])
        primary = costs[:, names.index(objective.primary_cost)]
        allowed = [objective.primary(trial) for trial in trials if self._loss(trial) <= most]
        saved = np.maximum(min(allowed) - primary, 0) if allowed else np.ones(len(points))
        order = np.lexsort((mean, -saved * chance_below(mean, deviation, most)))
        return np.asarray(within[order[saved[order] > 0]])

    def _starting(self, forecasts: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """What is measured first: the least forecast; where the drop is limited, of the middling costs."""
        if self._objective.quality_drop is None or not len(costs):
            return np.argsort(forecasts, kind="stable")
        primary = costs[:, self._course.names.index(self._objective.primary_cost)]
        return np.lexsort((forecasts, primary > np.median(primary)))

    def _rewards(self, losses: np.ndarray, goals: np.ndarray) -> np.ndarray:
        behind = (losses - self._best[goals]) / self._spread[goals]
        return np.asarray(np.exp(-np.maximum(behind, -1.0)))

    def _loss(self, trial: Trial) -> float:
        """The drop, or the most it may be where that is what is limited."""
        return trial.drop if self._objective.quality_drop is None else trial.certain_drop

    def _enter(self, point: Point) -> int:
        if point not in self._number:
            at = np.array([point])
            forecasts = np.array([float(source.losses(at)[0]) for source in self._sources])
            costs = self._course.costs(point)
            self._number[point] = len(self.points)
            self.points.append(point)
            self._forecasts.append(forecasts)
            self._costs.append([costs[name] for name in self._course.names])
            fresh = self._surrogate.posterior(at, forecasts[None])[0] if self._surrogate else forecasts
            self._losses.append(float(fresh[0]))
        return self._number[point]
