"""What it costs that one layer leaves a tensor in another format than the next one reads it in.

An integer kernel can write its output in the integers that the next layer reads: that costs nothing. All else does: a
pass that quantizes what was left in floats, a second reading where scales are found at run time, floats written where
integers would have done. A tensor is converted once, however many layers read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hwmodels.base import Choices
from hwmodels.capability import Capability
from hwmodels.network import Layer, Network
from hwmodels.precision import Precision

CONVERTED_BITS = 8
"""Bits at which an epilogue leaves integers for the next layer: narrower ones travel in a byte."""

FLOATS, INTEGERS = "floats", "integers"  # what a producer leaves
READ_FLOAT, READ_DYNAMIC, READ_TURNED = "float", "dynamic", "turned back"  # besides the bits of static integers


@dataclass(frozen=True)
class Handover:
    """A tensor that one layer reads in a format of its own.

    Attributes:
        tensor: The tensor.
        consumer: The first layer that reads it; the others find it converted.
        producer: The layer that leaves it and nothing else but layers read it; None where it comes from elsewhere.
    """

    tensor: str
    consumer: str
    producer: str | None


def handovers(network: Network, choices: Choices) -> tuple[Handover, ...]:
    """The tensors that layers among `choices` read, each with the layer before it if that is among them as well."""
    first: dict[str, str] = {}
    for layer in network:
        tensor = network.input_tensor(layer)
        if tensor is not None and layer.name in choices:
            first.setdefault(tensor, layer.name)
    found = []
    for tensor, consumer in first.items():
        source = network.source_layer(tensor) if tensor in network.tensors else None
        alone = source is not None and all(name in choices for name in network.tensors[tensor].consumers)
        found.append(Handover(tensor, consumer, source.name if alone and source and source.name in choices else None))
    return tuple(found)


def left_as(run: Capability) -> str:
    """What a producer leaves for a layer that reads integers."""
    return INTEGERS if run.requantizes else FLOATS


def read_as(layer: Layer, precision: Precision, run: Capability, float_bits: int) -> str:
    """What a consumer needs: floats, scales found at run time, integers turned back into floats, or so many bits."""
    if precision.input.is_float or precision.input.grid == "cast" or not layer.quantizes_input or run.conversion_bits:
        return READ_FLOAT
    if precision.input.is_dynamic:
        return READ_DYNAMIC
    held = run.held_input_bits  # given where the kernel reads wider than the format; integers of 16 bits are no floats
    if held is not None and held >= float_bits and held > CONVERTED_BITS:
        return READ_TURNED
    return str(8 * math.ceil(precision.input.bits / 8))


def conversion_traffic(left: str, read: str, values: int, float_bits: int) -> tuple[int, float]:
    """Passes over a tensor of so many values, and the bytes they move."""
    floats, integers = values * float_bits / 8, values * CONVERTED_BITS / 8
    dequantized = floats - integers if left == INTEGERS else 0.0  # written wider by the producer itself
    if read == READ_FLOAT:
        return 0, dequantized
    if read == READ_DYNAMIC:
        return 2, dequantized + 2 * floats + integers  # the largest magnitude is found, then everything is scaled
    if read == READ_TURNED:
        return (1, integers + floats) if left == INTEGERS else (2, 2 * (floats + integers))
    return (0, 0.0) if left == INTEGERS else (1, floats + values * int(read) / 8)
