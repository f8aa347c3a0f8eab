"""A device described by numbers, each with its unit and its source, read from YAML and validated on load.

The records are plain dataclasses, so that importing this module is quick; pydantic and yaml are imported when a file
is read.
"""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from hwmodels.cost import TIERS, Tier
from hwmodels.precision import FLOAT_BITS, INTEGER_BITS, Precision

FOLDER = Path(__file__).with_name("devices")
LAYER_KINDS = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "embedding", "lstm", "gru", "attention"),
)
ANY = "*"
FLOAT_COMPUTE = "fp32"  # the compute type that every device has, and runs everything else in

_STRICT = {"extra": "forbid"}  # pydantic: unknown keys are errors


@dataclass(frozen=True)
class Quantity:
    """A number with its unit and where it comes from.

    Attributes:
        value: The number, in `unit`.
        unit: An SI unit: `s`, `Hz`, `J`, `J/byte`, `byte`, `byte/s`, `op/s`, or `1` for ratios.
        source: Publication, or the measurement or assumption that the number stands on.
    """

    value: float
    unit: Literal["s", "Hz", "J", "J/byte", "byte", "byte/s", "op/s", "1"]
    source: str
    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise ValueError(f"value must be finite and not negative, got {self.value}")
        if not self.source.strip():
            raise ValueError("source is empty; say where the number comes from")


PerThreads = Mapping[int, Quantity]
"""Number of threads to what they reach together."""


@dataclass(frozen=True)
class MemoryLevel:
    """A cache, or the main memory.

    Attributes:
        name: Such as `l2` or `dram`.
        bandwidth: Read bandwidth, by number of threads.
        capacity: Bytes it holds; None for the main memory, which holds everything.
        private: Whether each thread has one of its own, so that capacities add up.
    """

    name: str
    bandwidth: PerThreads
    capacity: Quantity | None = None
    private: bool = False
    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        _expect("bandwidth", "byte/s", *self.bandwidth.values())
        _expect_positive("bandwidth", *self.bandwidth.values())
        if self.capacity is not None:
            _expect("capacity", "byte", self.capacity)

    def holds(self, size: float, threads: int) -> bool:
        """Whether `size` bytes fit into what `threads` threads share."""
        return self.capacity is None or size <= self.capacity.value * (threads if self.private else 1)


@dataclass(frozen=True)
class Efficiency:
    """How near kernels of one compute type come to the peaks: the four parameters of the calibrated roofline.

    Attributes:
        overhead: Seconds to start one operation (t0).
        compute: Share of the compute peak that is reached (e_c).
        memory: Share of the bandwidth that is reached (e_m).
        sharpness: Exponent (p) that joins both times: 1 adds them up, infinity takes the longer one.
        tier: How far a time computed with these can be trusted.
    """

    overhead: Quantity
    compute: Quantity
    memory: Quantity
    sharpness: Quantity
    tier: Tier
    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        _expect("overhead", "s", self.overhead)
        _expect("compute, memory and sharpness", "1", self.compute, self.memory, self.sharpness)
        _expect_positive("compute and memory", self.compute, self.memory)
        if max(self.compute.value, self.memory.value) > 1 or self.sharpness.value < 1:
            raise ValueError("compute and memory must be at most 1, sharpness at least 1")


@dataclass(frozen=True)
class Capability:
    """What the device does with some precisions of some kinds of layer; the first that matches wins.

    Attributes:
        kinds: Layer kinds it is about, or `*`.
        weight_bits: Weight widths it is about, 32 for float, or `*`.
        input_bits: Input widths it is about, 32 for float, or `*`.
        compute: Type the multiplications run in, a key of the device's `compute`.
        held_weight_bits: Width of a weight in memory while running; None for its own.
        held_input_bits: Width at which the kernel reads its input.
        note: Why, in words for the user.
    """

    kinds: tuple[str, ...] | Literal["*"]
    weight_bits: tuple[int, ...] | Literal["*"]
    input_bits: tuple[int, ...] | Literal["*"]
    compute: str
    held_weight_bits: int | None
    held_input_bits: int
    note: str
    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        for field, known in {
            "kinds": LAYER_KINDS,
            "weight_bits": (*INTEGER_BITS, FLOAT_BITS),
            "input_bits": (*INTEGER_BITS, FLOAT_BITS),
        }.items():
            given = getattr(self, field)
            unknown = [] if given == ANY else [item for item in given if item not in known]
            if unknown:
                raise ValueError(f"{field} has {unknown[0]!r}{_closest(unknown[0], known)}; allowed: {_list(known)}")

    def weight_width(self, precision: Precision) -> int:
        """Bits that a weight of this precision takes in memory while running."""
        return self.held_weight_bits or precision.weight.bits

    def matches(self, kind: str, precision: Precision) -> bool:
        """Whether it is about this kind of layer at this precision; widths are those of static integers and float."""
        asked = ((self.weight_bits, precision.weight), (self.input_bits, precision.input))
        return (self.kinds == ANY or kind in self.kinds) and all(
            bits == ANY or ((format.is_float or format.is_static_integer) and format.bits in bits)
            for bits, format in asked
        )


