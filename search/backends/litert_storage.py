"""What LiteRT makes of a layer's precision: the operation, the width its weight is stored in, how its input is treated.

ai-edge-quantizer 0.10 has four ways for an operation (`default_policy.py`): weights alone, dequantized before a float
kernel; integer kernels that find the scales of their input as they run; integer kernels with static ranges, of which
the output is quantized too; and weights cast to fp16. Weights have 4 or 8 bits there, in depthwise convolutions 8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from hwmodels import Format, Layer, Precision
from hwmodels.precision import FLOAT
from search.backends.outcome import Fidelity

Mode = Literal["float", "cast", "weight", "dynamic", "static"]

BLOCKS = (32, 64, 128, 256)
UINT8, INT16 = Format.parse("uint8"), Format.parse("int16")
WITHOUT_KERNEL = "LiteRT quantizes inputs beside symmetric integer weights alone, and to 8 or 16 bits"
PER_ROW, PER_SAMPLE = Format.parse("int8-asym-token"), Format.parse("int8-asym-dynamic")


@dataclass(frozen=True)
class Stored:
    """How a layer is stored and run.

    Attributes:
        mode: `float` where weights are stored as float32, quantized values or not.
        weight: How faithful the weight is.
        operation: LiteRT's operation; empty where the layer becomes another one.
        bits: Of the stored weight codes.
        input: What the input is quantized to as it runs.
        notes: Why, in words.
    """

    mode: Mode
    weight: Fidelity
    operation: str
    bits: int = 0
    input: Format = FLOAT
    notes: tuple[str, ...] = ()


def operation_of(layer: Layer) -> str:
    """Returns LiteRT's operation for a layer whose weight it can quantize; empty for any other."""
    if layer.kind == "linear":
        return "FULLY_CONNECTED"
    if layer.kind == "embedding":
        return "EMBEDDING_LOOKUP"
    if layer.kind != "conv2d" or layer.channel_axis != 0:
        return ""
    if layer.weight_shape[1] == 1:  # also of a single input channel, which the converter takes for depthwise
        return "DEPTHWISE_CONV_2D"
    return "CONV_2D" if layer.groups == 1 else ""


def stored_as(layer: Layer, precision: Precision) -> Stored:
    """Says how a layer is stored and run, by its kind and shape alone."""
    operation, weight = operation_of(layer), precision.weight
    unquantized = () if precision.input.is_float else (WITHOUT_KERNEL,)
    if weight.is_float:
        return Stored("float", "float", operation, notes=unquantized)
    if weight.grid == "cast" and weight.exponent_bits == 5 and operation:
        return Stored("cast", "exact", operation, 16, notes=unquantized)
    if weight.is_static_integer and weight.bits <= 8 and operation:
        bits = 4 if weight.bits <= 4 and operation != "DEPTHWISE_CONV_2D" else 8
        notes = () if bits == weight.bits else (f"{weight} codes are stored in {bits} bits",)
        fidelity: Fidelity = "exact" if bits == weight.bits else "contained"
        mode, input_, why = _input(operation, weight, precision.input)
        return Stored(mode, fidelity, operation, bits, input_, (*notes, *(why or unquantized)))
    if operation == "FULLY_CONNECTED" and _is_blockwise(layer, weight) and _is_dynamic(precision.input):
        rounded = "scales of groups are rounded to bfloat16"
        return Stored("dynamic", "altered", operation, 4, PER_ROW, (rounded, _found(PER_ROW)))
    note = (
        f"LiteRT has no {weight} weight{'' if operation else f' of a {layer.kind}'}: its values are stored as float32"
    )
    return Stored("float", "contained", operation, notes=(note, *unquantized))


def _input(operation: str, weight: Format, input_: Format) -> tuple[Mode, Format, tuple[str, ...]]:
    """How an operation with a quantized weight treats its input."""
    is_signed = weight.signed and not weight.has_zero_point
    if input_.is_float or operation == "EMBEDDING_LOOKUP" or not is_signed:
        return "weight", FLOAT, ()
    if _is_dynamic(input_):
        runs = PER_ROW if operation == "FULLY_CONNECTED" else PER_SAMPLE
        return "dynamic", runs, (_found(runs),)
    if not input_.is_static_integer:
        return "weight", FLOAT, ()
    runs = input_ if input_.bits in (8, 16) else replace(input_, bits=8)
    if runs.bits == 16 and (runs.has_zero_point or not runs.signed):
        runs = INT16
    wider = (f"{input_} becomes {runs} over the same range",) if runs != input_ else ()
    rounded = "LiteRT rounds the layer's output as well, in a range of its own, and for all operations that read it"
    return "static", runs, (*wider, rounded)


def _is_dynamic(format: Format) -> bool:
    return format.is_dynamic and format.grid == "int" and format.bits <= 8


def _is_blockwise(layer: Layer, weight: Format) -> bool:
    is_signed = weight.grid == "int" and weight.scale == "fp32" and weight.signed and not weight.has_zero_point
    return is_signed and weight.bits == 4 and weight.group in BLOCKS and layer.weight_shape[-1] % weight.group == 0


def _found(runs: Format) -> str:
    rows = "row" if runs == PER_ROW else "sample"
    return f"LiteRT's kernel finds 8-bit scales and zero points of the input itself, for every {rows}"


def op_config(stored: Stored, precision: Precision) -> dict[str, Any]:
    """Returns ai-edge-quantizer's configuration of an operation, as its recipes hold it."""
    weight = precision.weight
    granularity = "TENSORWISE" if weight.granularity == "tensor" else "CHANNELWISE"
    tensor = {
        "num_bits": stored.bits,
        "symmetric": weight.signed and not weight.has_zero_point,
        "granularity": f"BLOCKWISE_{weight.group}" if weight.granularity == "group" else granularity,
        "dtype": "FLOAT" if stored.mode == "cast" else "INT",
    }
    if stored.mode == "cast":
        tensor |= {"symmetric": True, "granularity": "TENSORWISE"}
    is_integer = stored.mode in ("static", "dynamic")
    config = {
        "weight_tensor_config": tensor,
        "compute_precision": "INTEGER" if is_integer else "FLOAT",
        "explicit_dequantize": not is_integer,
    }
    if stored.mode == "static":
        config["activation_tensor_config"] = {
            "num_bits": stored.input.bits,
            "symmetric": stored.input.signed and not stored.input.has_zero_point,
            "granularity": "TENSORWISE",
            "dtype": "INT",
        }
    return config


def weight_ends(stored: Stored, format: Format, scale: Any, zero_point: Any) -> tuple[Any, Any]:
    """Returns the smallest and largest value whose range gives a weight its own scale again.

    Args:
        stored: How the weight is stored.
        format: The weight's format.
        scale: Its scales, float64.
        zero_point: Its zero points, likewise; ignored where it has none.
    """
    if format.signed and not format.has_zero_point:
        highest = scale * (2 ** (stored.bits - 1) - 1)
        return -highest, highest
    first = zero_point - format.lowest if format.has_zero_point else 0 * scale
    return -first * scale, (2**stored.bits - 1 - first) * scale


def input_ends(stored: Stored, format: Format, scale: float, zero_point: int) -> tuple[float, float]:
    """Returns the ends of an input's range, from the plan's scale and zero point."""
    low, high = (format.lowest - zero_point) * scale, (format.highest - zero_point) * scale
    if stored.input.has_zero_point or not stored.input.signed:
        return low, high
    reach = high if format.signed and not format.has_zero_point else max(-low, high)
    return -reach, reach
