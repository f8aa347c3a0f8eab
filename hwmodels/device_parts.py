"""What a device is described by: memory levels, peaks, how near kernels come to them, energies, published latencies.

Plain dataclasses, so that importing them is quick; `hwmodels.device` puts them together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from hwmodels.cost import Tier
from hwmodels.quantity import Quantity, Rate, expect, expect_positive, quantities

STRICT = {"extra": "forbid"}  # pydantic: unknown keys are errors
NO_STEP = Quantity(0.0, "s", "the term is left out", "derived")


@dataclass(frozen=True)
class MemoryLevel:
    """A cache, or the main memory.

    Attributes:
        name: Such as `l2` or `dram`.
        bandwidth: Read bandwidth; on CPUs by number of threads.
        capacity: Bytes it holds; None for the main memory, which counts as holding everything.
        private: Whether each thread has one of its own, so that capacities add up.
        energy: Energy of a byte moved; None where the device's `energy.memory` stands for it.
    """

    name: str
    bandwidth: Rate
    capacity: Quantity | None = None
    private: bool = False
    energy: Quantity | None = None
    __pydantic_config__: ClassVar[Any] = STRICT

    def __post_init__(self) -> None:
        expect("bandwidth", "byte/s", *quantities(self.bandwidth))
        expect_positive("bandwidth", *quantities(self.bandwidth))
        if self.capacity is not None:
            expect("capacity", "byte", self.capacity)
        if self.energy is not None:
            expect("energy", "J/byte", self.energy)

    def holds(self, size: float, threads: int) -> bool:
        """Whether `size` bytes fit into what `threads` threads share; never, where its capacity is unknown."""
        return self.capacity is None or size <= self.capacity.number * (threads if self.private else 1)


@dataclass(frozen=True)
class Peak:
    """The peak rate of a compute type, dense: two operations per multiply-accumulate.

    Attributes:
        peak: Operations per second; on CPUs by number of threads.
        sparse: What the maker claims with structured sparsity; kept to show that `peak` is not it.
        macs_per_cycle: Multiply-accumulates of one of the device's `units` in a cycle, to check the peak with.
        clock: The clock the peak holds at, where it is not the device's.
    """

    peak: Rate
    sparse: Quantity | None = None
    macs_per_cycle: Quantity | None = None
    clock: Quantity | None = None
    __pydantic_config__: ClassVar[Any] = STRICT

    def __post_init__(self) -> None:
        expect("peak", "op/s", *quantities(self.peak))
        expect_positive("peak", *quantities(self.peak))
        if self.sparse is not None:
            expect("sparse", "op/s", self.sparse)
            dense = max(quantity.number for quantity in quantities(self.peak))
            if not self.sparse.number > dense:
                raise ValueError(
                    f"peak {dense:.4g} is not below the sparse one, {self.sparse.number:.4g}: give the dense"
                )
        if self.macs_per_cycle is not None:
            expect("macs_per_cycle", "1", self.macs_per_cycle)
        if self.clock is not None:
            expect("clock", "Hz", self.clock)


@dataclass(frozen=True)
class Tile:
    """The granularity of a path's kernels: products are padded to whole multiples.

    Attributes:
        m: Rows (output positions).
        n: Columns (output channels).
        k: Products summed (input channels times kernel).
        source: Where that is stated, or what it was found by.
    """

    m: int = 1
    n: int = 1
    k: int = 1
    source: str = ""
    __pydantic_config__: ClassVar[Any] = STRICT

    def __post_init__(self) -> None:
        if min(self.m, self.n, self.k) < 1:
            raise ValueError(f"tiles are at least 1, got m={self.m}, n={self.n}, k={self.k}")
        if max(self.m, self.n, self.k) > 1 and not self.source.strip():
            raise ValueError("a tile needs a source")


@dataclass(frozen=True)
class Calibration:
    """How near one path's kernels come to the peaks: the four parameters of the calibrated roofline.

    Attributes:
        overhead: Seconds to start one operation (t0).
        compute: Share of the compute peak that is reached (e_c).
        memory: Share of the bandwidth that is reached (e_m).
        sharpness: Exponent (p) that joins both times: 1 adds them up; a large one takes the longer.
        tier: How far a time computed with these can be trusted.
        sigma: Standard deviation of the logarithm of measured over predicted time, common to all operations of the
            path: what is wrong with one is wrong with all.
        tile: Granularity of its kernels.
        data: Digest of the table it was fitted to, `sha256:...`; empty where nothing was fitted.
        samples: Timings it was fitted to.
        holdout_error: Median relative error on sites that were held out; None where nothing was fitted.
        step: Seconds per product summed (s): the accumulations of one output value follow each other, which shows where
            outputs are too few to fill the device.
        splits_sums: Whether the kernels deal long sums out to idle units and gather them: with the best number of parts
            the time then grows as the square root of the products summed, and `step` is per root of one.
        vector_rows: Products of at most so many rows run a kernel for vectors, which takes no steps; 0 for none.
        vector_overhead: Seconds to start that kernel.
    """

    overhead: Quantity
    compute: Quantity
    memory: Quantity
    sharpness: Quantity
    tier: Tier
    sigma: Quantity
    tile: Tile = Tile()
    data: str = ""
    samples: int = 0
    holdout_error: Quantity | None = None
    step: Quantity = NO_STEP
    splits_sums: bool = False
    vector_rows: int = 0
    vector_overhead: Quantity | None = None
    __pydantic_config__: ClassVar[Any] = STRICT

    def __post_init__(self) -> None:
        expect("overhead and step", "s", self.overhead, self.step)
        expect("compute, memory, sharpness and sigma", "1", self.compute, self.memory, self.sharpness, self.sigma)
        expect_positive("compute and memory", self.compute, self.memory)
        if max(self.compute.number, self.memory.number) > 1 or self.sharpness.number < 1:
            raise ValueError("compute and memory must be at most 1, sharpness at least 1")
        if self.tier in ("calibrated", "interpolated", "measured") and not self.data.startswith("sha256:"):
            raise ValueError(f"a {self.tier} path names the digest of its data: data: 'sha256:...'")
        if (self.vector_overhead is None) != (self.vector_rows == 0):
            raise ValueError("vector_rows and vector_overhead are given together")
        if self.vector_overhead is not None:
            expect("vector_overhead", "s", self.vector_overhead)

    def start_s(self, rows: int) -> float:
        """Seconds to start a product of so many rows."""
        is_vector = self.vector_overhead is not None and rows <= self.vector_rows
        return self.vector_overhead.number if is_vector and self.vector_overhead else self.overhead.number

    def steps_s(self, rows: int, summed: int) -> float:
        """Seconds that the steps of summing so many products take."""
        if rows <= self.vector_rows:
            return 0.0
        return self.step.number * (math.sqrt(summed) if self.splits_sums else summed)


@dataclass(frozen=True)
class OperationEnergy:
    """Energy of single operations; `int8` is the anchor that other integer widths are scaled from.

    Attributes:
        idle_power: Power drawn whatever is run; unknown counts as none.
        is_calibrated: Whether power was measured on the device; without, energies are an index for comparing.
    """

    int8_multiply: Quantity
    int8_add: Quantity
    fp32_multiply: Quantity
    fp32_add: Quantity
    fp16_multiply: Quantity
    fp16_add: Quantity
    memory: Quantity
    idle_power: Quantity
    is_calibrated: bool = False
    __pydantic_config__: ClassVar[Any] = STRICT

    def __post_init__(self) -> None:
        operations = (self.int8_multiply, self.int8_add, self.fp32_multiply, self.fp32_add)
        expect("an operation", "J", *operations, self.fp16_multiply, self.fp16_add)
        expect("memory", "J/byte", self.memory)
        expect("idle_power", "W", self.idle_power)

    @property
    def tier(self) -> Tier:
        """How far an energy can be trusted."""
        return "calibrated" if self.is_calibrated else "index"


@dataclass(frozen=True)
class Anchor:
    """A latency that was published for a whole network: what a model of the device can be held against."""

    network: str
    precision: str
    latency: Quantity
    batch: int = 1
    __pydantic_config__: ClassVar[Any] = STRICT

    def __post_init__(self) -> None:
        expect("latency", "s", self.latency)
