"""The contract every strategy fulfils."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from search.errors import ConfigError
from search.objective import Objective
from search.space import SearchSpace
from search.trials import Trial


class Strategy(ABC):
    """A search algorithm: proposes policies until it is done or nothing is left to spend.

    Attributes:
        name: What tables and tags call it.
        evaluations: Measurements it may spend.
        seconds: Seconds of measuring and proposing it may spend; None is no limit.
        start_from: What `Objective.starts` gives it to begin with: `solver` for the optima of all predictors, else the
            path of a run directory or of a plan; None is nothing.
        costs: The costs that its front is about beside quality; empty stands for the objective's primary cost.
        finetune_steps: Batches on which every policy is fine-tuned before it is measured; 0 is not at all.
    """

    name: ClassVar[str]
    costs: tuple[str, ...] = ()
    finetune_steps: int = 0

    def __init__(self, evaluations: int = 40, seconds: float | None = None, start_from: str | None = None) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.

        Raises:
            ConfigError: If an allowance is not positive.
        """
        if evaluations < 1:
            raise ConfigError(f"strategy.evaluations={evaluations} must be at least 1")
        if seconds is not None and seconds <= 0:
            raise ConfigError(f"strategy.seconds={seconds} must be above 0, or null for no limit")
        self.evaluations = evaluations
        self.seconds = seconds
        self.start_from = start_from

    @abstractmethod
    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        """Calls `objective` on policies of `space`, on `objective.starts` first; the best one is picked from the log.

        All randomness must come from `rng`, so that one seed gives one sequence of policies.
        """

    def keep(self, folder: Path, objective: Objective, trials: Sequence[Trial]) -> None:  # noqa: B027
        """Writes what the strategy leaves beside the log into the run directory, after the search; nothing by default.

        Args:
            folder: The run directory.
            objective: What was searched.
            trials: Everything tried.
        """
