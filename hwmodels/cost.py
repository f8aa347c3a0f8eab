"""What a precision costs: plain numbers in SI units, with where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

import numpy as np

from hwmodels.precision import Precision

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
    """

    batch: int = 1
    threads: int = 2

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value < 1:
                raise ValueError(f"workload.{item.name} must be at least 1, got {value}")


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


COSTS: tuple[str, ...] = tuple(item.name for item in fields(Cost))
ADDITIVE_COSTS: tuple[str, ...] = tuple(name for name in COSTS if name != "activation_bytes")


@dataclass(frozen=True)
class LayerCost:
    """The cost of one layer at one precision, and how the device runs it.

    Attributes:
        cost: The numbers.
        compute: Type the multiplications really run in, such as `int8` or `fp32`; empty where nothing is run.
        bound: `compute` or `memory`, whichever the roofline says limits it; empty where not known.
    """

    cost: Cost
    compute: str = ""
    bound: str = ""


@dataclass(frozen=True)
class BoundaryCost:
    """What it costs that one layer leaves a tensor in another format than the next one reads it in.

    Attributes:
        tensor: Name of the tensor that is handed over.
        producer: The layer whose precision says in which format it is left.
        consumer: The layer whose precision says in which format it is read.
        costs: Precisions of producer and consumer to what converting costs; pairs that are left out cost nothing.
    """

    tensor: str
    producer: str
    consumer: str
    costs: Mapping[tuple[Precision, Precision], Cost]

    def cost(self, producer: Precision, consumer: Precision) -> Cost:
        """What one pair of precisions costs."""
        return self.costs.get((producer, consumer), Cost())


@dataclass(frozen=True)
class CostTable:
    """The cost of every precision of every layer, and what does not depend on the policy.

    Attributes:
        layers: Layer name to precision to cost.
        fixed: Cost of everything else: other operations, other parameters, launch overhead.
        tiers: Cost name to tier.
        source: Where the numbers come from, in words.
        boundaries: What is added where the precisions of two layers meet.
    """

    layers: Mapping[str, Mapping[Precision, LayerCost]]
    fixed: Cost
    tiers: Mapping[str, Tier]
    source: str
    boundaries: tuple[BoundaryCost, ...] = ()

    def column(self, cost: str, layer: str, precisions: tuple[Precision, ...]) -> np.ndarray:
        """One cost of one layer for `precisions`, shape `(len(precisions),)`."""
        return np.array([getattr(self.layers[layer][precision].cost, cost) for precision in precisions])


@dataclass(frozen=True)
class CostReport:
    """What a policy costs on a device.

    Attributes:
        total: The network's cost.
        layers: Layer name to cost.
        tiers: Cost name to tier.
        source: Where the numbers come from, in words.
    """

    total: Cost
    layers: Mapping[str, LayerCost] = field(default_factory=dict)
    tiers: Mapping[str, Tier] = field(default_factory=dict)
    source: str = ""
