"""What a search is given, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hwmodels import CostModel, Precision, Workload
from search.backends import backend
from search.backends.base import KEEPS
from search.budget import Budget
from search.errors import ConfigError, closest
from search.plan import Plan
from search.quality.racing import Racing
from search.quantize.settings import QuantizerSettings
from search.recover import parse_steps
from search.rundir import RunDirectory
from search.sensitivity.settings import SensitivitySettings
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
        ties: Lists of layer names or patterns that share a precision; `auto` ties layers of one kind that read the
            same tensor, such as the projections to queries, keys and values.
    """

    weight: list[str] = field(default_factory=lambda: ["int2", "int3", "int4", "int5", "int6", "int8"])
    input: list[str] = field(default_factory=lambda: ["uint4", "uint6", "uint8"])
    pins: dict[str, str] | None = None
    ties: list[list[str]] | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pins or {}, Mapping):
            raise ConfigError(f"space.pins={self.pins} must map layers to precisions, such as {{first: int8}}")
        is_list = isinstance(self.ties, list) and all(isinstance(tie, list) for tie in self.ties)
        if not (is_list or self.ties in (None, "auto")):
            raise ConfigError(
                f"space.ties={self.ties} must be auto, or a list of lists of layers, such as [[conv1, conv2]]"
            )


@dataclass(frozen=True)
class RecoverSettings:
    """Which repairs are applied, and when.

    Attributes:
        before: Repairs of the network before the search, in order; a name, or a mapping from the name to its options.
        steps: Repairs of the winner, likewise.
        at: Precision that the repairs before the search repair for, such as `int4/uint8`; null takes the middle format
            of every choice.
    """

    before: list[Any] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)
    at: str | None = None

    def __post_init__(self) -> None:
        parse_steps(self.before, "recover.before")
        parse_steps(self.steps, "recover.steps")
        try:
            Precision.parse(self.at or "float")
        except ValueError as error:
            raise ConfigError(f"recover.at: {error}") from error


@dataclass(frozen=True)
class ExportSettings:
    """What the plan is for: the backends that it is written for when the search ends.

    The search then keeps to what all of them can run: layers that one of them fuses are tied, and candidates that it
    does not store as planned are dropped.

    Attributes:
        backends: Names of backends.
        keep: Which candidates stay: `exact` what a backend stores as planned; `contained` also what it stores in a
            wider type, so that the files are larger than the plan says; `any` everything, ties alone hold.
        recalibrate: Whether the backends find ranges of their own in place of the plan's.
    """

    backends: list[str] = field(default_factory=list)
    keep: str = "exact"
    recalibrate: bool = False

    def __post_init__(self) -> None:
        for name in self.backends:
            backend(name, "plan")
        if self.keep not in KEEPS:
            raise ConfigError(
                f"export.keep={self.keep} is unknown{closest(self.keep, KEEPS)}; allowed: {', '.join(KEEPS)}"
            )


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
        sensitivity: What is scored before policies are measured.
        workload: What the cost model prices.
        racing: How policies are raced against better ones; None where all are measured in full.
        recover: The repairs.
        export: What the plan is for.
        seed: Seed of the strategy.
        workers: Processes of this machine that measure, this one included; they change no result.
        study: Path of a journal file, or URL of a database, through which workers of other machines join; None lets
            those join that see the run directory.
        store: Folder of what is kept for all runs: sensitivity tables in `scores`, what policies scored in
            `evaluations`; None keeps each in its own run alone.
        config: The settings as the user gave them, for the record and for telling whether a run may be resumed.
    """

    task: Task
    cost_model: CostModel
    strategy: Strategy
    budget: Budget
    run_dir: Path
    space: SpaceSettings = field(default_factory=SpaceSettings)
    quantizer: QuantizerSettings = field(default_factory=lambda: QuantizerSettings(repair="auto"))
    sensitivity: SensitivitySettings = field(default_factory=SensitivitySettings)
    workload: Workload = field(default_factory=Workload)
    racing: Racing | None = None
    recover: RecoverSettings = field(default_factory=RecoverSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    seed: int = 0
    workers: int = 1
    study: str | None = None
    store: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.study == "":
            raise ConfigError("study= is empty; give the path of a journal file or the URL of a database, or null")
        if self.workers < 1:
            raise ConfigError(f"workers={self.workers} must be at least 1: the process that searches measures, too")


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
