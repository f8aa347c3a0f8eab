"""A device described by numbers, each with its unit and its source, read from YAML and validated on load.

The records are plain dataclasses, so that importing this module is quick; pydantic and yaml are imported when a file
is read.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from hwmodels.capability import Capability, find_capability
from hwmodels.cost import TIERS, Tier
from hwmodels.precision import Precision
from hwmodels.quantity import SHAKY, Quantity, Rate, expect, expect_positive, quantities, rate_at

FOLDER = Path(__file__).with_name("devices")
DeviceClass = Literal["gpu", "cpu", "npu", "research"]

_STRICT = {"extra": "forbid"}  # pydantic: unknown keys are errors
PEAK_TOLERANCE = 0.1
"""How far a peak may lie from units x multiply-accumulates x 2 x clock: boost clocks differ between documents."""


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
    __pydantic_config__: ClassVar[Any] = _STRICT

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
    __pydantic_config__: ClassVar[Any] = _STRICT

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
    __pydantic_config__: ClassVar[Any] = _STRICT

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
    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        expect("overhead", "s", self.overhead)
        expect("compute, memory, sharpness and sigma", "1", self.compute, self.memory, self.sharpness, self.sigma)
        expect_positive("compute and memory", self.compute, self.memory)
        if max(self.compute.number, self.memory.number) > 1 or self.sharpness.number < 1:
            raise ValueError("compute and memory must be at most 1, sharpness at least 1")
        if self.tier in ("calibrated", "interpolated", "measured") and not self.data.startswith("sha256:"):
            raise ValueError(f"a {self.tier} path names the digest of its data: data: 'sha256:...'")


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
    __pydantic_config__: ClassVar[Any] = _STRICT

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
    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        expect("latency", "s", self.latency)


@dataclass(frozen=True)
class Device:
    """A piece of hardware with the runtime that drives it.

    Attributes:
        id: Short name, the file's.
        name: What people call it.
        description: What it is and what its numbers rest on, in words.
        kind: `gpu`, `cpu`, `npu` or `research`.
        vendor: Who makes it.
        runtime: The runtime whose kernels the capabilities and calibrations are about, with its version.
        clock: Clock frequency while computing.
        units: Number of cores or multiprocessors that the peaks are of.
        memory: Memory levels from the fastest to the main memory.
        capacity: Bytes of the main memory.
        compute: Compute type to dense peak.
        float_compute: Compute type that everything else runs in.
        float_bits: Bits of a value that stays in float, as the runtime holds it.
        calibration: Path to how near its kernels come to the peaks.
        capabilities: What runs how; the first match wins.
        energy: Energy per operation and byte.
        tdp: Power it is sold for.
        launch: Seconds that running a network takes besides its operations.
        anchors: Published latencies of whole networks.
    """

    schema: Literal[2]
    id: str
    name: str
    description: str
    kind: DeviceClass
    vendor: str
    runtime: str
    clock: Quantity
    units: Quantity
    memory: tuple[MemoryLevel, ...]
    capacity: Quantity
    compute: Mapping[str, Peak]
    float_compute: str
    float_bits: int
    calibration: Mapping[str, Calibration]
    capabilities: tuple[Capability, ...]
    energy: OperationEnergy
    tdp: Quantity
    launch: Quantity
    anchors: tuple[Anchor, ...] = ()
    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        expect("clock", "Hz", self.clock)
        expect("units", "1", self.units)
        expect("capacity", "byte", self.capacity)
        expect("tdp", "W", self.tdp)
        expect("launch", "s", self.launch)
        if not self.memory or self.memory[-1].capacity is not None:
            raise ValueError("memory must end with the main memory, a level without capacity")
        if self.float_compute not in self.compute:
            raise ValueError(f"float_compute is {self.float_compute!r}; compute has {listed(self.compute)}")
        for name, peak in self.compute.items():
            self._check_peak(name, peak)
        for capability in self.capabilities:
            for key, known in (("compute", self.compute), ("path", self.calibration)):
                given = getattr(capability, key)
                if given and given not in known:
                    where = "compute" if key == "compute" else "calibration"
                    raise ValueError(
                        f"capabilities: no {key} {given!r}{closest(given, known)}; {where} has {listed(known)}"
                    )
        if self.float_compute not in self.calibration:
            raise ValueError(f"calibration needs {self.float_compute}, which the operations between the layers run in")
        rates = [peak.peak for peak in self.compute.values()] + [level.bandwidth for level in self.memory]
        counts = {tuple(sorted(rate)) if isinstance(rate, Mapping) else () for rate in rates}
        if len(counts) != 1:
            raise ValueError("every peak and every bandwidth must be given for the same numbers of threads")

    def _check_peak(self, name: str, peak: Peak) -> None:
        """Holds a peak against units x multiply-accumulates per cycle x 2 x clock."""
        if peak.macs_per_cycle is None:
            return
        given = max(quantity.number for quantity in quantities(peak.peak))
        clock = (peak.clock or self.clock).number
        expected = self.units.number * peak.macs_per_cycle.number * 2 * clock
        ratio = given / expected
        if math.isnan(ratio) or abs(ratio - 1) <= PEAK_TOLERANCE:
            return
        hint = "; twice as much: is it the peak with sparsity?" if abs(ratio / 2 - 1) <= PEAK_TOLERANCE else ""
        raise ValueError(
            f"compute.{name}: {given:.4g} op/s, but {self.units.number:g} units x {peak.macs_per_cycle.number:g} "
            f"multiply-accumulates x 2 x {clock:.4g} Hz are {expected:.4g}{hint}"
        )

    @property
    def threads(self) -> tuple[int, ...]:
        """Numbers of threads that the device has figures for; none where it has no threads to choose."""
        bandwidth = self.memory[-1].bandwidth
        return tuple(sorted(bandwidth)) if isinstance(bandwidth, Mapping) else ()

    def check_threads(self, threads: int) -> None:
        """Raises ValueError unless the device has figures for that many threads, or has none to choose."""
        if self.threads and not self.threads[0] <= threads <= self.threads[-1]:
            raise ValueError(
                f"device {self.id} has figures for {self.threads[0]} to {self.threads[-1]} threads, "
                f"got workload.threads={threads}"
            )

    @property
    def tier(self) -> Tier:
        """How far its latencies can be trusted: the worst of its paths."""
        return worst_tier(one.tier for one in self.calibration.values())

    @property
    def knows_time(self) -> bool:
        """Whether it has the numbers that a latency takes."""
        peak = self.compute[self.float_compute].peak
        rates = (*quantities(peak), *quantities(self.memory[-1].bandwidth))
        return all(quantity.is_known for quantity in rates)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user must know before believing its numbers."""
        if not self.knows_time:
            return (f"{self.id}: bandwidth or peak is not known, so latencies are not either; judge by bytes",)
        if self.tier != "datasheet" or self.kind == "research":
            return ()
        return (
            f"{self.id} is known by its datasheet alone: a roofline of peaks tells the faster of two precisions hardly "
            "better than chance. Calibrate it with `bitplan profile --fit` on the device, or judge by bytes",
        )

    def capability(self, kind: str, precision: Precision, is_depthwise: bool = False) -> Capability:
        """Finds how a layer of this kind runs at this precision.

        Raises:
            ValueError: If nothing in the device's list matches.
        """
        found = find_capability(self.capabilities, kind, precision, is_depthwise)
        if found is None:
            raise ValueError(f"device {self.id} has no capability for {kind} at {precision}; add one to its file")
        return found

    def peak(self, compute: str, threads: int) -> float:
        """Dense operations per second of a compute type."""
        return rate_at(self.compute[compute].peak, threads)

    def level(self, size: float, threads: int) -> MemoryLevel:
        """The fastest memory level that holds `size` bytes."""
        return next(level for level in self.memory if level.holds(size, threads))

    def leaves(self) -> Iterator[tuple[str, Quantity]]:
        """Yields every number with its place, such as `compute.int8.peak`."""
        for item in fields(self):
            yield from _leaves(item.name, getattr(self, item.name))

    @property
    def shaky(self) -> tuple[str, ...]:
        """Places of the numbers that rest on secondary sources, memory or assumption."""
        return tuple(place for place, quantity in self.leaves() if quantity.confidence in SHAKY)


