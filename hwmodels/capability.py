"""What a device does with a precision: which kernel runs, in which compute type, on what it holds in memory.

A device lists its capabilities from the most particular to the most general; the first that matches wins. Formats are
named by patterns, matched against a format's name without what kernels do not mind: whether a static scale belongs to
a tensor or a channel, and whether an integer uses its most negative code.

    int8            int8, int8-channel, int8-tensor, int8-full
    int[2-8]        the same for 2 to 8 bits
    int4-g128       int4 in groups of 128; int4-g* in groups of any size
    uint8-token     scales found at run time, per token; *-dynamic per sample
    fp8_e4m3 *      that format; any format
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

from hwmodels.precision import Format, Precision

LAYER_KINDS = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "embedding", "lstm", "gru", "attention"),
)
DEPTHWISE = "depthwise"
ANY = "*"

Support = Literal["native", "storage", "fallback", "refused"]
"""A kernel for the very formats; held packed but computed wider; computed in another type; not possible at all."""

Patterns = tuple[str, ...] | Literal["*"]


@dataclass(frozen=True)
class Capability:
    """What the device does with some precisions of some kinds of layer; the first that matches wins.

    Attributes:
        kinds: Layer kinds it is about, `depthwise` for convolutions that filter each channel alone, or `*`.
        weights: Patterns of weight formats, or `*`.
        inputs: Patterns of input formats, or `*`.
        support: How good a match it is; see `Support`.
        note: Why, in words for the user.
        compute: Type the multiplications run in, a key of the device's `compute`; empty where refused.
        path: Key of the device's `calibration`; by default the compute type.
        kernel: What runs, as its library calls it.
        held_weight_bits: Bits of a weight in memory while running; None for its own, packed with its scales.
        held_input_bits: Bits at which the kernel reads a value of its input; None for its own.
        requantizes: Whether its epilogue can write its output in the integers that the next layer reads.
        needs_integer_output: Whether the kernel exists only where it requantizes; elsewhere the next match runs.
        extra_kernels: Kernels launched besides, such as one that unpacks weights.
        conversion_bits: Bits moved per value of a float input that is quantized on the way in; the path's times then
            include that, and no conversion is priced besides.
    """

    kinds: tuple[str, ...] | Literal["*"]
    weights: Patterns
    inputs: Patterns
    support: Support
    note: str
    compute: str = ""
    path: str = ""
    kernel: str = ""
    held_weight_bits: int | None = None
    held_input_bits: int | None = None
    requantizes: bool = False
    needs_integer_output: bool = False
    extra_kernels: int = 0
    conversion_bits: float = 0.0
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        known = (*LAYER_KINDS, DEPTHWISE)
        strangers = [] if self.kinds == ANY else [kind for kind in self.kinds if kind not in known]
        if strangers:
            raise ValueError(f"kinds has {strangers[0]!r}; allowed: {', '.join(known)}, or '*'")
        if (self.support == "refused") == bool(self.compute):
            raise ValueError("compute must be given, except where support is refused")
        if self.needs_integer_output and not self.requantizes:
            raise ValueError("needs_integer_output is for kernels that requantize: set requantizes as well")
        if not self.path:
            object.__setattr__(self, "path", self.compute)

    def matches(self, kind: str, precision: Precision, is_depthwise: bool = False) -> bool:
        """Whether it is about this kind of layer at this precision."""
        named = self.kinds == ANY or kind in self.kinds or (is_depthwise and DEPTHWISE in self.kinds)
        return named and _any_matches(self.weights, precision.weight) and _any_matches(self.inputs, precision.input)

    def weight_width(self, precision: Precision) -> int:
        """Bits of a weight in memory while running, scales left out."""
        return precision.weight.bits if self.held_weight_bits is None else self.held_weight_bits

    def input_width(self, precision: Precision) -> int:
        """Bits at which the kernel reads a value of its input."""
        return precision.input.bits if self.held_input_bits is None else self.held_input_bits


def find_capability(
    capabilities: Iterable[Capability],
    kind: str,
    precision: Precision,
    is_depthwise: bool = False,
    leaves_floats: bool = False,
) -> Capability | None:
    """The first capability that is about this kind of layer at this precision, whose output may have to be floats."""
    return next(
        (
            one
            for one in capabilities
            if one.matches(kind, precision, is_depthwise) and not (leaves_floats and one.needs_integer_output)
        ),
        None,
    )


def _any_matches(patterns: Patterns, format: Format) -> bool:
    if patterns == ANY:
        return True
    name = kernel_name(format)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@lru_cache(maxsize=1024)
def kernel_name(format: Format) -> str:
    """A format's name as kernels see it: without what they do not mind."""
    if format.granularity in ("tensor", "channel"):
        format = replace(format, granularity="default")
    if format.grid == "int" and format.span == "full":
        format = replace(format, span="")
    return str(format)
