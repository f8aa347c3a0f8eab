"""Search for the ends of a range: a grid of candidates, then golden section around the best."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hwmodels import Format
from search.quantize.affine import SMALLEST_SCALE, minmax_scale

Placement = tuple[Tensor, Tensor | None]  # scales, and zero points where the format has them
Criterion = Callable[[Tensor, Tensor | None], Tensor]  # scales and zero points, (candidates, rows) -> what is lost

FINE, COARSE = 64, 16  # candidates; with many codes, or near the best range, little changes from one to the next
GOLDEN = (5**0.5 - 1) / 2
GOLDEN_STEPS = 6


def place(low: Tensor, high: Tensor, format: Format) -> Placement:
    """Returns the finest scale whose codes cover `[low, high]` and zero, and the zero point where there is one.

    Args:
        low: Smallest values, float32.
        high: Largest values, of the same shape.
        format: Integers or a minifloat.
    """
    if format.grid == "int":
        return minmax_scale(low, high, format)
    return (torch.maximum(-low, high) / format.largest).clamp_min(SMALLEST_SCALE), None


def reaches_below(format: Format) -> bool:
    """Whether a format has codes for negative values."""
    return format.grid != "int" or format.lowest < 0 or format.has_zero_point


def one_by_one(one: Callable[[Tensor, Tensor | None], Tensor]) -> Criterion:
    """Returns the criterion that asks `one` what every row loses under each candidate, shapes `(rows,)`, in turn."""

    def lost(scale: Tensor, zero_point: Tensor | None) -> Tensor:
        if zero_point is None:
            return torch.stack([one(each, None) for each in scale])
        return torch.stack([one(*each) for each in zip(scale, zero_point, strict=True)])

    return lost


def shares(format: Format, count: int, device: torch.device) -> Tensor:
    """Candidate ends as shares of the outermost values, in descending order with 1 among them, shape `(candidates,)`.

    For integers `count` evenly spaced ones. A minifloat cares less for clipping and more for how values lie between
    powers of two, and may gain from a range that is wider than the values: `count` spaced by ratio, over four octaves.
    A few whole octaves follow, which far outliers need.
    """
    steps, octaves = torch.arange(count, device=device) / count, 2.0 ** -torch.arange(11, device=device)
    if format.grid == "minifloat":
        return torch.cat([2.0 ** (1 - 4 * steps), octaves[3:]])
    return torch.cat([1 - steps, octaves[7:]])


def least(lost: Callable[[Tensor], Tensor], grid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where each row loses least, and how much: the best of a grid, refined by golden section around it.

    Never worse than any of the grid; of equals, the first.

    Args:
        lost: Takes candidates, shape `(candidates, rows)` or `(candidates, 1)`, and returns what every row loses.
        grid: Candidates for all rows, in descending order.
    """
    least_lost, index = lost(grid[:, None]).min(0)
    best = grid[index]
    low, high = grid[(index + 1).clamp_max(len(grid) - 1)], grid[(index - 1).clamp_min(0)]
    inner, outer = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_inner, at_outer = lost(torch.stack([inner, outer]))
    for _ in range(GOLDEN_STEPS):
        is_inner = at_inner < at_outer
        low, high = torch.where(is_inner, low, inner), torch.where(is_inner, outer, high)
        new = torch.where(is_inner, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
        at_new = lost(new[None])[0]
        inner, outer = torch.where(is_inner, new, outer), torch.where(is_inner, inner, new)
        at_inner, at_outer = torch.where(is_inner, at_new, at_outer), torch.where(is_inner, at_inner, at_new)
    for found, loss in ((inner, at_inner), (outer, at_outer)):
        better = loss < least_lost
        best, least_lost = torch.where(better, found, best), torch.where(better, loss, least_lost)
    return best, least_lost


def search_ends(low: Tensor, high: Tensor, format: Format, criterion: Criterion) -> Placement:
    """Returns the placement that loses least by a criterion; never more than the one that covers `[low, high]`.

    Both ends shrink together; then, where the format has a zero point, each moves on its own.

    Args:
        low: Smallest value of each row, not above zero, float32, shape `(rows,)`.
        high: Largest value, not below zero.
        format: Integers or a minifloat.
        criterion: Says what is lost.
    """

    def at(lower: Tensor, upper: Tensor) -> Tensor:
        return criterion(*place(lower * low, upper * high, format))

    is_smooth = format.grid == "int" and format.bits >= 8
    coarse = shares(format, COARSE, low.device)
    lower, lost = least(lambda share: at(share, share), coarse if is_smooth else shares(format, FINE, low.device))
    upper = lower
    if format.has_zero_point and low.any() and high.any():
        share, lost_by_upper = least(lambda share: at(lower, share), coarse)
        upper, lost = torch.where(lost_by_upper < lost, share, upper), torch.minimum(lost_by_upper, lost)
        share, lost_by_lower = least(lambda share: at(share, upper), coarse)
        lower = torch.where(lost_by_lower < lost, share, lower)
    return place(lower * low, upper * high, format)


def better(found: Placement, widest: Placement, criterion: Criterion, by: Tensor | float = 0.0) -> Placement:
    """Returns `found` for the rows in which it loses less than `widest`, by more than a margin, else `widest`."""
    (scale, zero_point), (widest_scale, widest_zero_point) = found, widest
    if zero_point is None or widest_zero_point is None:
        lost, lost_widest = criterion(torch.stack([scale, widest_scale]), None)
        return torch.where(lost < lost_widest - by, scale, widest_scale), None
    pairs = torch.stack([scale, widest_scale]), torch.stack([zero_point, widest_zero_point])
    lost, lost_widest = criterion(*pairs)
    chosen = lost < lost_widest - by
    return torch.where(chosen, scale, widest_scale), torch.where(chosen, zero_point, widest_zero_point)
