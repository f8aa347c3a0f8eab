"""The objective: from a policy to its trial, the same way for every strategy.

Here, and only here, a policy is priced, held against the budget, measured, cached, counted and logged.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Protocol, TypeVar

import numpy as np

from search.policy import Policy
from search.pricing import Pricing
from search.quality.evaluate import Evaluator, Finish
from search.quality.incumbents import Incumbents
from search.sensitivity.choices import positions
from search.sensitivity.table import SensitivityTable
from search.trials import State, Trial, TrialLog

PROPOSALS_PER_EVALUATION = 50
"""Infeasible policies cost no evaluation; this many of them for each evaluation end a search that finds no others."""

Asked = TypeVar("Asked")

ROUNDING = 1e-9
"""Shares of evaluations add up no better than this."""


class Allowance(Protocol):
    """What a search may spend."""

    evaluations: int
    seconds: float | None


class SpentError(Exception):
    """The evaluations or seconds a strategy may spend are used up; strategies let it pass."""


class Objective:
    """Calls measure a policy on the selection split and return its trial.

    A policy over budget is logged as `infeasible` with its cost and not measured. Where the evaluator races, a policy
    runs against all incumbents whose primary cost is no greater, and is logged as `stopped` where it lost: never the
    best, never on a front. Every call for a measured policy spends the share of an evaluation that was measured and
    the seconds that took, whether it is measured now, or known from the log or the evaluation store, so that resuming
    replays a strategy from its seed and stops where the undisturbed run would have. The seconds that a strategy takes
    to propose a policy are spent, too; those of scoring choices are not.

    Attributes:
        pricing: Prices policies.
        limits: Absolute limits on costs.
        primary_cost: The cost that fronts and ties are about.
        quality_drop: How much quality may be lost, where the budget says so; then cost is what is minimised.
        spent_evaluations: Evaluations spent so far; not whole where races were stopped.
        spent_seconds: Seconds spent so far on measuring and proposing.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        pricing: Pricing,
        limits: Mapping[str, float],
        log: TrialLog,
        allowance: Allowance,
        score: Callable[[], SensitivityTable],
        primary_cost: str = "weight_bytes",
        quality_drop: float | None = None,
        on_trial: Callable[[Trial, bool], None] = lambda trial, known: None,
        starts: Callable[[Objective], Sequence[Policy]] = lambda objective: (),
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Creates the objective.

        Args:
            evaluator: Measures policies.
            pricing: Prices them.
            limits: Absolute limits on costs.
            log: Where trials are kept; those already there are not measured again.
            allowance: Evaluations and seconds that may be spent.
            score: Computes the sensitivity table, when a strategy first asks for it.
            primary_cost: The cost that fronts and ties are about.
            quality_drop: How much quality may be lost; then cost is what is minimised.
            on_trial: Called with every trial, and whether it was known already.
            starts: Finds the policies to start from, when a strategy first asks for them.
            is_stopped: Says whether the search was asked to stop: then nothing is left to spend.
        """
        self.pricing = pricing
        self.space = pricing.space
        self.limits = dict(limits)
        self.primary_cost = primary_cost
        self.quality_drop = quality_drop
        self.higher_is_better = evaluator.task.higher_is_better
        self.spent_evaluations = 0.0
        self.spent_seconds = 0.0
        self._evaluator = evaluator
        self._log = log
        self._known = {_key(trial): trial for trial in log.trials}
        self._allowance = allowance
        self._score = score
        self._starts = starts
        self._on_trial = on_trial
        self._is_stopped = is_stopped
        self._free_proposals = 0
        self._asked = time.perf_counter()  # when the strategy began to think of its next proposal
        self._incumbents = Incumbents(
            lambda policy: evaluator.scores(policy, "selection"),
            evaluator.directory / "incumbents" if evaluator.directory else None,
        )

    @cached_property
    def float_quality(self) -> float:
        """Quality of the float network on the selection split."""
        return self._evaluator.float_quality("selection").value

    @cached_property
    def sensitivity(self) -> SensitivityTable:
        """The sensitivity table, computed when first asked for."""
        started = time.perf_counter()
        table = self._score()
        self._asked += time.perf_counter() - started
        return table

    @cached_property
    def starts(self) -> tuple[Policy, ...]:
        """The policies that `strategy.start_from` names, best first and within the limits; found when asked for."""
        return tuple(self._starts(self))

    @property
    def is_scored(self) -> bool:
        """Whether the sensitivity table was asked for."""
        return "sensitivity" in self.__dict__

    @property
    def remaining(self) -> float:
        """Evaluations left; not whole where races were stopped or parts of the split asked for."""
        return max(self._allowance.evaluations - self.spent_evaluations, 0)

    @property
    def is_out_of_time(self) -> bool:
        """Whether the seconds are spent, those since the last trial counted: for strategies that think for long.

        They are spent, too, where the search was asked to stop.
        """
        if self._is_stopped():
            return True
        seconds = self._allowance.seconds
        return seconds is not None and self.spent_seconds + time.perf_counter() - self._asked >= seconds

    def __call__(self, policy: Policy, fidelity: float = 1.0) -> Trial:
        """Returns the trial of a policy, measuring it if it is within budget and not known yet.

        Args:
            policy: A policy of the space.
            fidelity: Share of the selection split to measure on, in (0, 1].

        Raises:
            SpentError: If nothing is left to spend.
        """
        known = self._known.get((policy.digest, fidelity))
        self._check_allowance(fidelity, is_known=known is not None)
        proposing = time.perf_counter() - self._asked
        trial, scores = (known, None) if known else self._try(policy, fidelity, proposing)
        if (
            trial.state == "infeasible"
            and self._free_proposals >= PROPOSALS_PER_EVALUATION * self._allowance.evaluations
        ):
            raise SpentError  # what is within the budget may still be measured
        if not known:
            self._log.append(trial)
            self._known[policy.digest, fidelity] = trial
        if trial.state == "infeasible":
            self._free_proposals += 1
        else:
            self.spent_evaluations += trial.fidelity
            self.spent_seconds += trial.seconds
        self.spent_seconds += trial.proposing_seconds
        if trial.state == "complete" and self._races(fidelity):
            self._incumbents.add(trial.policy, self.primary(trial), trial.drop, scores)
        self._on_trial(trial, known is not None or (trial.is_measured and self._evaluator.was_served))
        self._asked = time.perf_counter()
        return trial

    def map(self, policies: Iterable[Policy], fidelity: float = 1.0) -> list[Trial]:
        """Returns the trials of several policies, in order; helpers measure some of them meanwhile, if there are any.

        Args:
            policies: Policies of the space.
            fidelity: Share of the selection split to measure on, in (0, 1].

        Raises:
            SpentError: If nothing is left to spend.
        """
        return [self(policy, fidelity) for policy in self.ahead(policies, lambda policy: policy, fidelity)]

    def ahead(
        self, asked: Iterable[Asked], policy_of: Callable[[Asked], Policy], fidelity: float = 1.0
    ) -> Iterator[Asked]:
        """Yields what will be asked for, in order, having ordered what comes next where others help to measure.

        It changes no trial; policies that are over budget, known already, or beyond what may be spent are not ordered.

        Args:
            asked: What the caller is going to call the objective on, one by one; taken a little ahead.
            policy_of: From one of them to its policy.
            fidelity: Share of the selection split that it will be measured on.
        """
        source, waiting = iter(asked), deque[Asked]()
        while True:
            fresh = list(islice(source, max(self._evaluator.foresight - len(waiting), 0)))
            if fresh and (waiting or len(fresh) > 1):
                self.order(map(policy_of, fresh), fidelity, len(waiting))
            waiting.extend(fresh)
            if not waiting:
                return
            yield waiting.popleft()

    def order(self, policies: Iterable[Policy], fidelity: float = 1.0, before: int = 0) -> None:
        """Has helpers measure policies that will be asked for, where there are any; changes no trial.

        Args:
            policies: The policies; those over budget, known, or beyond what may be spent are left out.
            fidelity: Share of the selection split that they will be measured on.
            before: How many others will be asked for first.
        """
        if self._evaluator.foresight == 1:
            return
        started = time.perf_counter()
        affordable = int(self.remaining / fidelity + ROUNDING) - before
        new = [
            policy
            for policy in dict.fromkeys(policies)
            if (policy.digest, fidelity) not in self._known and self.is_feasible(policy)
        ][: max(affordable, 0)]
        rivals = None
        if self._races(fidelity):
            rivals = [self._incumbents.rivals(self.pricing.costs(policy)[self.primary_cost]) for policy in new]
        self._evaluator.order(new, "selection", fidelity, rivals)
        self._asked += time.perf_counter() - started

    def excess(self, policy: Policy) -> dict[str, float]:
        """How far a policy is over each limit, as a share of it; at most 0 where the limit holds."""
        costs = self.pricing.costs(policy)
        return {name: costs[name] / limit - 1 for name, limit in self.limits.items()}

    def is_feasible(self, policy: Policy) -> bool:
        """Whether a policy keeps every limit."""
        return self._keeps_limits(self.pricing.costs(policy))

    def predict(self, policy: Policy) -> float:
        """Forecasts the loss of a policy with the sensitivity table's preferred predictor."""
        at = positions(self.space, self.space.encode(policy))
        return float(self.sensitivity.predict(at[None])[0])

    def loss(self, trial: Trial) -> float:
        """What a measured or stopped trial is minimised by: its drop, or its cost where the budget limits the drop."""
        return trial.drop if self.quality_drop is None else self.primary(trial)

    def violations(self, trial: Trial) -> dict[str, float]:
        """How far a trial is over each limit, the quality drop's included; at most 0 where the limit holds."""
        violations = {name: (trial.cost[name] or 0.0) / limit - 1 for name, limit in self.limits.items()}
        if self.quality_drop is not None:
            violations["quality_drop"] = trial.certain_drop - self.quality_drop if trial.is_measured else 1.0
        return violations

    def rank(self, trial: Trial) -> tuple[float, ...]:
        """Sorts trials, best first: within budget, then by loss, then by predicted loss where known, then by cost."""
        if trial.state != "complete":
            return (math.inf,) * 4
        over = max(0.0, *self.violations(trial).values(), 0.0)
        return (over, self.loss(trial), trial.metrics.get("predicted") or 0.0, self.primary(trial))

    def primary(self, trial: Trial) -> float:
        """The primary cost of a trial."""
        cost = trial.cost[self.primary_cost]
        return math.inf if cost is None else cost

    def _check_allowance(self, fidelity: float, is_known: bool) -> None:
        if self._is_stopped() or self.remaining < fidelity - ROUNDING:
            raise SpentError
        is_replayed = is_known and self.spent_seconds < (self._allowance.seconds or math.inf)
        if self.spent_evaluations and self.is_out_of_time and not is_replayed:
            raise SpentError  # never before something was measured: there is to be a plan

    def _keeps_limits(self, costs: Mapping[str, float]) -> bool:
        return all(costs[name] <= limit for name, limit in self.limits.items())

    def _races(self, fidelity: float) -> bool:
        return self._evaluator.racing is not None and fidelity == 1.0

    def _try(self, policy: Policy, fidelity: float, proposing: float) -> tuple[Trial, np.ndarray | None]:
        """Prices a policy and measures it if it is within budget; returns its scores where others may race it."""
        costs = self.pricing.costs(policy)
        cost = {name: None if math.isnan(value) else value for name, value in costs.items()}
        metrics: dict[str, float | None] = {}
        if self.is_scored:
            metrics["predicted"] = self.predict(policy)
        trial = Trial(len(self._log.trials), policy, fidelity, metrics, cost, 0.0, "infeasible", round(proposing, 6))
        if not self._keeps_limits(costs):
            return trial, None
        races = self._races(fidelity)
        incumbents = self._incumbents.scores(self.primary(trial)) if races else []
        started = self._evaluator.seconds
        if races:
            finish = self._evaluator.race(policy, incumbents)
        else:
            finish = Finish(self._evaluator.measure(policy, "selection", fidelity), fidelity)
        quality = finish.quality.to_dict()
        metrics = {"quality": quality.pop("value"), **quality, **metrics}
        state: State = "stopped" if finish.fidelity < fidelity else "complete"
        measured = replace(
            trial,
            fidelity=finish.fidelity,
            metrics=metrics,
            seconds=round(self._evaluator.seconds - started, 6),
            state="failed" if metrics["quality"] is None else state,
        )
        return measured, finish.scores


def _key(trial: Trial) -> tuple[str, float]:
    """What a trial answers: a policy's digest and the fidelity asked for; only whole measurements are stopped."""
    return trial.digest, 1.0 if trial.state == "stopped" else trial.fidelity
