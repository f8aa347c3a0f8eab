"""How one tensor is stored (a format) and how one layer is computed (a precision).

A format is a grid of values, a rule for the scales that place the grid on the number line, and how many values share a
scale. Its short name says all three, from left to right:

    int4 uint8             integers: intN symmetric without its most negative code, uintN with a zero point
    int4-full int4-asym    intN with its most negative code, or with a zero point; uint8-sym has none and starts at zero
    int1 binary ternary    {-1, 1}; the same scaled by the mean magnitude (BWN); {-1, 0, 1} by TWN's threshold
    ttq binary-stochastic  {-1, 0, 1} with a scale on either side (TTQ); BWN with random rounding
    fp16 bf16              casts, without a scale
    fp8_e4m3 fp4_e2m1 ...  small floats under a float32 scale
    mxfp8_e4m3 mxint8 ...  OCP microscaling: blocks of 32 under a power of two; nvfp4: blocks of 16 under an e4m3 scale
    codebook4 nf4          2^N values found by k-means, one book per tensor; the quantiles of QLoRA in groups of 64
    ...-g128               groups of 128 values share a scale: consecutive inputs of one output channel, or of one token
    ...-tensor -channel    what shares a scale; by default a weight's output channel, an input's tensor
    ...-token -dynamic     inputs only: scales found at run time, one per token, or one per sample
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Literal

Grid = Literal["float", "cast", "int", "minifloat", "binary", "ternary", "ttq", "codebook", "nf4"]
ScaleType = Literal["none", "fp32", "e8m0", "e4m3"]
Granularity = Literal["default", "tensor", "channel", "sample", "token", "group"]
Span = Literal["", "full", "asym", "sym"]
Side = Literal["weight", "input"]

SCALE_BITS: dict[ScaleType, int] = {"none": 0, "fp32": 32, "e8m0": 8, "e4m3": 8}
FLOAT_BITS = 32
INTEGER_BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16)
CODEBOOK_BITS = range(1, 9)


@dataclass(frozen=True, order=False)
class Format:
    """How one tensor is stored; the module's docstring lists the names.

    `int2` is {-1, 0, 1} times a scale and `int1` is {-1, 1}; `uintN` holds N-bit codes with a zero point. Formats of
    one bit width therefore differ in range and in what is stored beside the codes.

    Attributes:
        bits: Bits per stored value, 32 for `float`.
        signed: Whether codes are signed.
        is_float: True for `float`, the tensor as the model has it.
        grid: Which values codes stand for.
        exponent_bits: Of a minifloat.
        span: `full` for the most negative code too, `asym` and `sym` for with and without zero point; empty by default.
        scale: Type of the scales that are stored.
        granularity: Which values share a scale; `default` is `channel` for weights and `tensor` for inputs.
        group: Values in a group, where `granularity` is `group`.
        is_stochastic: Whether rounding is random.
    """

    bits: int
    signed: bool = True
    is_float: bool = False
    grid: Grid = "int"
    exponent_bits: int = 0
    span: Span = ""
    scale: ScaleType = "fp32"
    granularity: Granularity = "default"
    group: int = 0
    is_stochastic: bool = False

    def __post_init__(self) -> None:
        if self.is_float:
            object.__setattr__(self, "grid", "float")
            object.__setattr__(self, "scale", "none")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Kept, since tables are keyed by formats; of numbers and letters only, so the same in every process."""
        return zlib.crc32(repr(tuple(getattr(self, item.name) for item in fields(self))).encode())

    def __str__(self) -> str:
        if self in _NAMES:
            return _NAMES[self]
        return f"{_NAMES.get(self.base) or _number_name(self)}{_SUFFIXES.get(self.granularity, f'-g{self.group}')}"

    @property
    def base(self) -> Format:
        """The format with the granularity left open."""
        return replace(self, granularity="default", group=0)

    @property
    def is_dynamic(self) -> bool:
        """Whether the scales of an input are found at run time."""
        return self.granularity in ("sample", "token", "group")

    @property
    def is_static_integer(self) -> bool:
        """Whether it is what integer kernels multiply: integers with one static scale per channel or tensor."""
        return self.grid == "int" and self.scale == "fp32" and self.granularity in ("default", "tensor", "channel")

    @property
    def is_symmetric_integer(self) -> bool:
        """Whether it is signed static integers of two bits or more around zero, as runtimes store weights."""
        return self.is_static_integer and self.signed and self.bits > 1 and not self.has_zero_point

    @property
    def has_static_range(self) -> bool:
        """Whether an input in this format needs a range found beforehand."""
        return not self.is_dynamic and self.grid not in ("float", "cast")

    @property
    def lowest(self) -> int:
        """The smallest code of an integer grid, before a zero point moves it."""
        if not self.signed:
            return 0
        return -self.highest - 1 if self.span in ("full", "asym") else -self.highest

    @property
    def highest(self) -> int:
        """The largest code of an integer grid; 1 for `int1`, whose codes are -1 and 1."""
        return max((1 << (self.bits - 1 if self.signed else self.bits)) - 1, 1)

    @property
    def has_zero_point(self) -> bool:
        """Whether an integer stands for the value zero and is stored."""
        return self.grid == "int" and (self.span == "asym" or (not self.signed and self.span != "sym"))

    @property
    def mantissa_bits(self) -> int:
        """Bits after the point of a minifloat."""
        return self.bits - 1 - self.exponent_bits

    @property
    def largest(self) -> float:
        """The largest magnitude on the grid at scale 1: of codes, or of a minifloat as OCP's specifications have it.

        FP8 formats (OCP OFP8 1.0) keep codes for NaN, and e5m2 for infinity; those of 6 and 4 bits (OCP MX 1.0) none.
        """
        if self.grid != "minifloat":
            return float(max(self.highest, -self.lowest)) if self.grid == "int" else 1.0
        bias = (1 << (self.exponent_bits - 1)) - 1
        top = (1 << self.exponent_bits) - 1 - bias - (self.exponent_bits == 5)
        fraction = 2.0 - 2.0**-self.mantissa_bits
        if self.exponent_bits == 4 and self.bits == 8:
            fraction -= 2.0**-self.mantissa_bits  # e4m3 gives its last mantissa to NaN
        return fraction * 2.0**top

    def groups(self, shape: Sequence[int], channel_axis: int = 0) -> int:
        """Number of scales (or codebooks) of a weight; the last group of a channel may be shorter."""
        channels = shape[channel_axis] if len(shape) else 1
        if self.granularity == "group":
            return channels * math.ceil(math.prod(shape) / max(channels, 1) / self.group)
        is_shared = self.granularity == "tensor" or (self.granularity == "default" and self.grid == "codebook")
        return 1 if is_shared else channels

    def storage_bits(self, values: int, groups: int = 1) -> int:
        """Bits that `values` take with what is stored beside them for each of `groups`.

        A scale, and a zero point where there is one; two scales for TTQ; a book of float32 values for a codebook. NVFP4
        has one float32 scale more for the tensor.
        """
        if self.grid in ("float", "cast"):
            return values * self.bits
        if self.grid == "codebook":
            return values * self.bits + groups * (FLOAT_BITS << self.bits)
        beside = SCALE_BITS[self.scale] * (2 if self.grid == "ttq" else 1)
        beside += self.bits if self.has_zero_point else 0
        return values * self.bits + groups * beside + (FLOAT_BITS if self.scale == "e4m3" else 0)

    def input_bits(self) -> int:
        """Bits stored for an input's format: its static range, nothing where it is found at run time."""
        return self.storage_bits(0, 1) if self.has_static_range else 0

    def effective_bits(self, values: int, groups: int = 1) -> float:
        """Bits per value with scales, zero points and codebooks counted."""
        return self.storage_bits(values, groups) / values

    def check(self, side: Side) -> None:
        """Raises ValueError unless the format can be that of a weight, or of a layer's input."""
        if side == "weight" and self.granularity in ("sample", "token"):
            raise ValueError(f"{self} finds its scales at run time, which is for inputs; use {self.base} for weights")
        if side == "input" and self.grid in ("binary", "ternary", "ttq", "codebook", "nf4"):
            raise ValueError(f"{self} is for weights; inputs take integers, small floats, microscaling or float")
        if side == "input" and self.granularity == "channel":
            raise ValueError(
                f"{self} would scale every input channel on its own, which no kernel can sum; "
                f"use {self.base}, or {self.base}-token"
            )

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(name: str) -> Format:
        """Reads a format from its short name.

        Raises:
            ValueError: If the name is no format; the message lists the allowed ones.
        """
        base, *suffixes = re.split(r"-(?=g\d|tensor$|channel$|token$|dynamic$)", name)
        format = _BASES.get(base) or _parse_number(base)
        if format is None:
            raise ValueError(f"{name!r} is no format; allowed: {ALLOWED}")
        if not suffixes:
            return format
        if len(suffixes) > 1 or format.grid in ("float", "cast") or format in _BLOCKS.values():
            raise ValueError(f"{name!r} is no format: {base} takes no -{'-'.join(suffixes)}; allowed: {ALLOWED}")
        return _with_suffix(format, suffixes[0], name)


