"""Small floats: sign, a few exponent bits, a few mantissa bits, and the shared scales of their block formats.

Values are those of OCP's "8-bit Floating Point Specification" (OFP8) 1.0 and "Microscaling Formats" (MX) 1.0, with
subnormals, rounding half to even, and saturation: what is too large becomes the largest value, as both specifications
have it for saturating conversions, where casts of `ml_dtypes` give NaN or infinity for 8-bit floats.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from hwmodels import Format

FLOAT32_EXPONENT = 0x7F800000  # bits of the exponent of a float32
FLOAT32_BIAS = 127
SMALLEST_EXPONENT = -126  # of normal float32 values
E4M3 = Format.parse("fp8_e4m3")
SMALLEST_E4M3 = 2.0**-9
NVFP4_LARGEST = 448.0 * 6.0  # the largest e4m3 scale times the largest e2m1 value


def round_minifloat(x: Tensor, format: Format, out: Tensor | None = None) -> Tensor:
    """Returns the nearest value of a minifloat at scale 1, of the shape of `x`; NaN stays NaN.

    Between two powers of two a float is a grid of even step, so values are rounded in units of that step.

    Args:
        x: The values, float32.
        format: A minifloat.
        out: Memory for the result; may be `x` itself.
    """
    values = torch.clamp(x, -format.largest, format.largest, out=out)
    power = (values.detach().view(torch.int32) & FLOAT32_EXPONENT).view(torch.float32)
    step = power.clamp_min_(2.0 ** smallest_exponent(format)).mul_(2.0**-format.mantissa_bits)
    return values.div_(step).round_().mul_(step)


def cast_type(format: Format) -> torch.dtype:
    """The torch type of fp16 or bf16; what is too large for fp16 becomes infinite, as in any cast."""
    return torch.float16 if format.exponent_bits == 5 else torch.bfloat16


def smallest_exponent(format: Format) -> int:
    """Exponent of the smallest normal value of a minifloat; subnormals share it."""
    return 2 - (1 << (format.exponent_bits - 1))


@lru_cache(maxsize=32)
def magnitudes(format: Format) -> tuple[float, ...]:
    """The finite values of a minifloat that are not negative, in order: entry i is the value of the bits i."""
    mantissas = 1 << format.mantissa_bits
    values = []
    for code in range(1 << (format.bits - 1)):
        exponent, mantissa = divmod(code, mantissas)
        leading = 1 if exponent else 0
        power = max(exponent, 1) - 1 + smallest_exponent(format)
        values.append((leading + mantissa / mantissas) * 2.0**power)
    return tuple(value for value in values if value <= format.largest)


def minifloat_codes(values: Tensor, format: Format) -> Tensor:
    """Returns the bits of values that lie on a minifloat's grid at scale 1: sign, exponent, mantissa; int32."""
    table = torch.tensor(magnitudes(format), device=values.device)
    sign = torch.signbit(values).int() << (format.bits - 1)
    return torch.searchsorted(table, values.abs().contiguous(), out_int32=True) + sign


def minifloat_values(codes: Tensor, format: Format) -> Tensor:
    """Returns the values at scale 1 of a minifloat's bits, float32."""
    table = torch.tensor(magnitudes(format), device=codes.device)
    sign_bit = 1 << (format.bits - 1)
    values = table[(codes & (sign_bit - 1)).long()]
    return torch.where(codes >= sign_bit, -values, values)


def microscale(largest: Tensor, format: Format) -> Tensor:
    """Returns the shared scales of OCP MX blocks, powers of two, for the largest magnitude of each block.

    The scale brings the power of two of the largest magnitude onto that of the format's largest value; what then
    exceeds the largest value saturates (MX 1.0, section 6.3). MXINT8's elements are whole 64ths, so the scale given
    here, their step, is the stored one divided by 64. Scales below 2**-126, which no value above 2**-111 needs, are
    raised to it, since many kernels flush smaller floats to zero. A block with NaN or infinity has NaN for its scale.

    Args:
        largest: Largest magnitudes, float32.
        format: A block format with e8m0 scales.
    """
    top = math.frexp(format.largest)[1]
    exponent = (torch.frexp(largest)[1] - top).where(largest > 0, SMALLEST_EXPONENT)
    return power_of_two(exponent).where(largest.isfinite(), torch.nan)


def power_of_two(exponent: Tensor) -> Tensor:
    """Returns `2**exponent` exactly, float32; exponents below -126 count as -126."""
    return ((exponent.int().clamp_min(SMALLEST_EXPONENT) + FLOAT32_BIAS) << 23).view(torch.float32)


def nvfp4_scales(block_largest: Tensor, tensor_largest: Tensor) -> tuple[Tensor, Tensor]:
    """Returns NVFP4's two scales, whose product is the step: each block's, rounded to e4m3, and the tensor's, float32.

    The tensor's scale makes the block with the largest magnitude use the largest e4m3 scale (NVIDIA, "Pretraining Large
    Language Models with NVFP4", 2025, arXiv 2509.25149, appendix). A block's scale is at least the smallest e4m3 value,
    2**-9; torchao stops at the smallest normal one, 2**-6, and rounds blocks far below the tensor's largest to zero.

    Args:
        block_largest: Largest magnitude of each block, float32.
        tensor_largest: Largest magnitude of the tensor, or of each sample; broadcasts against `block_largest`.
    """
    tensor_scale = tensor_largest / NVFP4_LARGEST
    # Below float32's normal range nothing is left to divide by; such a tensor is all but zero.
    tensor_scale = torch.where(tensor_scale >= 2.0**SMALLEST_EXPONENT, tensor_scale, 1.0)
    scale = round_minifloat(block_largest / 6.0 / tensor_scale, E4M3).clamp_min_(SMALLEST_E4M3)
    return scale, tensor_scale
