"""The dialogue with a sampler: it proposes, the objective judges, and it is told the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from search.objective import Objective
from search.strategies.penalty import penalised_loss
from search.strategies.projection import Projection
from search.strategies.samplers.parameters import Parameters
from search.trials import Trial

if TYPE_CHECKING:
    import optuna

PATIENCE = 5
"""Proposals in a row that led to no measurement, after which the sampler is given one that does."""

MOST_IDLE = 50
"""Proposals in a row that led to no measurement, after which the search ends: there is nothing new within reach."""


class Dialogue:
    """One search with one sampler.

    The sampler is told of every proposal what came of it. A policy over a limit is told as such, and a policy met
    before costs nothing: what is known is told again. Where the budget limits the drop, a policy that costs no less
    than the best is not measured either, since no quality could make it win. After every `PATIENCE` proposals in a row
    that led to no measurement, one is made for the sampler: the policy within the limits that is nearest to its last
    proposal, or, where that is known, an unknown one a single step from a good one. So there is a plan under every
    budget, and samplers that repeat themselves, as all do in small spaces, spend what they were given. The search ends
    when all points have been tried, when the sampler stops it, or after `MOST_IDLE` proposals in a row without a
    measurement.
    """

    def __init__(
        self,
        study: optuna.Study,
        parameters: Parameters,
        objective: Objective,
        rng: np.random.Generator,
        costs: Sequence[str] = (),
        knows_constraints: bool = True,
        on_trial: Callable[[Trial], None] = lambda trial: None,
        batch: int = 1,
    ) -> None:
        """Starts a dialogue.

        Args:
            study: Where the sampler looks for what it was told.
            parameters: What it chooses.
            objective: Judges what it proposes.
            rng: Draws steps from good policies.
            costs: What is minimised beside the drop; empty for the objective's own loss alone.
            knows_constraints: Whether the sampler reads constraints; if not, violations are added to its loss.
            on_trial: Called with every trial of the objective, each policy's once.
            batch: Proposals that the sampler makes before it is told what came of them.
        """
        self._study = study
        self._parameters = parameters
        self._objective = objective
        self._rng = rng
        self._costs = tuple(costs)
        self._knows_constraints = knows_constraints
        self._on_trial = on_trial
        self._batch = batch
        self._projection = Projection(objective.pricing, objective.limits)
        self._known: dict[tuple[int, ...], Trial] = {}
        self._tried: set[tuple[int, ...]] = set()
        self._best: Trial | None = None  # the cheapest of enough quality, where the budget limits the drop
        self._worst = 0.0  # of the losses measured: what a policy is told that has none
        self._idle = 0  # proposals in a row without a measurement
        self._is_stopped = False
        study.stop = self._stop  # samplers call it when they have tried all there is; by itself it needs Study.optimize

    def run(self) -> None:
        """Measures the starting policies, proposes the uniform ones, and goes on with what the sampler says."""
        space = self._objective.space
        for policy in self._objective.ahead(self._objective.starts, lambda policy: policy):
            self._begin_at(space.encode(policy))
        for chosen in self._parameters.uniform():
            self._study.enqueue_trial(chosen)
        while not self._is_over():
            proposals = [self._study.ask(self._parameters.distributions) for _ in range(self._batch)]
            points = [self._parameters.point(asked.params) for asked in proposals]
            if self._batch > 1:
                new = [point for point in points if point not in self._known and self._can_win(point)]
                self._objective.order(map(space.decode, new))
            for number, (asked, point) in enumerate(zip(proposals, points, strict=True)):
                if number and self._is_over():
                    break
                self._tried.add(point)
                self._tell(asked, self._trial(point) if self._can_win(point) else self._hypothesis(point))
                if self._idle and self._idle % PATIENCE == 0:
                    self._help(point)
        if not any(trial.is_measured for trial in self._known.values()):
            self._trial(self._projection.nearest(point))

    def _is_over(self) -> bool:
        is_waiting = self._idle and self._objective.is_out_of_time  # else the objective itself says when time is up
        is_exhausted = len(self._tried) >= self._parameters.size
        return bool(self._is_stopped or is_exhausted or is_waiting or self._idle >= MOST_IDLE)

    def _begin_at(self, point: tuple[int, ...]) -> None:
        """Measures a point, be it one that no parameters stand for, and has the nearest that they do proposed next."""
        self._trial(point)
        self._study.enqueue_trial(self._parameters.nearest(point))

    def _help(self, point: tuple[int, ...]) -> None:
        """Measures the policy within the limits nearest to `point`, or an unknown one next to a good one, if any."""
        nearest = self._projection.nearest(point)
        helpful = nearest if self._is_promising(nearest) else self._promising_neighbour()
        if helpful is not None:
            self._begin_at(helpful)

    def _is_promising(self, point: tuple[int, ...]) -> bool:
        """Whether a point is unknown, may win, and keeps the limits."""
        is_open = point not in self._known and self._can_win(point)
        return is_open and self._objective.is_feasible(self._objective.space.decode(point))

    def _can_win(self, point: tuple[int, ...]) -> bool:
        """Whether some quality could make a point better than the best, known costs being what they are."""
        if self._best is None or point in self._known:
            return True
        cost = self._objective.pricing.costs(self._objective.space.decode(point))[self._objective.primary_cost]
        return cost < self._objective.primary(self._best)

    def _hypothesis(self, point: tuple[int, ...]) -> Trial:
        """The trial of a point as if it had the quality of the best; not measured, and forgotten."""
        assert self._best is not None
        self._idle += 1
        policy = self._objective.space.decode(point)
        return replace(self._best, policy=policy, cost=self._objective.pricing.costs(policy))

    def _promising_neighbour(self) -> tuple[int, ...] | None:
        """A promising point one step from the best measured one that has such; from any one where a front is sought."""
        measured = [point for point in self._tried if point in self._known and self._known[point].is_measured]
        parents = sorted(measured, key=lambda point: (self._objective.rank(self._known[point]), point))
        if self._costs:
            self._rng.shuffle(parents)
        for parent in parents:
            for chosen in self._parameters.neighbours(parent, self._rng):
                point = self._parameters.point(chosen)
                if self._is_promising(point):
                    return point
        return None

    def _trial(self, point: tuple[int, ...]) -> Trial:
        """The trial of a point, from memory where it was met before."""
        self._idle += 1
        if point not in self._known:
            trial = self._known[point] = self._objective(self._objective.space.decode(point))
            self._on_trial(trial)
            if trial.state != "infeasible":
                self._idle = 0
            self._remember_best(trial)
        return self._known[point]

    def _remember_best(self, trial: Trial) -> None:
        """Keeps the cheapest trial of enough quality, where cost is all that is minimised."""
        objective = self._objective
        if self._costs or objective.quality_drop is None or trial.state != "complete":
            return
        is_allowed = max(objective.violations(trial).values()) <= 0
        if is_allowed and (self._best is None or objective.primary(trial) < objective.primary(self._best)):
            self._best = trial

    def _tell(self, asked: optuna.trial.Trial, trial: Trial) -> None:
        if self._knows_constraints:
            for name, violation in self._objective.violations(trial).items():
                asked.set_constraint(name, violation)
        self._study.tell(asked, self._values(trial))

    def _values(self, trial: Trial) -> list[float]:
        """What the sampler minimises: the loss alone, or the drop and each of the costs."""
        if not self._costs and not self._knows_constraints:
            return [penalised_loss(self._objective, trial)]
        loss = self._worst
        if trial.is_measured:
            loss = trial.drop if self._costs else self._objective.loss(trial)
            self._worst = max(self._worst, loss)
        if not self._knows_constraints:
            loss += sum(max(violation, 0.0) for violation in self._objective.violations(trial).values())
        return [loss, *(float(trial.cost[name] or 0.0) for name in self._costs)]

    def _stop(self) -> None:
        self._is_stopped = True