@dataclass(frozen=True)
class OperationEnergy:
    """Energy of single operations; `int8` is the anchor that other integer widths are scaled from."""

    int8_multiply: Quantity
    int8_add: Quantity
    fp32_multiply: Quantity
    fp32_add: Quantity
    memory: Quantity
    tier: Tier
    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        _expect("an operation", "J", self.int8_multiply, self.int8_add, self.fp32_multiply, self.fp32_add)
        _expect("memory", "J/byte", self.memory)


@dataclass(frozen=True)
class Device:
    """A piece of hardware with the runtime that drives it.

    Attributes:
        id: Short name, the file's.
        description: What it is, in words.
        clock: Clock frequency while computing.
        memory: Memory levels from the fastest to the main memory.
        compute: Compute type to peak operations per second, by number of threads; one MAC is two operations.
        efficiency: Compute type to the efficiency of its kernels.
        capabilities: What runs how; the first match wins.
        energy: Energy per operation and byte.
    """

    schema: Literal[1]
    id: str
    description: str
    clock: Quantity
    memory: tuple[MemoryLevel, ...]
    compute: Mapping[str, PerThreads]
    efficiency: Mapping[str, Efficiency]
    capabilities: tuple[Capability, ...]
    energy: OperationEnergy
    __pydantic_config__: ClassVar[Any] = _STRICT

    def __post_init__(self) -> None:
        _expect("clock", "Hz", self.clock)
        if not self.memory or self.memory[-1].capacity is not None:
            raise ValueError("memory must end with the main memory, a level without capacity")
        for name, peaks in self.compute.items():
            _expect(f"compute.{name}", "op/s", *peaks.values())
            _expect_positive(f"compute.{name}", *peaks.values())
        if FLOAT_COMPUTE not in self.compute:
            raise ValueError(f"compute needs {FLOAT_COMPUTE}, which the operations between the layers run in")
        if set(self.compute) != set(self.efficiency):
            raise ValueError(f"compute has {_list(self.compute)} but efficiency has {_list(self.efficiency)}")
        for capability in self.capabilities:
            if capability.compute not in self.compute:
                given = f"{capability.compute!r}{_closest(capability.compute, self.compute)}"
                raise ValueError(f"capabilities: no peak of {given}; compute has {_list(self.compute)}")
        counts = {
            tuple(sorted(table)) for table in (*self.compute.values(), *(level.bandwidth for level in self.memory))
        }
        if len(counts) != 1 or counts == {()}:
            raise ValueError("every peak and every bandwidth must be given for the same numbers of threads")

    @property
    def threads(self) -> tuple[int, ...]:
        """Numbers of threads that the device has figures for."""
        return tuple(sorted(self.memory[-1].bandwidth))

    def capability(self, kind: str, precision: Precision) -> Capability:
        """Finds how a layer of this kind runs at this precision.

        Raises:
            ValueError: If nothing in the device's list matches.
        """
        found = next((capability for capability in self.capabilities if capability.matches(kind, precision)), None)
        if found is None:
            raise ValueError(f"device {self.id} has no capability for {kind} at {precision}; add one to its file")
        return found

    def level(self, size: float, threads: int) -> MemoryLevel:
        """The fastest memory level that holds `size` bytes."""
        return next(level for level in self.memory if level.holds(size, threads))


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
                f"no device {str(name)!r}{_closest(str(name), known)}; known devices: {_list(known)}; "
                "a path that ends in .yaml loads your own"
            )
        path = FOLDER / f"{name}.yaml"
    return _validate(path, _read(path))


def _read(path: Path) -> Any:
    """Parses a YAML file in which no mapping has a key twice."""
    import yaml

    class UniqueKeyLoader(yaml.SafeLoader):
        """Refuses what yaml would otherwise overwrite silently."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key_node, _ in node.value:
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


def _validate(path: Path, content: Any) -> Device:
    """Turns parsed YAML into a device."""
    import pydantic

    try:
        return pydantic.TypeAdapter(Device).validate_python(content)
    except pydantic.ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'device'}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{path} is not a valid device: {problems}") from error


def _expect(name: str, unit: str, *quantities: Quantity) -> None:
    for quantity in quantities:
        if quantity.unit != unit:
            raise ValueError(f"{name} must be in {unit}, got {quantity.unit}")


def _expect_positive(name: str, *quantities: Quantity) -> None:
    if any(quantity.value == 0 for quantity in quantities):
        raise ValueError(f"{name} must be above 0")


def _list(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))


def _closest(name: object, known: Iterable[object]) -> str:
    found = difflib.get_close_matches(str(name), map(str, known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def worst_tier(tiers: Iterable[Tier]) -> Tier:
    """The least trustworthy of `tiers`."""
    return max(tiers, key=TIERS.index)
