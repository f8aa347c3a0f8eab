"""A device described by numbers, each with its unit and its source, read from YAML and validated on load.

The records are plain dataclasses, so that importing this module is quick; pydantic and yaml are imported when a file
is read.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from hwmodels.capability import ANY, Capability, find_capability
from hwmodels.cost import TIERS, Tier
from hwmodels.device_file import FOLDER, closest, list_devices, listed, read_yaml
from hwmodels.device_parts import STRICT, Anchor, Calibration, MemoryLevel, OperationEnergy, Peak, Tile
from hwmodels.precision import Precision
from hwmodels.quantity import SHAKY, Quantity, expect, quantities, rate_at

__all__ = [
    "FOLDER",
    "Anchor",
    "Calibration",
    "Device",
    "DeviceClass",
    "MemoryLevel",
    "OperationEnergy",
    "Peak",
    "Tile",
    "closest",
    "list_devices",
    "listed",
    "load_device",
    "parse_device",
    "read_yaml",
    "worst_tier",
]

DeviceClass = Literal["gpu", "cpu", "npu", "research"]

PEAK_TOLERANCE = 0.1
"""How far a peak may lie from units x multiply-accumulates x 2 x clock: boost clocks differ between documents."""


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
        operations: What operations between layers read and write: floats, as in runtimes that quantize layers alone; or
            the integers around them, as NPUs and fully quantized graphs do.
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
    operations: Literal["float", "integer"] = "float"
    __pydantic_config__: ClassVar[Any] = STRICT

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
    def calibrated_kinds(self) -> tuple[str, ...]:
        """Kinds of layer that no kernel of their own runs on a path of the datasheet."""
        own = [one for one in self.capabilities if one.support in ("native", "storage") and one.kinds != ANY]
        tiers: dict[str, set[Tier]] = defaultdict(set)
        for capability in own:
            for kind in capability.kinds:
                tiers[kind].add(self.calibration[capability.path].tier)
        return tuple(kind for kind, found in tiers.items() if "datasheet" not in found)

    @property
    def standing(self) -> str:
        """Its tier in words, for tables: `calibrated in part` where only some kinds of layer are."""
        if not self.knows_time:
            return "not known"
        return "calibrated in part" if self.tier == "datasheet" and self.calibrated_kinds else self.tier

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user must know before believing its numbers."""
        if not self.knows_time:
            return (f"{self.id}: bandwidth or peak is not known, so latencies are not either; judge by bytes",)
        found = []
        guessed = [name for name, path in self.calibration.items() if path.tier == "datasheet"]
        if len(guessed) == len(self.calibration):
            found.append(
                f"{self.id} is known by its datasheet alone: a roofline of peaks tells the faster of two precisions "
                "hardly better than chance. Calibrate it with `bitplan profile --fit` on the device, or judge by bytes"
            )
        elif guessed:
            kinds = ", ".join(self.calibrated_kinds) or "some paths"
            found.append(
                f"{self.id}: only {kinds} layers are calibrated; the others, and what is between layers, are not"
            )
        if not self.launch.is_known and len(guessed) < len(self.calibration):
            found.append(f"{self.id}: what starting a network takes is not known, and left out")
        return tuple(found)

    def capability(
        self, kind: str, precision: Precision, is_depthwise: bool = False, leaves_floats: bool = False
    ) -> Capability:
        """Finds how a layer of this kind runs at this precision; some kernels exist only where integers are left.

        Raises:
            ValueError: If nothing in the device's list matches.
        """
        found = find_capability(self.capabilities, kind, precision, is_depthwise, leaves_floats)
        if found is None:
            raise ValueError(f"device {self.id} has no capability for {kind} at {precision}; add one to its file")
        return found

    def peak(self, compute: str, threads: int) -> float:
        """Dense operations per second of a compute type."""
        return rate_at(self.compute[compute].peak, threads)

    def level(self, size: float, threads: int) -> MemoryLevel:
        """The fastest memory level that holds `size` bytes, of those whose bandwidth is known; else the main memory."""
        known = (level for level in self.memory[:-1] if not math.isnan(rate_at(level.bandwidth, threads)))
        return next((level for level in known if level.holds(size, threads)), self.memory[-1])

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


def parse_device(content: Any, path: Path) -> Device:
    """Turns parsed YAML into a device; `path` is for messages.

    Raises:
        ValueError: If it is not valid; the message names the key.
    """
    import pydantic

    try:
        device: Device = _adapter().validate_python(content)
    except pydantic.ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'device'}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        )
        raise ValueError(f"{path} is not a valid device: {problems}") from error
    return device


@lru_cache(maxsize=1)
def _adapter() -> Any:
    """What validates devices; made once, since that takes longer than a file."""
    import pydantic

    return pydantic.TypeAdapter(Device)


def worst_tier(tiers: Iterable[Tier]) -> Tier:
    """The least trustworthy of `tiers`."""
    return max(tiers, key=TIERS.index)
