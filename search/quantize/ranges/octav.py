"""OCTAV: the clipping of least squared error under uniform rounding noise, by Newton's recursion.

Sakr et al., "Optimal Clipping and Magnitude-aware Differentiation for Improved Quantization-aware Training", ICML 2022,
arXiv 2206.06501, section 3. With codes up to `n` steps from zero, values clipped at `s` cost in the mean

    J(s) = s**2 / (12 n**2) P(0 < |x| <= s) + E[(|x| - s)**2; |x| > s]

and Newton's method gives `s' = E[|x|; |x| > s] / (P(0 < |x| <= s) / (12 n**2) + P(|x| > s))`. The paper writes
`4**-bits / 3` for `1 / (12 n**2)`, with `n = 2**(bits - 1)`. Formats with a zero point have two ends, whose difference
makes `n` steps: the same derivation with respect to each end gives one such equation for either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hwmodels import Format
from search.quantize.ranges.density import Density

STEPS = 20
TOLERANCE = 1e-4  # change, as a share of the range, at which the recursion ends


@dataclass(frozen=True)
class Tails:
    """What lies inside and outside of an interval, one entry per row; zeros belong to neither."""

    inside: Tensor
    count_below: Tensor
    sum_below: Tensor
    count_above: Tensor
    sum_above: Tensor


def octav_ends(
    tails: Callable[[Tensor, Tensor], Tails], low: Tensor, high: Tensor, format: Format
) -> tuple[Tensor, Tensor]:
    """Returns the ends at which clipping and rounding cost least, one pair per row.

    Args:
        tails: Splits the values at two ends.
        low: Smallest value of each row, not above zero.
        high: Largest value, not below zero.
        format: Integers.
    """
    ends = _mean_ends(tails(torch.zeros_like(low), torch.zeros_like(high)), format)
    for _ in range(STEPS):
        new = _newton_step(tails(*ends), *ends, format)
        change = torch.maximum((new[0] - ends[0]).abs(), (new[1] - ends[1]).abs())
        is_settled = bool((change <= TOLERANCE * (new[1] - new[0])).all())
        ends = new
        if is_settled:
            break
    return torch.maximum(ends[0], low), torch.minimum(ends[1], high)


def _mean_ends(split: Tails, format: Format) -> tuple[Tensor, Tensor]:
    """Where the recursion begins: the mean on either side, or the mean magnitude."""
    if format.has_zero_point:
        return split.sum_below / split.count_below.clamp_min(1), split.sum_above / split.count_above.clamp_min(1)
    count, total = _outside(split, format)
    return _mirrored(total / count.clamp_min(1), format)


def _newton_step(split: Tails, low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """The next ends; an end beyond which nothing lies stays."""
    if not format.has_zero_point:
        count, total = _outside(split, format)
        noise = split.inside / (12 * format.highest**2)
        return _mirrored(torch.where(count > 0, total / (noise + count), high), format)
    noise = split.inside / (12 * (format.highest - format.lowest) ** 2)
    lower = ((split.sum_below + noise * high) / (noise + split.count_below)).clamp_max(0)
    upper = ((split.sum_above + noise * low) / (noise + split.count_above)).clamp_min(0)
    return torch.where(split.count_below > 0, lower, low), torch.where(split.count_above > 0, upper, high)


def _outside(split: Tails, format: Format) -> tuple[Tensor, Tensor]:
    """Count and sum of the magnitudes that are clipped and could be otherwise."""
    if format.lowest == 0:
        return split.count_above, split.sum_above
    return split.count_below + split.count_above, split.sum_above - split.sum_below


def _mirrored(high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    return (-high if format.lowest < 0 else torch.zeros_like(high)), high


def tails_of_rows(rows: Tensor) -> Callable[[Tensor, Tensor], Tails]:
    """Splits rows of values, shape `(rows, values)`."""
    nonzero = rows.ne(0).to(rows.dtype).sum(1)

    def tails(low: Tensor, high: Tensor) -> Tails:
        below, above = rows.lt(low[:, None]).to(rows.dtype), rows.gt(high[:, None]).to(rows.dtype)
        counts = below.sum(1), above.sum(1)
        sums = below.mul_(rows).sum(1), above.mul_(rows).sum(1)
        return Tails(nonzero - counts[0] - counts[1], counts[0], sums[0], counts[1], sums[1])

    return tails


def tails_of_density(density: Density) -> Callable[[Tensor, Tensor], Tails]:
    """Splits binned values."""
    all_count, all_total = density.moments[:2]

    def tails(low: Tensor, high: Tensor) -> Tails:
        points = torch.stack([low, high], -1) / density.width[:, None]
        count, total, _ = (sums[0].unbind(-1) for sums in density.below(points[None]))
        width = density.width
        return Tails(
            count[1] - count[0], count[0], total[0] * width, all_count - count[1], (all_total - total[1]) * width
        )

    return tails
