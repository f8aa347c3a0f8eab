"""Tensors in formats: which codes their values get, and which values the codes stand for.

A format's parameters place its codes on the number line for one weight, with an entry per group of `grouping`:

    int minifloat mx   scale, for mx a power of two; zero_point, int32, where the format has one
    nvfp4              scale, a value of e4m3, and tensor_scale, one for all groups; their product is the step
    binary nf4         scale; binary-stochastic also seed, one for all groups
    ternary ttq        scale, threshold; ttq also negative_scale
    codebook           codebook, shape (groups, 2**bits), ascending

Arithmetic is in float32 whatever the weight's type, and rounding is half to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwmodels import Format
from search.quantize import binary, codebook
from search.quantize.affine import SMALLEST_SCALE, affine_steps
from search.quantize.grid import on_grid
from search.quantize.grouping import Groups, to_groups
from search.quantize.inputs import InputQuantizer, input_quantizer
from search.quantize.minifloat import (
    cast_type,
    microscale,
    minifloat_codes,
    minifloat_values,
    nvfp4_scales,
    round_minifloat,
)

__all__ = [
    "InputQuantizer",
    "Parameters",
    "check_values",
    "decode",
    "defined_parameters",
    "encode",
    "input_quantizer",
    "parameter_names",
    "quantize_rows",
    "quantize_weight",
]

Parameters = dict[str, Tensor]


def quantize_weight(weight: Tensor, format: Format, axis: int, parameters: Parameters) -> Tensor:
    """Returns the values that a weight takes in a format, in its own shape, type and memory layout.

    Args:
        weight: Of any shape; output channels along `axis`.
        format: How it is to be stored.
        axis: Of the output channels.
        parameters: What places the format's codes, as `defined_parameters` or a range method returns it.
    """
    if format.is_float:
        return weight
    groups = to_groups(weight, format, axis)
    return groups.restore(quantize_rows(groups.rows, format, parameters).to(weight.dtype))


def quantize_rows(rows: Tensor, format: Format, parameters: Parameters) -> Tensor:
    """Returns the values that rows of groups take, float32: `decode(encode(rows))`, where possible without codes."""
    if format.grid == "cast":
        return rows.to(cast_type(format)).float()
    if format.grid in ("int", "minifloat"):
        return on_grid(rows.float(), format, _step(parameters), _zero_point(parameters))
    return decode(encode(rows, format, parameters), format, parameters)


def encode(rows: Tensor, format: Format, parameters: Parameters) -> Tensor:
    """Returns the codes of rows of groups, int32 of the same shape.

    Integers give their code, zero point included; floats of all kinds their bits; binary and ternary formats -1, 0 and
    1; codebooks an index.

    Args:
        rows: Shape `(groups, values)`.
        format: Any format.
        parameters: Of the same groups.
    """
    rows = rows.float()
    match format.grid:
        case "int":
            zero_point = _zero_point(parameters)
            return affine_steps(rows, _step(parameters), format, zero_point).int() + zero_point
        case "minifloat":
            return minifloat_codes(round_minifloat(rows / _step(parameters), format), format)
        case "cast":
            return rows.to(cast_type(format)).view(torch.int16).int() & 0xFFFF
        case "binary" if format.is_stochastic:
            return binary.random_signs(rows, parameters["scale"], int(parameters["seed"]))
        case "binary":
            return binary.signs(rows)
        case "ternary" | "ttq":
            return binary.ternary_codes(rows, parameters["threshold"])
        case "nf4":
            scale = parameters["scale"][:, None].clamp_min(SMALLEST_SCALE)
            return codebook.nearest(rows / scale, codebook.nf4_book(rows.device))
        case "codebook":
            return codebook.nearest(rows, parameters["codebook"])
    return rows.view(torch.int32)


def decode(codes: Tensor, format: Format, parameters: Parameters) -> Tensor:
    """Returns the values of codes, float32 rows of groups; the inverse of `encode` on the format's grid."""
    match format.grid:
        case "int":
            return (codes - _zero_point(parameters)) * _step(parameters)
        case "minifloat":
            return minifloat_values(codes, format) * _step(parameters)
        case "cast":
            return codes.to(torch.int16).view(cast_type(format)).float()
        case "binary" | "ternary":
            return codes * parameters["scale"][:, None]
        case "ttq":
            scale, negative_scale = parameters["scale"][:, None], parameters["negative_scale"][:, None]
            return torch.where(codes > 0, scale, -negative_scale) * codes.abs()
        case "nf4":
            return codebook.nf4_book(codes.device)[0][codes.long()] * parameters["scale"][:, None]
        case "codebook":
            return parameters["codebook"].gather(1, codes.long())
    return codes.view(torch.float32)


