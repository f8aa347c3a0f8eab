"""Racing: a policy that is surely worse than one that costs no more is not measured to the end.

A policy is measured on nested subsets of a split, in one random order. Incumbents were measured in full, so that after
each subset every score has its counterpart: the differences, sample by sample, say far sooner than two separate means
which policy is better. Bounds hold at every look at once (`search.quality.sequential`). Dropping candidates once they
are surely worse is due to Maron and Moore, "Hoeffding Races" (NIPS 1993).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from search.errors import ConfigError, DataError
from search.quality.interval import shift_of_drop, worse_by
from search.quality.sequential import betting_capital, combined_capital, mean_interval, normal_capital
from search.quality.subsets import ShuffledSplit
from search.tasks.task import Task


@dataclass(frozen=True)
class Racing:
    """How races are run.

    The promise is about one race: a policy that is not worse by more than the tolerance than any of its incumbents is
    stopped with at most the probability `1 - confidence` over the random order, if neither it nor they were chosen with
    knowledge of that order. In a search they were, a little: through what earlier races stopped.

    Attributes:
        tolerance: How much worse than an incumbent a policy must surely be, in the metric's units, at least 0.
        confidence: Probability with which "surely" is right, in (0, 1).
        first: Samples of the first subset.
        growth: Each subset is so many times as large as the one before.
        seed: Seed of the order of the samples.
    """

    tolerance: float = 0.0
    confidence: float = 0.95
    first: int = 32
    growth: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < math.inf:
            raise ConfigError(f"racing.tolerance={self.tolerance} must be at least 0, in the metric's units")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"racing.confidence={self.confidence} must be between 0 and 1, such as 0.95")
        if self.first < 1:
            raise ConfigError(f"racing.first={self.first} must be at least 1 sample")
        if not 1 < self.growth < math.inf:
            raise ConfigError(f"racing.growth={self.growth} must be above 1, such as 2")

    def looks(self, samples: int, units: int) -> list[int]:
        """Returns how many units each subset has with those before it: rising, the last one is all.

        Args:
            samples: Scores of the whole split.
            units: What is dealt out at once: as many, or fewer where some stay together.
        """
        size, ends = self.first * units / samples, []
        while (end := math.ceil(size)) < units:
            ends.append(end)
            size = max(end + 1, end * self.growth)
        return [*ends, units]


@dataclass(frozen=True)
class Track:
    """What all races on a split have in common.

    Attributes:
        task: The task.
        split: The split in random order.
        racing: The settings.
        reference: Scores of the float network on the whole split in its own order.
    """

    task: Task
    split: ShuffledSplit
    racing: Racing
    reference: np.ndarray

    def is_lost(self, scores: np.ndarray, incumbents: Sequence[np.ndarray]) -> bool:
        """Whether what was seen of a policy shows that it is worse than an incumbent by more than the tolerance.

        The stakes against all incumbents are averaged, the best one's weighted most: half, a quarter, and so on.

        Args:
            scores: The policy's, those dealt so far in random order.
            incumbents: Scores of the whole split in its own order, best incumbent first.

        Raises:
            DataError: If a score is out of bounds.
        """
        if not incumbents or not np.isfinite(scores).all():
            return False
        self._check(scores)
        seen = self.split.order[: len(scores)]
        worse = self.split.unit_values(np.stack([worse_by(self.task, scores, other[seen]) for other in incumbents]))
        tolerated = np.array([[shift_of_drop(self.task, other, self.racing.tolerance)] for other in incumbents])
        population, bounds = len(self.split.starts), self._difference_bounds
        if bounds:
            capitals = betting_capital(worse, population, tolerated, *bounds)
        else:
            capitals = normal_capital(worse, population, tolerated)
        weights = 0.5 ** np.arange(len(incumbents))
        stakes = combined_capital(capitals[:, -1:], weights / weights.sum())
        return bool(stakes[-1] >= -math.log(1 - self.racing.confidence))

    def shifts(self, scores: np.ndarray) -> tuple[float, float]:
        """The 95% interval, valid whenever a race ends, of how much worse than the float network's the mean score is.

        Args:
            scores: The policy's, those dealt so far in random order; the interval is for the whole split.
        """
        reference = self.reference[self.split.order[: len(scores)]]
        worse = self.split.unit_values(worse_by(self.task, scores, reference))
        return mean_interval(worse, len(self.split.starts), 0.05, self._difference_bounds)

    @cached_property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the most a score can be: 0 and 1 for an accuracy, and where the float network has no others."""
        return (0.0, 1.0) if self.task.metric == "accuracy" or np.isin(self.reference, (0, 1)).all() else None

    @cached_property
    def _difference_bounds(self) -> tuple[float, float] | None:
        if self.bounds is None:
            return None
        most = (self.bounds[1] - self.bounds[0]) * self.split.largest_unit
        return -most, most

    def _check(self, scores: np.ndarray) -> None:
        if self.bounds and not (self.bounds[0] <= scores.min() and scores.max() <= self.bounds[1]):
            outside = scores.min() if scores.min() < self.bounds[0] else scores.max()
            raise DataError(
                f"task {self.task.name} gives a score of {outside:g}; an accuracy, and scores that are 0 or 1 for "
                "the float network, must lie within [0, 1] to be raced; scale them, or turn racing off"
            )