def _leaves(place: str, value: object) -> Iterator[tuple[str, Quantity]]:
    if isinstance(value, Quantity):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{place}.{key}", item)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from _leaves(f"{place}.{getattr(item, 'name', number)}", item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _leaves(f"{place}.{field.name}", getattr(value, field.name))


def list_devices() -> tuple[str, ...]:
    """Names of the devices that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_device(name: str | Path) -> Device:
    """Loads a device by its name, or from a YAML file of the same schema.

    Args:
        name: One of `list_devices()`, or a path that ends in `.yaml` or `.yml`.

    Raises:
        ValueError: If there is no such device or file, or the file is not valid; the message names the key.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in list_devices():
            known = list_devices()
            raise ValueError(
                f"no device {str(name)!r}{closest(str(name), known)}; known devices: {listed(known)}; "
                "a path that ends in .yaml loads your own"
            )
        path = FOLDER / f"{name}.yaml"
        return _shipped(path)
    return parse_device(read_yaml(path), path)


@lru_cache(maxsize=64)
def _shipped(path: Path) -> Device:
    return parse_device(read_yaml(path), path)


def read_yaml(path: Path) -> Any:
    """Parses a YAML file in which no mapping has a key twice.

    Raises:
        ValueError: If it cannot be read, is not YAML, or has a key twice.
    """
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        """Refuses what yaml would otherwise overwrite silently."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *name`: what it brings may be overridden
                    continue
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise ValueError(f"{path}: line {key_node.start_mark.line + 1}: key {key!r} occurs twice")
                seen.add(key)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"cannot read device file {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def parse_device(content: Any, path: Path) -> Device:
    """Turns parsed YAML into a device; `path` is for messages.

    Raises:
        ValueError: If it is not valid; the message names the key.
    """
    import pydantic

    try:
        return pydantic.TypeAdapter(Device).validate_python(content)
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'device'}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{path} is not a valid device: {problems}") from error


def listed(names: Iterable[object]) -> str:
    """Names as words of a message."""
    return ", ".join(map(str, names))


def closest(name: object, known: Iterable[object]) -> str:
    """A suggestion for a name that is not known, empty where nothing comes near."""
    found = difflib.get_close_matches(str(name), map(str, known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def worst_tier(tiers: Iterable[Tier]) -> Tier:
    """The least trustworthy of `tiers`."""
    return max(tiers, key=TIERS.index)
