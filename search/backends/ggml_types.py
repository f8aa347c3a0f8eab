"""How ggml, llama.cpp's library of tensors, stores weights, and which of its types is nearest to a format.

Types are blocks of values under scales of their own (`ggml/src/ggml-common.h`; `gguf/constants.py` of gguf 0.19).
"""

from __future__ import annotations

from dataclasses import dataclass

from hwmodels import Format, Layer, Precision

KINDS = {"linear", "embedding"}
UNQUANTIZED = "wpe"  # position embeddings, which llama-quantize always leaves alone


@dataclass(frozen=True)
class GgmlType:
    """How ggml stores a row of a matrix.

    Attributes:
        block: Values in a block; a row must be a whole number of blocks.
        bytes: Bytes of a block, scales included.
        format: The bitplan format nearest to it.
        scale: What its scales are.
    """

    block: int
    bytes: int
    format: Format
    scale: str = ""

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.bytes / self.block


def _type(block: int, size: int, format: str, scale: str = "") -> GgmlType:
    return GgmlType(block, size, Format.parse(format), scale)


TYPES: dict[str, GgmlType] = {
    "f32": _type(1, 4, "float"),
    "f16": _type(1, 2, "fp16"),
    "bf16": _type(1, 2, "bf16"),
    "q8_0": _type(32, 34, "int8-g32", "fp16 scales"),
    "q6_k": _type(256, 210, "int6-full-g16", "8-bit scales under one in fp16 for 256 values"),
    "q5_0": _type(32, 22, "int5-full-g32", "fp16 scales"),
    "q5_1": _type(32, 24, "uint5-g32", "fp16 scales and minima"),
    "q4_0": _type(32, 18, "int4-full-g32", "fp16 scales"),
    "q4_1": _type(32, 20, "uint4-g32", "fp16 scales and minima"),
    "iq4_nl": _type(32, 18, "nf4-g32", "fp16 scales, over ggml's own 16 values"),
    "mxfp4": _type(32, 17, "mxfp4", "powers of two, values half way rounded down"),
    "q3_k": _type(256, 110, "int3-full-g16", "6-bit scales under one in fp16 for 256 values"),
    "q2_k": _type(256, 84, "uint2-g16", "4-bit scales and minima under two in fp16 for 256 values"),
    "tq2_0": _type(256, 66, "ternary-g256", "fp16 scales, the largest magnitude"),
    "q1_0": _type(128, 18, "binary-g128", "fp16 scales"),
}
"""By the names that llama-quantize reads."""

WIDER = {"q6_k": "q8_0", "q3_k": "q4_0", "q2_k": "q4_0", "tq2_0": "q4_0", "q1_0": "q4_0"}
"""What a row gets that is no whole number of large blocks; where it is none of 32 either, f16."""


def type_of(layer: Layer, format: Format) -> str:
    """Returns the ggml type that a layer's weight gets, by its format and the length of its rows."""
    if format.is_float or layer.kind not in KINDS or layer.name.endswith(UNQUANTIZED):
        return "f32"
    wanted = _wanted(format)
    row = layer.weight_shape[-1]
    if row % TYPES[wanted].block:
        wanted = WIDER.get(wanted, "f16")
    return "f16" if row % TYPES[wanted].block else wanted


def _wanted(format: Format) -> str:
    """The ggml type nearest to a format, whatever the row."""
    match format.grid:
        case "cast":
            return "f16" if format.exponent_bits == 5 else "bf16"
        case "binary":
            return "q1_0"
        case "ternary" | "ttq":
            return "tq2_0"
        case "nf4":
            return "iq4_nl"
        case "minifloat" if format.bits == 4:
            return "mxfp4"
    by_bits = {1: "q1_0", 2: "q2_k", 3: "q3_k", 4: "q4_0", 5: "q5_0", 6: "q6_k"}
    if format.has_zero_point:
        by_bits |= {4: "q4_1", 5: "q5_1"}
    return by_bits.get(format.bits, "q8_0")


def notes_on(layer: Layer, precision: Precision, name: str) -> list[str]:
    """Says what a layer's ggml type, of that name, means for it."""
    stored, weight = TYPES[name], precision.weight
    notes = []
    if not weight.is_float and name == "f32":
        what = "position embeddings" if layer.kind in KINDS else f"{layer.kind} weights"
        notes.append(f"llama-quantize leaves {what} alone")
    elif name == "f16" and weight.grid != "cast":
        notes.append(
            f"rows of {layer.weight_shape[-1]} values are no whole number of ggml's blocks, so they stay in f16"
        )
    elif weight.grid not in ("float", "cast"):
        blocks = f"blocks of {stored.format.group or 32}, {stored.scale}"
        notes.append(
            f"{name} is {stored.format} in {stored.bits:g} bits per weight: {blocks}, which llama-quantize finds"
        )
        if name != _wanted(weight):
            notes.append(f"{_wanted(weight)} needs rows in blocks of {TYPES[_wanted(weight)].block}")
    if not precision.input.is_float:
        notes.append("GGUF has no format for inputs; CPU kernels round them to int8 in blocks of 32 as they go")
    return notes
