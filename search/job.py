"""What a search is given, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hwmodels import CostModel, Workload
from search.budget import Budget
from search.errors import ConfigError, closest
from search.plan import Plan
from search.quantize.simulate import QuantizerSettings
from search.rundir import RunDirectory
from search.strategies.base import Strategy
from search.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd

Settings = TypeVar("Settings")


def settings(kind: type[Settings], given: Mapping[str, Any], key: str) -> Settings:
    """Builds a settings record from plain values.

    Args:
        kind: A dataclass, such as `Budget`.
        given: Its values by name.
        key: The config group, for messages.

    Raises:
        ConfigError: If a name is unknown or a value is not allowed.
    """
    allowed = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for name in given:
        if name not in allowed:
            raise ConfigError(f"{key}.{name} is no setting{closest(name, allowed)}; allowed: {', '.join(allowed)}")
    try:
        return kind(**given)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@dataclass(frozen=True)
class SpaceSettings:
    """The search space before it meets a network.

    Attributes:
        weight: Weight formats each layer may take.
        input: Input formats each tensor may take.
        pins: Layer name, glob pattern, `first` or `last`, to the precision that is fixed.
        ties: Lists of layer names or patterns that share a precision.
    """

    weight: list[str] = field(default_factory=lambda: ["int2", "int3", "int4", "int5", "int6", "int8"])
    input: list[str] = field(default_factory=lambda: ["uint4", "uint6", "uint8"])
    pins: dict[str, str] | None = None
    ties: list[list[str]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pins or {}, Mapping):
            raise ConfigError(f"space.pins={self.pins} must map layers to precisions, such as {{first: int8}}")
        if not isinstance(self.ties or [], list) or not all(isinstance(tie, list) for tie in self.ties or []):
            raise ConfigError(f"space.ties={self.ties} must be a list of lists of layers, such as [[conv1, conv2]]")


@dataclass(frozen=True)
class Job:
    """Everything one search needs.

    Attributes:
        task: Model, data and metric.
        cost_model: The hardware target.
        strategy: The search algorithm.
        budget: What the plan may cost.
        run_dir: Where the run's files go.
        space: The formats to choose from, pins and ties.
        quantizer: How ranges are chosen.
        workload: What the cost model prices.
        recover: Names of the repairs applied to the winner, in order.
        seed: Seed of the strategy.
        config: The settings as the user gave them, for the record and for telling whether a run may be resumed.
    """

    task: Task
    cost_model: CostModel
    strategy: Strategy
    budget: Budget
    run_dir: Path
    space: SpaceSettings = field(default_factory=SpaceSettings)
    quantizer: QuantizerSettings = field(default_factory=QuantizerSettings)
    workload: Workload = field(default_factory=Workload)
    recover: tuple[str, ...] = ()
    seed: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        plan: The winner.
        front: The rows of front.csv.
        run: The run directory.
    """

    plan: Plan
    front: pd.DataFrame
    run: RunDirectory
