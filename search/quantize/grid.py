"""Values rounded onto a grid of integers or small floats under a given step: what weights and inputs have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from hwmodels import Format
from search.quantize.affine import affine_steps
from search.quantize.minifloat import round_minifloat


def on_grid(
    x: Tensor,
    format: Format,
    step: Tensor | float,
    zero_point: Tensor | int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Returns the values that `x` takes, of the same shape: a few passes over memory, without integers in between.

    Args:
        x: The values, float32.
        format: Integers or a minifloat.
        step: What one unit of the grid is worth; positive, broadcasts against `x`.
        zero_point: Code of the value zero, where the format has one; of the shape of `step`.
        out: Memory for the result, shaped as `x` and float32; new memory by default.
    """
    if format.grid == "int":
        return affine_steps(x, step, format, zero_point, out).mul_(step)
    scaled = torch.div(x, step, out=out)
    return round_minifloat(scaled, format, out=scaled).mul_(step)
