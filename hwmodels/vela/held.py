"""How an Ethos-U holds what a precision says: weights as 8-bit integers, inputs of 8 or 16 bits.

Weights of fewer bits are 8-bit integers that take few values: Vela's lossless coding makes them small in memory, the
multipliers see 8 bits. Inputs of fewer bits travel in 8.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from hwmodels.network import Layer
from hwmodels.precision import Format, Precision

LARGEST = 127  # an 8-bit code


@dataclass(frozen=True)
class Held:
    """A layer's precision as an Ethos-U holds it; many precisions share one.

    Attributes:
        codes: The 8-bit integers that weights take.
        bits: Bits of an input value, 8 or 16; the layer's output has as many.
    """

    codes: range
    bits: int

    @classmethod
    def of(cls, layer: Layer, precision: Precision) -> Held:
        """How a layer's precision is held.

        Raises:
            ValueError: If the NPU cannot hold such weights or such inputs.
        """
        codes = weight_codes(precision.weight)
        if codes is None:
            raise ValueError(
                f"layer {layer.name} has weights in {precision.weight}, which an Ethos-U cannot hold; allowed: "
                "integers of 1 to 8 bits with one scale per channel or tensor, such as int8, int4, binary, ternary"
            )
        bits = input_bits(precision.input)
        if bits is None:
            raise ValueError(
                f"layer {layer.name} has inputs in {precision.input}, which an Ethos-U cannot read; allowed: "
                "integers of up to 8 bits, and of 16, with a static scale, such as int8, uint8, int16; "
                "there is no float: take budget.reference=int8 for ratios"
            )
        return cls(codes, bits)

    def __str__(self) -> str:
        return f"{self.codes.start}..{self.codes[-1]} by {self.codes.step}/{self.bits}"

    @property
    def highest(self) -> int:
        """The largest code."""
        return self.codes[-1]


def weight_codes(format: Format) -> range | None:
    """The 8-bit integers that stand for a weight format's values; None where they cannot."""
    if format.granularity not in ("default", "tensor", "channel"):
        return None
    if format.grid == "binary":
        return range(-1, 2, 2)
    if format.grid == "ternary":
        return range(-1, 2)
    if not format.is_static_integer or format.bits > 8:
        return None
    if format.bits == 1 and format.signed:
        return range(-1, 2, 2)
    if format.has_zero_point:  # in the middle
        return range(-(1 << (format.bits - 1)), 1 << (format.bits - 1))
    return range(format.lowest, format.highest + 1) if format.highest <= LARGEST else None


def input_bits(format: Format) -> int | None:
    """Bits in which an input travels; None where it cannot."""
    if not format.is_static_integer:
        return None
    return 16 if format.bits > 8 else 8


def weight_values(layer: Layer, codes: range, given: np.ndarray | None = None) -> np.ndarray:
    """A layer's weight as 8-bit integers, in the shape the module stores it.

    Args:
        layer: The layer; without `given`, its values are drawn uniformly from `codes`, always the same for its name.
        codes: Values the integers may take.
        given: The weight in 8 bits, which is rounded to `codes`.
    """
    if given is None:
        generator = np.random.default_rng(zlib.crc32(layer.name.encode()))
        drawn = generator.integers(0, len(codes), layer.weight_shape)
        return (codes.start + codes.step * drawn).astype(np.int8)
    shrunk = given.astype(np.float64) * (codes[-1] / LARGEST)
    steps = np.rint((shrunk - codes.start) / codes.step)
    return (codes.start + codes.step * np.clip(steps, 0, len(codes) - 1)).astype(np.int8)
