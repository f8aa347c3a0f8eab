"""Weights of one sign bit or three values: BWN, TWN and TTQ, and BinaryConnect's random rounding.

All means are over the values of a group, padding left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from search.quantize.affine import SMALLEST_SCALE

TWN_THRESHOLD = 0.7  # of the mean magnitude
TTQ_THRESHOLD = 0.05  # of the largest magnitude


def mean_magnitude(rows: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Returns the mean magnitude of each row's chosen values, shape `(groups,)`; 0 where none is chosen.

    Args:
        rows: Shape `(groups, values)`, float32.
        chosen: Which values count, of the same shape; None for all.
    """
    magnitudes = rows.abs()
    if chosen is None:
        return magnitudes.mean(1)
    return torch.where(chosen, magnitudes, 0).sum(1) / chosen.sum(1).clamp_min(1)


def bwn_parameters(rows: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Returns the scale of binary weights: the mean magnitude, which minimises the squared error of `scale * sign(w)`.

    Rastegari et al., "XNOR-Net", 2016, arXiv 1603.05279, section 3.1.
    """
    return {"scale": mean_magnitude(rows, mask)}


def twn_parameters(rows: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Returns threshold and scale of ternary weights: 0.7 of the mean magnitude, and the mean of what lies above.

    Li et al., "Ternary Weight Networks", 2016, arXiv 1605.04711, equations 5 and 6.
    """
    threshold = TWN_THRESHOLD * mean_magnitude(rows, mask)
    return {"scale": mean_magnitude(rows, rows.abs() > threshold[:, None]), "threshold": threshold}


def ttq_parameters(rows: Tensor) -> dict[str, Tensor]:
    """Returns TTQ's threshold, 5% of the largest magnitude, and its two scales before training.

    The scales begin as the means of what lies above and below the threshold, zero where nothing does, and are learned
    under fine-tuning (Zhu et al., "Trained Ternary Quantization", 2017, arXiv 1612.01064, equations 6 and 9).
    """
    threshold = TTQ_THRESHOLD * rows.abs().amax(1)
    above, below = rows > threshold[:, None], rows < -threshold[:, None]
    return {
        "scale": mean_magnitude(rows, above),
        "negative_scale": mean_magnitude(rows, below),
        "threshold": threshold,
    }


def signs(rows: Tensor) -> Tensor:
    """Returns 1 where a value is zero or positive, else -1, int32."""
    return (rows >= 0).int().mul_(2).sub_(1)


def random_signs(rows: Tensor, scale: Tensor, seed: int) -> Tensor:
    """Returns 1 with the probability `clamp((w / scale + 1) / 2, 0, 1)`, else -1, int32.

    The expected value of `scale * sign` is the weight, clamped to the scale (Courbariaux et al., "BinaryConnect", 2015,
    arXiv 1511.00363, equations 2 and 3). Random numbers are drawn on the CPU, so that every device rounds alike.
    """
    probability = (rows / scale.clamp_min(SMALLEST_SCALE)[:, None] + 1) / 2
    drawn = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed))
    return (drawn.to(rows.device) < probability).int().mul_(2).sub_(1)


def ternary_codes(rows: Tensor, threshold: Tensor) -> Tensor:
    """Returns 1 above a row's threshold, -1 below its negative, else 0, int32; `threshold` has shape `(groups,)`."""
    return (rows > threshold[:, None]).int() - (rows < -threshold[:, None]).int()
