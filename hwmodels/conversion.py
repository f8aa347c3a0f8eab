"""What it costs that one layer leaves a tensor in another format than the next one reads it in.

An integer kernel can write its output in the integers that the next layer reads: that costs nothing. All else does: a
pass that quantizes what was left in floats, a second reading where scales are found at run time, floats written where
integers would have done. A tensor is converted once, however many layers read it.
"""

from __future__ import annotations

import math

from hwmodels.capability import Capability
from hwmodels.network import Layer
from hwmodels.precision import Precision

CONVERTED_BITS = 8
"""Bits at which an epilogue leaves integers for the next layer: narrower ones travel in a byte."""

FLOATS, INTEGERS = "floats", "integers"  # what a producer leaves
READ_FLOAT, READ_DYNAMIC, READ_TURNED = "float", "dynamic", "turned back"  # besides the bits of static integers


def left_as(run: Capability) -> str:
    """What a producer leaves for a layer that reads integers."""
    return INTEGERS if run.requantizes else FLOATS


def read_as(layer: Layer, precision: Precision, run: Capability, float_bits: int) -> str:
    """What a consumer needs: floats, scales found at run time, integers turned back into floats, or so many bits.

    Integers are turned back where the capability says that the kernel holds them as wide as floats, and wider than 8
    bits: a device without floats counts what operations move as integers of 8 bits, which are what its kernels take.
    """
    if precision.input.is_float or precision.input.grid == "cast" or not layer.quantizes_input or run.conversion_bits:
        return READ_FLOAT
    if precision.input.is_dynamic:
        return READ_DYNAMIC
    if run.held_input_bits is not None and run.held_input_bits >= max(float_bits, CONVERTED_BITS + 1):
        return READ_TURNED
    return str(CONVERTED_BITS * math.ceil(precision.input.bits / CONVERTED_BITS))


def handed_bits(read: str, float_bits: int) -> int:
    """Bits of a value of the tensor that is handed over to a layer with this need, before a pass converts it."""
    if read in (READ_FLOAT, READ_DYNAMIC):
        return float_bits
    return CONVERTED_BITS if read == READ_TURNED else int(read)


def conversion_traffic(
    left: str, read: str, values: int, float_bits: int, through_operations: bool = False
) -> tuple[int, float]:
    """Passes over a tensor of so many values, and the bytes they move.

    A producer that leaves integers is priced as writing `CONVERTED_BITS`; what is read wider it writes wider itself.
    With operations in between it does not: the last of them writes the tensor.
    """
    floats, integers = values * float_bits / 8, values * CONVERTED_BITS / 8
    wider = 0.0
    if left == INTEGERS and not through_operations:
        wider = values * (handed_bits(read, float_bits) - CONVERTED_BITS) / 8
    if read == READ_FLOAT:
        return 0, wider
    if read == READ_DYNAMIC:
        return 2, wider + 2 * floats + integers  # the largest magnitude is found, then everything is scaled
    if read == READ_TURNED:
        return (1, integers + floats) if left == INTEGERS else (2, 2 * (floats + integers))
    return (0, wider) if left == INTEGERS else (1, floats + values * int(read) / 8)
