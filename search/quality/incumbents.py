"""The policies that new ones race against, and their scores sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from search.files import replacing
from search.policy import Policy


@dataclass(frozen=True)
class Incumbent:
    """A policy measured in full that no other one beats.

    Attributes:
        policy: The policy.
        cost: Its primary cost.
        drop: Its drop of quality.
    """

    policy: Policy
    cost: float
    drop: float


class Incumbents:
    """Those measured policies that no other is at least as good as in cost and drop, one score per sample each.

    Scores are kept on disk, too, so that an interrupted search goes on without measuring incumbents again.
    """

    def __init__(self, measure: Callable[[Policy], np.ndarray], directory: Path | None = None) -> None:
        """Creates an empty set.

        Args:
            measure: Returns the scores of a policy, shape `(samples,)`; called where they are not on disk.
            directory: Folder of the files; None keeps them in memory only.
        """
        self._measure = measure
        self._directory = directory
        self._front: list[Incumbent] = []
        self._scores: dict[Policy, np.ndarray] = {}

    def add(self, policy: Policy, cost: float, drop: float, scores: np.ndarray | None = None) -> None:
        """Adds a policy unless one that is there is at least as good, and drops those it is at least as good as.

        Args:
            policy: The policy.
            cost: Its primary cost.
            drop: Its drop of quality.
            scores: Its scores, shape `(samples,)`; None where they must be looked up when first needed.
        """
        if any(other.cost <= cost and other.drop <= drop for other in self._front):
            return
        beaten = [other for other in self._front if cost <= other.cost and drop <= other.drop]
        self._front = [other for other in self._front if other not in beaten] + [Incumbent(policy, cost, drop)]
        for other in beaten:
            self._scores.pop(other.policy, None)
            if self._directory:
                self._file(self._directory, other.policy).unlink(missing_ok=True)
        if scores is not None:
            self._keep(policy, scores)

    def scores(self, cost: float) -> list[np.ndarray]:
        """Scores of every incumbent that costs no more than `cost`, those of the least drop first."""
        return [self._scores_of(policy) for policy in self.rivals(cost)]

    def rivals(self, cost: float) -> list[Policy]:
        """Every incumbent that costs no more than `cost`, those of the least drop first."""
        rivals = (other for other in self._front if other.cost <= cost)
        return [other.policy for other in sorted(rivals, key=lambda other: other.drop)]

    def _scores_of(self, policy: Policy) -> np.ndarray:
        if policy not in self._scores:
            file = self._file(self._directory, policy) if self._directory else None
            if file and file.is_file():
                self._scores[policy] = np.load(file)
            else:
                self._keep(policy, self._measure(policy))
        return self._scores[policy]

    def _keep(self, policy: Policy, scores: np.ndarray) -> None:
        self._scores[policy] = scores
        if self._directory:
            with replacing(self._file(self._directory, policy)) as aside, aside.open("wb") as file:
                np.save(file, scores)

    @staticmethod
    def _file(directory: Path, policy: Policy) -> Path:
        return directory / f"{policy.digest}.npy"
