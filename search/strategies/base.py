"""The contract every strategy fulfils."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, ParamSpec

import numpy as np

from search.errors import ConfigError, closest
from search.objective import Objective
from search.space import SearchSpace
from search.trials import Trial

SOLVER = "solver"
"""What `start_from` calls the optima of all predictors."""

Given = ParamSpec("Given")


def checks_types(constructor: Callable[Given, None]) -> Callable[Given, None]:
    """Makes a strategy's constructor refuse settings that are not of the types it declares.

    Numbers, truth values, text and lists of numbers are looked at; a whole number is a number, and nothing else is
    converted. What is declared as anything else is the constructor's to check.
    """
    signature = inspect.signature(constructor)
    declared = {
        name: kind if isinstance(kind, str) else inspect.formatannotation(kind)
        for name, kind in ((item.name, item.annotation) for item in signature.parameters.values())
    }

    @wraps(constructor)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> None:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            kind, _, other = declared[name].partition(" | ")
            if kind not in TYPES or (value is None and other == "None"):
                continue
            words, holds = TYPES[kind]
            if not holds(value):
                null = ", or null" if other == "None" else ""
                raise ConfigError(f"strategy.{name}={value} must be {words}{null}")
        constructor(*args, **kwargs)

    return checked


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and not math.isnan(value)


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _is_list(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(holds, value))


TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", _is_whole),
    "float": ("a number", _is_number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, (str, PathLike))),
    "Sequence[int]": ("a list of whole numbers", lambda value: _is_list(value, _is_whole)),
    "Sequence[float]": ("a list of numbers", lambda value: _is_list(value, _is_number)),
}
"""A declared type to what messages call it, and what tells whether a value is of it."""


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

    @checks_types
    def __init__(self, evaluations: int = 40, seconds: float | None = None, start_from: str | None = None) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.

        Raises:
            ConfigError: If an allowance is not positive, or a value of the wrong type.
        """
        if evaluations < 1:
            raise ConfigError(f"strategy.evaluations={evaluations} must be at least 1")
        if seconds is not None and seconds <= 0:
            raise ConfigError(f"strategy.seconds={seconds} must be above 0, or null for no limit")
        self.evaluations = evaluations
        self.seconds = seconds
        self.start_from = start_from

    @property
    def proposes_one(self) -> bool:
        """Whether it awaits what came of every policy before it proposes the next, so that others cannot help much."""
        return False

    def check_sources(self) -> None:
        """Looks whether what it goes on from exists, before anything is computed.

        Raises:
            ConfigError: If it does not.
        """
        if self.start_from not in (None, SOLVER) and not Path(self.start_from).exists():
            near = closest(str(self.start_from), [SOLVER])
            raise ConfigError(
                f"strategy.start_from={self.start_from} does not exist{near}; give solver, a run directory or a "
                "plan.json"
            )

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
