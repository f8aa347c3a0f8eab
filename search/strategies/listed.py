"""Measures policies that somebody else proposed, in order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from search.objective import Objective
from search.policy import Policy
from search.space import SearchSpace
from search.strategies.base import Strategy


class Listed(Strategy):
    """A given list of policies."""

    name = "listed"

    def __init__(
        self,
        policies: Sequence[Policy],
        evaluations: int = 40,
        seconds: float | None = None,
        start_from: str | None = None,
    ) -> None:
        """Creates the strategy.

        Args:
            policies: What is measured, in order.
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, measured before the list.
        """
        super().__init__(evaluations, seconds, start_from)
        self._policies = tuple(policies)

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        for policy in objective.ahead(dict.fromkeys((*objective.starts, *self._policies)), lambda policy: policy):
            objective.predict(policy)  # so that its trial says what was forecast
            objective(policy)
