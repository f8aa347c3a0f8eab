"""Affine quantization: codes `q = clamp(round(x / scale) + zero_point)`, values `(q - zero_point) * scale`.

Rounding is half to even, as in ONNX QuantizeLinear; scales are float32, so that runtimes reproduce the values exactly.
A value in units of the scale, `q - zero_point`, is called its steps: the whole number of steps it lies from zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hwmodels import Format

SMALLEST_SCALE = float(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Range:
    """What places a static format on the values of one tensor.

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


def affine_steps(
    x: Tensor,
    scale: Tensor | float,
    format: Format,
    zero_point: Tensor | int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Returns how many steps from zero each value is put: its code less the zero point, as a float.

    Clamping before the zero point is added gives the same codes and saves a pass. `int1` has the steps -1 and 1, and
    zero goes to 1.

    Args:
        x: The values, float32.
        scale: Positive; broadcasts against `x`.
        format: An integer format.
        zero_point: Code of the value zero, of the shape of `scale`.
        out: Memory for the result, shaped as `x`; new memory by default.
    """
    steps = torch.div(x, scale, out=out)
    if format.bits == 1 and format.signed:
        return steps.ge_(0).mul_(2).sub_(1)
    ends: Any = (format.lowest - zero_point, format.highest - zero_point)
    return steps.round_().clamp_(*ends)


def minmax_scale(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """Returns the finest scale whose codes cover `[low, high]` and zero, and the zero point where the format has one.

    Zero always gets a code of its own, so a range that does not hold zero is widened until it does; all zeros get the
    smallest scale. A format without negative codes covers `[0, high]`. With a zero point this is ONNX's
    DynamicQuantizeLinear; without, nothing is clipped, where torchao divides the largest magnitude of int8 by 127.5.

    Args:
        low: Smallest values, float32.
        high: Largest values, of the same shape.
        format: An integer format.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    if format.has_zero_point:
        # Half of the ends, for their difference may exceed float32.
        scale = ((high / 2 - low / 2) / (format.highest - format.lowest) * 2).clamp_min(SMALLEST_SCALE)
        zero_point = (format.lowest - low / scale).round_().clamp_(format.lowest, format.highest)
        return scale, zero_point
    scale = high / format.highest
    if format.lowest < 0:
        scale = torch.maximum(scale, low / format.lowest)
    return scale.clamp_min(SMALLEST_SCALE), None


def weight_codes(weight: Tensor, scale: Tensor, format: Format, axis: int) -> Tensor:
    """Returns the codes of `weight` in a symmetric format, floats of its shape; `scale` has one entry per channel."""
    return affine_steps(weight.float(), per_channel(scale, weight, axis), format)
