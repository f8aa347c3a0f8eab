"""What a precision costs: plain numbers in SI units, with where they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np

from hwmodels.precision import Format, Precision

Tier = Literal["exact", "measured", "interpolated", "calibrated", "datasheet", "index"]
"""How far a number can be trusted, best first: counted; timed on the device; between timings; a fitted formula; a
formula on published peaks; good for comparing only."""

TIERS: tuple[Tier, ...] = get_args(Tier)


@dataclass(frozen=True)
class Workload:
    """What the network is asked to do at once.

    Attributes:
        batch: Samples per forward pass.
        threads: Worker threads, on CPUs.
        tokens: Tokens per sample and forward pass, for networks that read token ids; None for as many as the example
            input has. 1 is a step of generation.
        context: Tokens that attention looks back on, themselves included, for such networks; None for `tokens`.
        cache_format: Format that keys and values of earlier tokens are kept in.
    """

    batch: int = 1
    threads: int = 2
    tokens: int | None = None
    context: int | None = None
    cache_format: str = "fp16"

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "tokens", "context"):
            value = getattr(self, name)
            if value is None and name in ("tokens", "context"):
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"workload.{name} must be a whole number of at least 1, got {value!r}")
            if value < 1:
                raise ValueError(f"workload.{name} must be at least 1, got {value}")
        try:
            Format.parse(self.cache_format)
        except ValueError as error:
            raise ValueError(f"workload.cache_format: {error}") from error


@dataclass(frozen=True)
class Cost:
    """Costs of one layer or network for one forward pass; costs add.

    Attributes:
        latency_s: Seconds; NaN where the cost model knows no time.
        energy_j: Joules; NaN where the cost model knows no energy.
        weight_bytes: Stored parameters with scales and zero points.
        activation_bytes: Bytes of the tensors read, at the width they are stored. A network's is its peak.
        bit_ops: Multiply-accumulates times weight bits times input bits.
    """

    latency_s: float = 0.0
    energy_j: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    bit_ops: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in COSTS))


NOTHING = Cost()
COSTS: tuple[str, ...] = tuple(item.name for item in fields(Cost))
ADDITIVE_COSTS: tuple[str, ...] = tuple(name for name in COSTS if name != "activation_bytes")

Bound = Literal["", "compute", "memory", "overhead"]
"""What an operation's time is mostly spent on; empty where not known."""


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer at one precision, and how the device runs it.

    Attributes:
        cost: The numbers.
        compute: Type the multiplications really run in, such as `int8` or `fp32`; empty where nothing is run.
        bound: `compute`, `memory` or `overhead`, whichever takes longest; empty where not known.
        path: What its latency shares its error with: the calibration it was computed by, or a table's device.
        tier: How far the latency can be trusted; empty where there is none.
        support: How well the device runs it: `native`, `storage` or `fallback`; empty where not known.
    """

    cost: Cost
    compute: str = ""
    bound: Bound = ""
    path: str = ""
    tier: Tier | Literal[""] = ""
    support: str = ""


class LayerCosts(Mapping[Precision, LayerCost]):
    """The cost of every precision of one layer, kept as columns: tables of thousands of entries are cheap to make.

    Attributes:
        precisions: The precisions, one per row.
        numbers: Costs in the order of `COSTS`, shape `(precisions, costs)`.
        runs: How the device runs each row: the fields of `LayerCost` after `cost`.
    """

    def __init__(
        self, precisions: Sequence[Precision], numbers: np.ndarray, runs: Sequence[tuple[Any, ...]] = ()
    ) -> None:
        """Creates the costs of a layer.

        Args:
            precisions: The precisions.
            numbers: Costs in the order of `COSTS`, shape `(precisions, costs)`.
            runs: For each precision the fields of `LayerCost` after `cost`; empty where nothing is known of them.
        """
        self.precisions = tuple(precisions)
        self.numbers = numbers
        self.runs = tuple(runs) or ((),) * len(self.precisions)

    @classmethod
    def of(cls, row: Mapping[Precision, LayerCost]) -> LayerCosts:
        """The costs of a layer from a plain mapping."""
        if isinstance(row, LayerCosts):
            return row
        numbers = [[getattr(priced.cost, name) for name in COSTS] for priced in row.values()]
        runs = [(one.compute, one.bound, one.path, one.tier, one.support) for one in row.values()]
        return cls(tuple(row), np.array(numbers, dtype=np.float64).reshape(len(row), len(COSTS)), runs)

    @cached_property
    def _rows(self) -> dict[Precision, int]:
        return {precision: row for row, precision in enumerate(self.precisions)}

    def __getitem__(self, precision: Precision) -> LayerCost:
        row = self._rows[precision]
        return LayerCost(Cost(*self.numbers[row].tolist()), *self.runs[row])

    def __eq__(self, other: object) -> bool:
        """Whether all rows are the same; what is unknown is the same as what is unknown."""
        if not isinstance(other, LayerCosts):
            return NotImplemented
        same = self.precisions == other.precisions and self.runs == other.runs
        return same and np.array_equal(self.numbers, other.numbers, equal_nan=True)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"LayerCosts({dict(self)})"

    def __iter__(self) -> Iterator[Precision]:
        return iter(self.precisions)

    def __len__(self) -> int:
        return len(self.precisions)

    def column(self, cost: str, precisions: Sequence[Precision]) -> np.ndarray:
        """One cost for `precisions`, shape `(len(precisions),)`."""
        number = COSTS.index(cost)
        if len(precisions) == len(self.precisions) and tuple(precisions) == self.precisions:
            found: np.ndarray = self.numbers[:, number].copy()
        else:
            found = self.numbers[[self._rows[precision] for precision in precisions], number]
        return found


@dataclass(frozen=True)
class BoundaryCost:
    """What it costs that one layer leaves a tensor in another format than the next one reads it in.

    Precisions are told apart only by the labels they are given on either side, so that the cost of thousands of pairs
    is a handful of numbers.

    Attributes:
        tensor: Name of the tensor that is handed over.
        producer: The layer whose precision says in which format it is left.
        consumer: The layer whose precision says in which format it is read.
        produced: The producer's precisions to labels.
        read: The consumer's precisions to labels.
        costs: Labels of producer and consumer to what converting costs; pairs that are left out cost nothing.
        path: What its latency shares its error with.
    """

    tensor: str
    producer: str
    consumer: str
    produced: Mapping[Precision, str]
    read: Mapping[Precision, str]
    costs: Mapping[tuple[str, str], Cost]
    path: str = ""

    def cost(self, producer: Precision, consumer: Precision) -> Cost:
        """What one pair of precisions costs."""
        labels = self.produced.get(producer, ""), self.read.get(consumer, "")
        return self.costs.get(labels, NOTHING)


@dataclass(frozen=True)
class CostTable:
    """The cost of every precision of every layer, and what does not depend on the policy.

    Attributes:
        layers: Layer name to the cost of each of its precisions; plain mappings become `LayerCosts`.
        fixed: Cost of everything else: other operations, other parameters, launch overhead.
        tiers: Cost name to tier.
        source: Where the numbers come from, in words.
        boundaries: What is added where the precisions of two layers meet.
        sigmas: Path to the standard deviation of the logarithm of its latencies' common error.
        fixed_path: What the fixed latency shares its error with.
        warnings: What a user must know before believing the numbers.
    """

    layers: Mapping[str, LayerCosts]
    fixed: Cost
    tiers: Mapping[str, Tier]
    source: str
    boundaries: tuple[BoundaryCost, ...] = ()
    sigmas: Mapping[str, float] = field(default_factory=dict)
    fixed_path: str = ""
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", {name: LayerCosts.of(row) for name, row in self.layers.items()})

    def column(self, cost: str, layer: str, precisions: tuple[Precision, ...]) -> np.ndarray:
        """One cost of one layer for `precisions`, shape `(len(precisions),)`."""
        return self.layers[layer].column(cost, precisions)


@dataclass(frozen=True)
class CostReport:
    """What a policy costs on a device.

    Attributes:
        total: The network's cost.
        layers: Layer name to cost.
        tiers: Cost name to tier.
        source: Where the numbers come from, in words.
        path_seconds: Path to the part of the latency that shares its error; they add up to the latency.
        sigmas: Path to the standard deviation of the logarithm of that error.
        warnings: What a user must know before believing the numbers.
        cache_bytes: What keys and values of the workload's context take, where the network reads tokens.
    """

    total: Cost
    layers: Mapping[str, LayerCost] = field(default_factory=dict)
    tiers: Mapping[str, Tier] = field(default_factory=dict)
    source: str = ""
    path_seconds: Mapping[str, float] = field(default_factory=dict)
    sigmas: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    cache_bytes: float = 0.0

    @property
    def memory_bytes(self) -> float:
        """Bytes that running takes: weights, activations at their peak, kept keys and values."""
        return self.total.weight_bytes + self.total.activation_bytes + self.cache_bytes

    @property
    def interval(self) -> tuple[float, float]:
        """Seconds between which the latency lies with a probability of 80%; see `hwmodels.compare`.

        Raises:
            ValueError: If the latency or its error is not known.
        """
        from hwmodels.compare import latency_interval

        return latency_interval(self)

    def probability_faster(self, other: CostReport) -> float:
        """The probability that this takes less time than `other`; see `hwmodels.compare`.

        Raises:
            ValueError: If a latency or the error of what they differ in is not known.
        """
        from hwmodels.compare import probability_faster

        return probability_faster(self, other)
