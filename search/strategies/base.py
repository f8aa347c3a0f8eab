"""The contract every strategy fulfils."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from search.errors import ConfigError
from search.objective import Objective
from search.space import SearchSpace


class Strategy(ABC):
    """A search algorithm: proposes policies until it is done or nothing is left to spend.

    Attributes:
        name: What tables and tags call it.
        evaluations: Measurements it may spend.
        seconds: Seconds of measuring it may spend; None is no limit.
    """

    name: ClassVar[str]

    def __init__(self, evaluations: int = 40, seconds: float | None = None) -> None:
        """Creates the strategy.

        Raises:
            ConfigError: If an allowance is not positive.
        """
        if evaluations < 1:
            raise ConfigError(f"strategy.evaluations={evaluations} must be at least 1")
        if seconds is not None and seconds <= 0:
            raise ConfigError(f"strategy.seconds={seconds} must be above 0, or null for no limit")
        self.evaluations = evaluations
        self.seconds = seconds

    @abstractmethod
    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        """Calls `objective` on policies of `space`; the best one is picked from the log.

        All randomness must come from `rng`, so that one seed gives one sequence of policies.
        """
