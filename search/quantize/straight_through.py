"""Fake quantization: the engine's values going forward, a straight-through estimator going backward.

Rounding has no useful derivative, so the gradient of a value `x` passes as if nothing were rounded (Bengio et al.,
2013, arXiv 1308.3432), and stops where clipping, not rounding, decides the result:

    grid             d/dx                               d/d(parameter), summed over the values that share it
    int, minifloat   1 inside the range, 0 outside      scale: (value - x) / scale inside, value / scale outside
    binary           1 where |x| <= scale, else 0       scale: the sign
    ternary          1                                  scale: the code
    ttq              scale, 1 or negative_scale         scale: 1 where positive; negative_scale: -1 where negative
    codebook         1                                  an entry: 1 where it is the value
    cast, nf4, mx*   1                                  none: their scales follow from the values
    dynamic inputs   1                                  none, likewise

The range reaches from the value of the lowest code to that of the highest. The scale's gradient is that of LSQ (Esser
et al., 2020, arXiv 1902.08153, equation 3), TTQ's are equations 7 and 8 of Zhu et al., 2017 (arXiv 1612.01064), and a
codebook's is that of Deep Compression (Han et al., 2016, arXiv 1510.00149, section 3.3). torch's fake-quantize
operators differ in the half step beyond either end that rounds to the last code: they call it inside.

Zero points stay fixed, so that zero keeps its code: the scale moves both ends, where LSQ+ (Bhalgat et al., 2020, arXiv
2004.09576) learns an offset too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hwmodels import Format
from search.quantize.affine import Range
from search.quantize.formats import Parameters, decode, encode, input_quantizer, quantize_rows
from search.quantize.grouping import to_groups

LEARNED = {
    "int": ("scale",),
    "minifloat": ("scale",),
    "ttq": ("scale", "negative_scale"),
    "codebook": ("codebook",),
}
"""Grid to the parameters that fine-tuning learns; those of other grids follow from the weights."""


def learned_parameters(format: Format) -> tuple[str, ...]:
    """Names the parameters of a weight format that have a gradient worth following."""
    return LEARNED.get(format.grid, ()) if format.scale == "fp32" else ()


def fake_quantize(weight: Tensor, format: Format, axis: int, parameters: Parameters) -> Tensor:
    """Returns what `quantize_weight` returns, bit for bit, with gradients for `weight` and `parameters`.

    Args:
        weight: Of any shape and floating type; output channels along `axis`.
        format: How it is to be stored.
        axis: Of the output channels.
        parameters: What places the format's codes; those that require a gradient get one.
    """
    if format.is_float:
        return weight
    groups = to_groups(weight, format, axis)
    return groups.restore(_fake_rows(groups.rows.float(), format, parameters).to(weight.dtype))


def _fake_rows(rows: Tensor, format: Format, parameters: Parameters) -> Tensor:
    fixed = {name: value.detach() for name, value in parameters.items()}
    if format.grid in ("int", "minifloat") and format.scale == "fp32":
        zero_point = fixed["zero_point"][:, None] if "zero_point" in fixed else 0
        scale = parameters["scale"][:, None]
        return _clipped(rows, scale, zero_point, format, lambda rows: quantize_rows(rows, format, fixed))
    if format.grid not in ("binary", "ternary", "ttq", "codebook"):
        return _with_slope(quantize_rows(rows.detach(), format, fixed), rows)
    codes = encode(rows.detach(), format, fixed)
    values = decode(codes, format, parameters)
    if format.grid == "binary":
        return _with_slope(values, rows, (rows.detach().abs() <= fixed["scale"][:, None]).float())
    if format.grid == "ttq":
        scale, negative_scale = fixed["scale"][:, None], fixed["negative_scale"][:, None]
        return _with_slope(values, rows, torch.where(codes > 0, scale, torch.where(codes < 0, negative_scale, 1.0)))
    return _with_slope(values, rows)


def fake_quantize_input(
    x: Tensor, format: Format, axis: int, scale: Tensor | None = None, zero_point: int = 0
) -> Tensor:
    """Returns what `input_quantizer` makes of `x`, bit for bit, with gradients for `x` and `scale`.

    Args:
        x: A layer's input.
        format: A format that inputs can have.
        axis: Of the features: -1 for linear layers, 1 for convolutions.
        scale: Step of a static range, float32 of shape `()`; None for dynamic formats and casts.
        zero_point: Code of the value zero.
    """
    if format.is_float:
        return x
    if scale is None:
        return _with_slope(input_quantizer(format, None, axis)(x.detach()), x)
    quantize = input_quantizer(format, Range(float(scale.detach()), zero_point), axis)
    return _clipped(x, scale, zero_point, format, quantize)


def damped(scale: Tensor, values: int, format: Format) -> Tensor:
    """Returns `scale` with its gradient divided by `sqrt(values * highest)`, as LSQ balances it against the weights'.

    Args:
        scale: Of any shape.
        values: How many values share one scale.
        format: An integer or a minifloat.
    """
    return scale.detach() + (scale - scale.detach()) / math.sqrt(max(values, 1) * _ends(format)[1])


def _ends(format: Format) -> tuple[float, float]:
    """The lowest and the highest code, zero point not counted."""
    return (format.lowest, format.highest) if format.grid == "int" else (-format.largest, format.largest)


def _with_slope(values: Tensor, x: Tensor, slope: Tensor | float = 1.0) -> Tensor:
    """Returns `values`, whose derivative with respect to `x` is `slope`."""
    return values + (x - x.detach()) * slope


def _clipped(
    x: Tensor, scale: Tensor, zero_point: Tensor | int, format: Format, quantize: Callable[[Tensor], Tensor]
) -> Tensor:
    low, high = ((end - zero_point) * scale.detach() for end in _ends(format))
    clipped: Tensor = _Clipped.apply(x, scale, low, high, quantize)  # type: ignore[no-untyped-call]
    return clipped


class _Clipped(torch.autograd.Function):
    """`quantize(x)`, whose values lie from `low` to `high`, with LSQ's gradients; `x` may be overwritten afterwards."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, quantize: Callable[[Tensor], Tensor]
    ) -> Tensor:
        values = quantize(x)
        exact = x.float()
        inside = (exact >= low) & (exact <= high)
        moved = values.float() - torch.where(inside, exact, 0.0) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside, moved, scale)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inside, moved, scale = ctx.saved_tensors
        to_scale = None if moved is None else (gradient.float() * moved).sum_to_size(scale.shape) / scale
        return gradient * inside, to_scale, None, None, None