def defined_parameters(weight: Tensor, format: Format, axis: int, seed: int = 0) -> Parameters | None:
    """Returns the parameters that follow from the format and the weight alone.

    None for integers and minifloats under float32 scales, whose scale is a range that a method chooses.

    Args:
        weight: Of any shape; output channels along `axis`.
        format: How it is to be stored.
        axis: Of the output channels.
        seed: Of random rounding, and of the sample that k-means draws from very large groups.

    Raises:
        ValueError: If the weight is empty, holds NaN or infinite values, or values that a cast cannot hold.
    """
    check_values(weight, format)
    if format.grid in ("float", "cast"):
        return {}
    if format.grid in ("int", "minifloat") and format.scale == "fp32":
        return None
    groups = to_groups(weight, format, axis)
    return _defined(groups, groups.rows.float(), format, seed)


def _defined(groups: Groups, rows: Tensor, format: Format, seed: int) -> Parameters:
    if format.grid == "codebook":
        return {"codebook": codebook.kmeans(rows, 1 << format.bits, groups.mask, seed)}
    if format.grid == "binary":
        drawn = {"seed": torch.tensor(seed)} if format.is_stochastic else {}
        return binary.bwn_parameters(rows, groups.mask) | drawn
    if format.grid == "ternary":
        return binary.twn_parameters(rows, groups.mask)
    if format.grid == "ttq":
        return binary.ttq_parameters(rows)
    largest = rows.abs().amax(1)
    if format.scale == "e4m3":
        scale, tensor_scale = nvfp4_scales(largest, largest.amax())
        return {"scale": scale, "tensor_scale": tensor_scale}
    return {"scale": microscale(largest, format) if format.scale == "e8m0" else largest}


def parameter_names(format: Format) -> tuple[str, ...]:
    """Names of the parameters of a weight in `format`."""
    beside = {
        "float": (),
        "cast": (),
        "codebook": ("codebook",),
        "ternary": ("scale", "threshold"),
        "ttq": ("scale", "threshold", "negative_scale"),
    }.get(format.grid, ("scale",))
    extra = {"zero_point": format.has_zero_point, "seed": format.is_stochastic, "tensor_scale": format.scale == "e4m3"}
    return (*beside, *(name for name, is_needed in extra.items() if is_needed))


def check_values(weight: Tensor, format: Format) -> None:
    """Raises ValueError unless a weight has values, all finite, and none too large for a cast to `format`."""
    if not weight.numel():
        raise ValueError("there is no value")
    low, high = (float(end) for end in weight.aminmax())
    if low != low:
        raise ValueError("a value is NaN")
    largest = max(-low, high)
    if largest == torch.inf:
        raise ValueError("a value is infinite")
    if format.grid == "cast" and largest > torch.finfo(cast_type(format)).max:
        raise ValueError(f"the value {largest:g} is larger than {format} can hold")


def _step(parameters: Parameters) -> Tensor:
    """What one unit of the grid is worth, shape `(groups, 1)`."""
    scale = parameters["scale"][:, None]
    return scale * parameters["tensor_scale"] if "tensor_scale" in parameters else scale


def _zero_point(parameters: Parameters) -> Tensor | int:
    """The code of the value zero, shape `(groups, 1)`; 0 where all groups have that."""
    return parameters["zero_point"][:, None] if "zero_point" in parameters else 0