def _with_suffix(format: Format, suffix: str, name: str) -> Format:
    granularity = next((known for known, text in _SUFFIXES.items() if text == f"-{suffix}"), None)
    if granularity:
        return replace(format, granularity=granularity, group=0)
    if not re.fullmatch(r"g[1-9][0-9]*", suffix):
        raise ValueError(f"{name!r} is no format: a group has a positive number of values, such as -g128")
    return replace(format, granularity="group", group=int(suffix[1:]))


def _parse_number(name: str) -> Format | None:
    """Reads `intN`, `uintN` with their span, and `codebookN`."""
    if (found := re.fullmatch(r"codebook([1-8])", name)) is not None:
        return Format(int(found[1]), grid="codebook")
    found = re.fullmatch(r"(u?)int([1-9][0-9]*)(?:-(full|asym|sym))?", name)
    if found is None or int(found[2]) not in INTEGER_BITS:
        return None
    unsigned, bits, span = bool(found[1]), int(found[2]), found[3] or ""
    if (span == "sym") != (unsigned and bool(span)) or (bits == 1 and span in ("full", "asym")):
        return None
    spans: dict[str, Span] = {"": "", "full": "full", "asym": "asym", "sym": "sym"}
    return Format(bits, signed=not unsigned, span=spans[span])


