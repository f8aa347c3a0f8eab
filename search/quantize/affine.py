"""Affine quantization: codes `q = clamp(round(x / scale) + zero_point)`, values `(q - zero_point) * scale`.

Rounding is half to even, as in ONNX QuantizeLinear; scales are float32, so that runtimes reproduce the values exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hwmodels import Format


@dataclass(frozen=True)
class Range:
    """The affine parameters of one tensor's input format.

    Attributes:
        scale: Step between neighbouring codes, as a float32 can hold it.
        zero_point: Code of the value zero; 0 for symmetric formats.
    """

    scale: float
    zero_point: int = 0


def per_channel(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """Shapes one value per channel, `(channels,)`, so that it broadcasts along `axis` of `like`."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.view(shape)


def weight_codes(weight: Tensor, scale: Tensor, format: Format, axis: int) -> Tensor:
    """Returns the integer codes of `weight` as a float tensor of its shape; `scale` has one entry per channel."""
    return (weight / per_channel(scale, weight, axis)).round_().clamp_(format.lowest, format.highest)


def quantize_weight(weight: Tensor, scale: Tensor, format: Format, axis: int) -> Tensor:
    """Returns the values that `weight` takes in a symmetric format, with one scale per channel along `axis`."""
    return weight_codes(weight, scale, format, axis) * per_channel(scale, weight, axis)


def quantize_input(x: Tensor, range_: Range, format: Format, out: Tensor | None = None) -> Tensor:
    """Returns the values that `x` takes in `format`, of the same shape.

    Clamping before the zero point is added gives the same codes and saves a pass.

    Args:
        x: The values.
        range_: Scale and zero point.
        format: Says which codes there are.
        out: Memory for the result, shaped as `x`; new memory by default.
    """
    if x.dtype != torch.float32:
        return quantize_input(x.float(), range_, format).to(x.dtype)
    lowest, highest = format.lowest - range_.zero_point, format.highest - range_.zero_point
    return torch.div(x, range_.scale, out=out).round_().clamp_(lowest, highest).mul_(range_.scale)
