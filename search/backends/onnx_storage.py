"""Which ONNX types hold the codes of a format, and where integer kernels may multiply them.

Checked against the operators of onnx 1.23.2 (`QuantizeLinear` and `DequantizeLinear` of opsets 21 and 25) and the
graph optimizers of onnxruntime 1.32.0.
"""

from __future__ import annotations

from hwmodels import FLOAT, Format, Precision

CAST_TYPES = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}
WIDTHS = (2, 4, 8, 16)  # bits of ONNX's integer types


def input_storage(format: Format) -> Format:
    """Returns the format of 8 or 16 bits that holds an input format's codes."""
    return Format(8 if format.bits <= 8 else 16, signed=format.signed)


def takes_input(format: Format) -> bool:
    """True for the input formats an ONNX graph can state: float, casts, and integers under one static range.

    `int1` has the codes -1 and 1 and no zero between them, which no `QuantizeLinear` rounds to.
    """
    is_static_integer = format.is_static_integer and not (format.bits == 1 and format.signed)
    return format.is_float or format.grid == "cast" or is_static_integer


def weight_storage(format: Format, narrowest: int = 4) -> Format:
    """Returns the format that holds a weight format's codes: integers of 2, 4, 8 or 16 bits, fp16 or bf16.

    Float where ONNX has no type for the codes: their values are stored.

    Args:
        format: A weight's.
        narrowest: Fewest bits of an integer: 4, or 2 for the types that opset 25 has and 21 has not.
    """
    if format.grid == "cast":
        return format
    if format.grid not in ("int", "binary", "ternary"):
        return FLOAT
    bits = 2 if format.grid != "int" else format.bits
    return Format(next(width for width in WIDTHS if width >= max(bits, narrowest)), signed=format.signed)


def onnx_type(storage: Format) -> str:
    """Returns ONNX's name of the type that a storage format is."""
    return "FLOAT" if storage.is_float else CAST_TYPES.get(str(storage)) or str(storage).upper()


def has_integer_kernel(precision: Precision, kind: str = "") -> bool:
    """Whether integer kernels exist for a layer in a precision, if what follows it lets the runtime use them.

    They take 8 bits at most, one scale per channel or tensor, and signed inputs with signed weights only. There are
    none for transposed convolutions.
    """
    weight, input_ = precision.weight, precision.input
    is_blocked = weight.granularity == "group" or weight_storage(weight).grid != "int"
    is_integer = takes_input(input_) and input_.is_static_integer and max(weight.bits, input_.bits) <= 8
    is_possible = is_integer and not is_blocked and not kind.startswith("conv_transpose")
    return is_possible and (weight.signed or not input_.signed)