def _number_name(format: Format) -> str:
    if format.grid == "codebook":
        return f"codebook{format.bits}"
    return f"{'' if format.signed else 'u'}int{format.bits}{f'-{format.span}' if format.span else ''}"


FLOAT = Format(FLOAT_BITS, is_float=True)

_MINIFLOATS = {"fp8_e4m3": (8, 4), "fp8_e5m2": (8, 5), "fp6_e2m3": (6, 2), "fp6_e3m2": (6, 3), "fp4_e2m1": (4, 2)}
_PLAIN: dict[str, Format] = {
    "float": FLOAT,
    "fp16": Format(16, grid="cast", exponent_bits=5, scale="none"),
    "bf16": Format(16, grid="cast", exponent_bits=8, scale="none"),
    "binary": Format(1, grid="binary"),
    "binary-stochastic": Format(1, grid="binary", is_stochastic=True),
    "ternary": Format(2, grid="ternary"),
    "ttq": Format(2, grid="ttq"),
    "nf4": Format(4, grid="nf4", granularity="group", group=64),
    **{name: Format(bits, grid="minifloat", exponent_bits=e) for name, (bits, e) in _MINIFLOATS.items()},
}
_BLOCKS: dict[str, Format] = {
    "mxint8": Format(8, scale="e8m0", granularity="group", group=32),
    **{
        f"mx{name.removesuffix('_e2m1')}": replace(_PLAIN[name], scale="e8m0", granularity="group", group=32)
        for name in _MINIFLOATS
    },
    "nvfp4": replace(_PLAIN["fp4_e2m1"], scale="e4m3", granularity="group", group=16),
}
_ALIASES = {"fp8": "fp8_e4m3", "fp6": "fp6_e2m3", "fp4": "fp4_e2m1", "mxfp8": "mxfp8_e4m3", "mxfp6": "mxfp6_e2m3"}
_BASES: dict[str, Format] = {**_PLAIN, **_BLOCKS}
_BASES |= {alias: _BASES[name] for alias, name in _ALIASES.items()}
_NAMES = {format: name for name, format in (_PLAIN | _BLOCKS).items()} | {_PLAIN["nf4"].base: "nf4"}
_SUFFIXES: dict[Granularity, str] = {
    "default": "",
    "tensor": "-tensor",
    "channel": "-channel",
    "sample": "-dynamic",
    "token": "-token",
}

ALLOWED = (
    f"{', '.join(name for name in _PLAIN)}, {', '.join(_BLOCKS)}, codebookN with N from 1 to 8, "
    f"intN and uintN with N in {', '.join(map(str, INTEGER_BITS))}, also intN-full, intN-asym, uintN-sym; "
    "most with -tensor, -channel, -gN, and for inputs -token or -dynamic"
)


@dataclass(frozen=True)
class Precision:
    """A layer's weight format and input format, written `int4/uint8`."""

    weight: Format = FLOAT
    input: Format = FLOAT

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.weight, self.input))

    def __str__(self) -> str:
        return f"{self.weight}/{self.input}"

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(name: str) -> Precision:
        """Reads `weight/input`; a lone `weight` leaves the input in float.

        Raises:
            ValueError: If either part is no format, or none for its side.
        """
        weight, slash, input_ = name.partition("/")
        precision = Precision(Format.parse(weight), Format.parse(input_) if slash else FLOAT)
        precision.weight.check("weight")
        precision.input.check("input")
        return precision


FLOAT_PRECISION = Precision()
