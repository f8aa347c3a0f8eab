"""How far a search is: evaluations done, the best policy so far, how fast it goes, and how long it will take."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from search.budget import RATIOS
from search.trials import Trial
from search.units import COST_NAMES, quantity, significant

MEMORY = 20
"""Evaluations by which the speed is told: racing and other machines change it on the way."""

MEASURING = "measuring policies"
"""The stage in which trials come."""


@dataclass(frozen=True)
class Goal:
    """What a search makes small: the drop of quality, or a cost where the budget limits the drop.

    Attributes:
        primary_cost: The cost that is shown beside a quality.
        quality_drop: How much quality may be lost; None where the budget does not say.
        metric: What the quality is.
    """

    primary_cost: str = "weight_bytes"
    quality_drop: float | None = None
    metric: str = "quality"

    @classmethod
    def of(cls, budget: Mapping[str, float], metric: str = "quality") -> Goal:
        """Reads it off a budget's limits by their config names, as `Budget.given` returns them; others are ignored."""
        costs = (RATIOS.get(name, name) for name in budget)
        known = (cost for cost in costs if cost in COST_NAMES)
        return cls(next(known, "weight_bytes"), budget.get("quality_drop"), metric)

    def rank(self, trial: Trial) -> tuple[float, ...]:
        """Sorts trials that were measured whole, best first, as `Objective.rank` does."""
        cost = trial.cost.get(self.primary_cost)
        primary = math.inf if cost is None else cost
        predicted = trial.metrics.get("predicted") or 0.0
        if self.quality_drop is None:
            return (0.0, trial.drop, predicted, primary)
        return (max(0.0, trial.certain_drop - self.quality_drop), primary, predicted, primary)

    def describe(self, trial: Trial) -> list[str]:
        """A trial's quality, drop and primary cost, what the search makes small first."""
        quality = [f"{self.metric} {trial.quality:.4f}", f"drop {trial.drop:+.4f}".replace("-", "−")]
        cost = [f"{COST_NAMES[self.primary_cost]} {quantity(self.primary_cost, trial.cost.get(self.primary_cost))}"]
        return quality + cost if self.quality_drop is None else cost + quality


class Headway:
    """Keeps account of what a search reports.

    Attributes:
        goal: What the search makes small.
        stage_name: The stage at hand.
        best: The best trial so far; None while there is none.
        done: Steps of the stage done; where policies are measured, evaluations.
        total: Steps of the stage; None where nobody knows.
        workers: How many processes measure.
    """

    def __init__(
        self,
        evaluations: float | None,
        goal: Goal | None = None,
        seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the account.

        Args:
            evaluations: Evaluations the search may spend; None where that is not known.
            goal: What the search makes small.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            clock: Tells the seconds.
        """
        self.goal = goal or Goal()
        self.stage_name = "starting"
        self.best: Trial | None = None
        self.done: float = 0
        self.total: float | None = None
        self.workers = 1
        self.evaluations = 0.0
        self.allowance = evaluations
        self._seconds = seconds
        self._spent_s = 0.0
        self._clock = clock
        self._started = self._entered = clock()
        self._marks: deque[tuple[float, float]] = deque(maxlen=MEMORY + 1)  # when how much of the stage was done

    @property
    def elapsed_s(self) -> float:
        """Seconds since the search began."""
        return self._clock() - self._started

    @property
    def stage_s(self) -> float:
        """Seconds since the stage began."""
        return self._clock() - self._entered

    @property
    def is_measuring(self) -> bool:
        """Whether trials are what is counted."""
        return self.stage_name == MEASURING

    @property
    def speed(self) -> float | None:
        """Steps of the stage, or evaluations, in a second; None until one was timed."""
        if len(self._marks) < 2:
            return None
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        return (last - first) / (last_s - first_s) if last > first and last_s > first_s else None

    @property
    def left_s(self) -> float | None:
        """Seconds that the stage will still take, by the last steps; None where that cannot be told."""
        if self.speed is None or self.total is None:
            return None
        since_s = min(
            self._clock() - self._marks[-1][0], 1 / self.speed
        )  # of a step that takes longer, nothing is known
        left_s = max((self.total - self.done) / self.speed - since_s, 0.0)
        if self._seconds is not None and self.is_measuring:
            left_s = min(left_s, max(self._seconds - self._spent_s - since_s, 0.0))
        return left_s

    def stage(self, name: str) -> None:
        """Enters a stage."""
        self.stage_name, self._entered = name, self._clock()
        self.done, self.total = (self.evaluations, self.allowance) if self.is_measuring else (0, None)
        self._marks.clear()

    def step(self, done: float, total: float) -> None:
        """Takes note of steps of the stage."""
        self.done, self.total = done, total
        self._mark()

    def trial(self, trial: Trial, known: bool) -> None:
        """Takes note of a trial; one that was known already tells nothing about speed."""
        spent = 0.0 if trial.state == "infeasible" else trial.fidelity
        if spent and not known and not self._marks:
            self._marks.append((self._clock() - trial.seconds, self.evaluations))
        self.evaluations = round(self.evaluations + spent, 9)
        self._spent_s += trial.proposing_seconds + (trial.seconds if spent else 0.0)
        self.done, self.total = self.evaluations, self.allowance
        if known:
            self._marks.clear()
        if known or spent:
            self._mark()
        if trial.is_whole and (self.best is None or self.goal.rank(trial) < self.goal.rank(self.best)):
            self.best = trial

    def _mark(self) -> None:
        self._marks.append((self._clock(), self.done))

    def facts(self) -> list[str]:
        """What is worth showing beside the stage, the most important first."""
        found = []
        if self.best is not None:
            first, *rest = self.goal.describe(self.best)
            found += [f"best {first}", *rest]
        if self.left_s is not None and self.left_s >= 0.5:
            found.append(f"about {duration(self.left_s)} left" + ("" if self.is_measuring else " of this stage"))
        if self.is_measuring and self.speed is not None:
            found.append(f"{significant(self.speed, 2)} evaluations/s")
        if self.workers > 1:
            found.append(f"{self.workers} workers")
        return found


def amount(done: float, total: float | None) -> str:
    """How much of how much, such as `12/40`; shares of evaluations have a decimal."""
    shown = f"{done:.1f}".removesuffix(".0")
    return shown if total is None else f"{shown}/{total:g}"


def duration(seconds: float) -> str:
    """A time as people say it, such as `45 s`, `12 min` or `3 h 20 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
