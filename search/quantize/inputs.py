"""What a layer's input goes through: a static range, or scales found at run time for every token, sample or group."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from hwmodels import Format
from search.quantize.affine import SMALLEST_SCALE, Range, minmax_scale
from search.quantize.grid import on_grid
from search.quantize.minifloat import cast_type, microscale, nvfp4_scales

InputQuantizer = Callable[..., Tensor]  # (x, out=None) -> quantized x


def input_quantizer(format: Format, range_: Range | None, axis: int) -> InputQuantizer:
    """Returns the function `(x, out=None) -> x` that puts a layer's input into a format, shape and type kept.

    Dynamic formats take the range of the values at hand: of one token (a position, over its features), one sample
    (along axis 0) or one group of consecutive features; never of a batch, so that results do not depend on how samples
    are batched. NVFP4's tensor scale is that of a sample. Values that share a scale with NaN or infinity become NaN.

    `out` is float32 memory shaped as `x`; it holds the result where `x` is float32 too and the format is no cast.

    Args:
        format: A format that inputs can have.
        range_: Of a static format; dynamic formats and casts take none.
        axis: Of the features: -1 for linear layers, 1 for convolutions.

    Raises:
        ValueError: If the format is not for inputs, or is static and has no range.
    """
    format.check("input")
    if format.is_float:
        return lambda x, out=None: x
    if format.grid == "cast":
        return lambda x, out=None: x.to(cast_type(format)).to(x.dtype)
    if format.is_dynamic:
        return _in_float32(lambda x, out: _dynamic(x, format, axis, out))
    if range_ is None:
        raise ValueError(f"{format} inputs are static and need a range; {format.base}-token finds its own")
    return _in_float32(lambda x, out: on_grid(x, format, range_.scale, range_.zero_point, out))


def _in_float32(quantize: Callable[[Tensor, Tensor | None], Tensor]) -> InputQuantizer:
    def quantizer(x: Tensor, out: Tensor | None = None) -> Tensor:
        return quantize(x, out) if x.dtype == torch.float32 else quantize(x.float(), None).to(x.dtype)

    return quantizer


def _dynamic(x: Tensor, format: Format, axis: int, out: Tensor | None) -> Tensor:
    if not x.numel():
        return x
    if format.granularity == "token":
        return _by_range(x, format, [axis], out)
    if format.granularity == "sample":
        return _by_range(x, format, _within_sample(x), out)
    axis %= x.dim()
    features = x.shape[axis]
    size = min(format.group, features)
    if features % size == 0:
        into = None if out is None else torch.unflatten(out, axis, (-1, size))
        return _by_range(torch.unflatten(x, axis, (-1, size)), format, [axis + 1], into).flatten(axis, axis + 1)
    padded = torch.unflatten(F.pad(x.movedim(axis, -1), (0, -features % size)), -1, (-1, size))
    values = _by_range(padded, format, [padded.dim() - 1], None).flatten(-2)[..., :features].movedim(-1, axis)
    return torch.empty_like(x).copy_(values) if out is None else out.copy_(values)


def _within_sample(x: Tensor) -> list[int]:
    """The dimensions within one sample; a tensor of one dimension is one sample."""
    return list(range(min(1, x.dim() - 1), x.dim()))


def _by_range(x: Tensor, format: Format, dims: list[int], out: Tensor | None) -> Tensor:
    """Quantizes with one range for the values along `dims`, the smallest that clips none of them."""
    if format.grid == "int" and format.scale == "fp32":
        scale, zero_point = minmax_scale(x.amin(dims, keepdim=True), x.amax(dims, keepdim=True), format)
        return on_grid(x, format, scale, 0 if zero_point is None else zero_point, out)
    largest = x.abs().amax(dims, keepdim=True)
    if format.scale == "e4m3":
        scale, sample_scale = nvfp4_scales(largest, largest.amax(_within_sample(x), keepdim=True))
        step = scale * sample_scale
    elif format.scale == "e8m0":
        step = microscale(largest, format)
    else:
        step = (largest / format.largest).clamp_min_(SMALLEST_SCALE)
    return on_grid(x, format, step, out=out)
