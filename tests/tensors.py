"""Tensors of odd shapes, values and memory layouts, and the formats to try on them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hwmodels import Format
from search.quantize.affine import SMALLEST_SCALE, minmax_scale
from search.quantize.formats import Parameters, defined_parameters
from search.quantize.grouping import to_groups

INTEGERS = (
    *("int1", "int2", "int3", "int4", "int5", "int6", "int7", "int8", "int16"),
    *("uint1", "uint2", "uint3", "uint4", "uint8", "uint16", "uint1-sym", "uint4-sym", "uint8-sym"),
    *("int2-full", "int4-full", "int8-full", "int2-asym", "int4-asym", "int8-asym", "int16-asym"),
)
MINIFLOATS = ("fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1")
BLOCKS = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4")
GROUPED = ("int4-g7", "uint4-g32", "int8-asym-g5", "fp8_e4m3-g16", "fp4_e2m1-g3", "binary-g9", "ttq-g10", "nf4-g7")
SHARED = ("int8-tensor", "uint4-tensor", "fp6_e3m2-tensor", "binary-tensor", "ternary-tensor", "nf4-tensor")
CHOSEN = ("binary", "binary-stochastic", "ternary", "ttq", "nf4", "nf4-channel")
CODEBOOKS = ("codebook1", "codebook4", "codebook8", "codebook2-channel", "codebook3-g20")
CASTS = ("fp16", "bf16")
WEIGHT_FORMATS = ("float", *CASTS, *INTEGERS, *MINIFLOATS, *BLOCKS, *GROUPED, *SHARED, *CHOSEN, *CODEBOOKS)

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def gaussian(shape: Any, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def weights(draw: Any) -> tuple[Tensor, int]:
    """A weight of one to four dimensions in some memory layout, with zeros, outliers and ties, and its channel axis."""
    shape = draw(shapes)
    axis = draw(st.integers(0, len(shape) - 1))
    weight = gaussian(shape, draw(st.integers(0, 2**16))) * 2.0 ** draw(st.integers(-20, 20))
    values = draw(st.sampled_from(["as they are", "ties", "one outlier", "mostly zero", "all zero", "all the same"]))
    if values == "ties":
        weight = (weight / weight.abs().amax() * 8).round() / 2
    elif values == "one outlier":
        weight.view(-1)[0] *= 1000
    elif values == "mostly zero":
        weight = weight.where(weight > weight.abs().mean(), 0)
    elif values in ("all zero", "all the same"):
        weight = torch.full_like(weight, 0.0 if values == "all zero" else float(weight.view(-1)[0]))
    if draw(st.booleans()):
        weight = weight.transpose(0, -1).contiguous().transpose(0, -1)
    return weight, axis


def parameters_for(weight: Tensor, format: Format, axis: int) -> Parameters:
    """The format's own parameters; where the scale is a choice, the smallest that clips nothing."""
    found = defined_parameters(weight, format, axis)
    if found is not None:
        return found
    rows = to_groups(weight, format, axis).rows.float()
    if format.grid == "minifloat":
        return {"scale": (rows.abs().amax(1) / format.largest).clamp_min(SMALLEST_SCALE)}
    scale, zero_point = minmax_scale(rows.amin(1), rows.amax(1), format)
    return {"scale": scale} | ({} if zero_point is None else {"zero_point": zero_point.int()})
