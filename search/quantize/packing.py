"""Quantized weights as they are stored: a stream of bits with the codes, and behind them what places the codes.

The stream has `format.storage_bits` bits exactly, which is what the effective bits of a format count, and holds all
that is needed to get the values back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwmodels import Format
from hwmodels.precision import SCALE_BITS
from search.quantize.formats import Parameters, decode, encode
from search.quantize.grouping import to_groups
from search.quantize.minifloat import E4M3, FLOAT32_BIAS, minifloat_codes, minifloat_values, power_of_two

MXINT8_POINT = 6  # MXINT8's elements are whole 64ths, so the stored scale is 2**6 steps

Bits = NDArray[np.uint8]  # one bit per entry


@dataclass(frozen=True)
class Packed:
    """A weight as it is stored.

    Attributes:
        data: The stream, uint8 on the CPU, lowest bit first; the last byte may be filled up with zeros.
        bits: Length of the stream.
        format: What the codes mean.
        shape: Of the weight.
        axis: Of its output channels.
        dtype: Type that the model computes in.
    """

    data: Tensor
    bits: int
    format: Format
    shape: tuple[int, ...]
    axis: int
    dtype: torch.dtype


def pack(weight: Tensor, format: Format, axis: int, parameters: Parameters) -> Packed:
    """Returns the stream of a weight in a format; `unpack` gives back what `quantize_weight` returns.

    Args:
        weight: Of any shape; output channels along `axis`.
        format: How it is to be stored.
        axis: Of the output channels.
        parameters: What places the format's codes.
    """
    groups = to_groups(weight.detach(), format, axis)
    codes = encode(groups.rows, format, parameters)
    codes = codes if groups.mask is None else codes[groups.mask]
    parts = [_to_bits(_unsigned(codes, format), format.bits)]
    for name, _, kind, width in _fields(format, len(groups.rows)):
        parts.append(_to_bits(_to_integers(parameters[name], kind, format), width))
    stream = np.concatenate(parts)
    data = torch.from_numpy(np.packbits(stream, bitorder="little"))
    return Packed(data, len(stream), format, tuple(weight.shape), axis, weight.dtype)


def unpack(packed: Packed) -> Tensor:
    """Returns the values of a packed weight, on the CPU, in its shape and type."""
    format, stream = packed.format, np.unpackbits(packed.data.numpy(), count=packed.bits, bitorder="little")
    groups = to_groups(torch.zeros(packed.shape), format, packed.axis)
    start = prod(packed.shape) * format.bits
    codes = _signed(_from_bits(stream[:start], format.bits), format)
    rows = torch.zeros(groups.rows.shape, dtype=torch.int32)
    rows[torch.ones_like(rows, dtype=torch.bool) if groups.mask is None else groups.mask] = codes
    parameters = {}
    for name, shape, kind, width in _fields(format, len(rows)):
        end = start + prod(shape) * width
        parameters[name] = _to_values(_from_bits(stream[start:end], width), kind, format).reshape(shape)
        start = end
    return groups.restore(decode(rows, format, parameters)).to(packed.dtype)


def _fields(format: Format, groups: int) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """Name, shape, type and bits of what stands behind the codes, in this order; thresholds and seeds do not."""
    if format.grid == "codebook":
        yield "codebook", (groups, 1 << format.bits), "fp32", 32
    elif format.scale != "none":
        yield "scale", (groups,), format.scale, SCALE_BITS[format.scale]
        if format.grid == "ttq":
            yield "negative_scale", (groups,), "fp32", 32
        if format.has_zero_point:
            yield "zero_point", (groups,), "code", format.bits
        if format.scale == "e4m3":
            yield "tensor_scale", (), "fp32", 32


def _to_integers(values: Tensor, kind: str, format: Format) -> Tensor:
    """Parameters as the unsigned integers that are stored, or signed ones of the same 32 bits."""
    if kind == "code":
        return values.int() - format.lowest
    if kind == "e8m0":
        return torch.frexp(values)[1] - 1 + _e8m0_bias(format)
    return minifloat_codes(values, E4M3) if kind == "e4m3" else values.float().contiguous().view(torch.int32)


def _to_values(integers: Tensor, kind: str, format: Format) -> Tensor:
    """The inverse of `_to_integers`."""
    if kind == "code":
        return integers + format.lowest
    if kind == "e8m0":
        return power_of_two(integers - _e8m0_bias(format))
    return minifloat_values(integers, E4M3) if kind == "e4m3" else integers.view(torch.float32)


def _e8m0_bias(format: Format) -> int:
    return FLOAT32_BIAS + (MXINT8_POINT if format.grid == "int" else 0)


def _unsigned(codes: Tensor, format: Format) -> Tensor:
    """Codes as they are stored: counted from the lowest, a sign as 0 or 1."""
    if _is_sign(format):
        return (codes + 1) // 2
    return codes - _lowest(format)


def _signed(integers: Tensor, format: Format) -> Tensor:
    """The inverse of `_unsigned`."""
    return integers * 2 - 1 if _is_sign(format) else integers + _lowest(format)


def _is_sign(format: Format) -> bool:
    return format.bits == 1 and format.signed and format.grid in ("int", "binary")


def _lowest(format: Format) -> int:
    if format.grid in ("ternary", "ttq"):
        return -1
    return format.lowest if format.grid == "int" else 0


def _to_bits(integers: Tensor, width: int) -> Bits:
    """The lowest `width` bits of each integer, lowest first."""
    unsigned = integers.int().cpu().numpy().reshape(-1, 1).astype("<i4").view(np.uint8)
    return np.unpackbits(unsigned, axis=1, count=width, bitorder="little").reshape(-1)


def _from_bits(bits: Bits, width: int) -> Tensor:
    """The inverse of `_to_bits`, int32."""
    unsigned = np.packbits(bits.reshape(-1, width), axis=1, bitorder="little")
    whole = np.zeros((len(unsigned), 4), np.uint8)
    whole[:, : unsigned.shape[1]] = unsigned
    return torch.from_numpy(whole.view("<i4").reshape(-1).astype(np.int32))
