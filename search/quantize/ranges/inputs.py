"""Ranges of inputs, from what one pass over the calibration data left in a histogram."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hwmodels import Format
from search.errors import ConfigError
from search.quantize.affine import Range
from search.quantize.ranges.density import Density, noise_loss, rounding_loss
from search.quantize.ranges.entropy import divergence
from search.quantize.ranges.histogram import Histogram
from search.quantize.ranges.logits import LogitSample, cross_entropy
from search.quantize.ranges.methods import PERCENTILE, check_fits, check_method
from search.quantize.ranges.octav import octav_ends, tails_of_density
from search.quantize.ranges.search import Placement, better, place, reaches_below, search_ends

UNSEEN = 0.25  # squared widths per value: the most that errors depend on where in its bin a value lies
NOTHING = Range(1.0, 0)  # of a tensor that is all zeros


def input_range(
    seen: Histogram,
    format: Format,
    method: str = "mse",
    percentile: float = PERCENTILE,
    logits: LogitSample | None = None,
) -> Range:
    """Returns the static range of a tensor; zero has a code of its own, and a tensor of zeros has scale 1.

    Args:
        seen: What was seen of the tensor.
        format: Integers or a minifloat.
        method: One of `METHODS`.
        percentile: Share of the values that the method of that name keeps, in percent: of magnitudes, or on either side
            where the format has a zero point.
        logits: Rows of the tensor, for `cross_entropy`.

    Raises:
        ValueError: If the format takes no static range.
        ConfigError: If the method is unknown, or not for this format or tensor.
    """
    check_method("method", method)
    check_fits(method, format)
    if not format.has_static_range:
        raise ValueError(f"{format} inputs take no static range")
    low, high = seen.lowest if reaches_below(format) else 0.0, seen.highest
    if method == "moving_average":
        low, high = max(min(seen.average_low, 0.0), low), max(seen.average_high, 0.0)
    elif method == "percentile":
        low, high = percentile_ends(seen, format, percentile)
    if low == high:
        return NOTHING
    ends = torch.tensor([low]), torch.tensor([high])
    if method in ("minmax", "moving_average", "percentile"):
        return _range(place(*ends, format))
    if method == "cross_entropy":
        if logits is None or not len(logits.rows):
            raise ConfigError(
                "cross_entropy needs a sample of logits; it is for the tensor that a softmax reads, use mse"
            )
        return _range(search_ends(*ends, format, cross_entropy(logits, format)))
    return _range(_place_by_density(Density.of_histogram(seen), *ends, format, method))


def affine_range(low: float, high: float, format: Format) -> Range:
    """Returns the finest range whose codes cover `[low, high]` and zero."""
    return _range(place(torch.tensor([low]), torch.tensor([high]), format))


def percentile_ends(seen: Histogram, format: Format, percentile: float) -> tuple[float, float]:
    """Returns the ends between which a share of the values lies, to a bin's accuracy, and zero.

    A share that is all zeros places nothing; then everything is kept.

    Args:
        seen: The values.
        format: With a zero point, both ends keep the share, each of all values; without, the magnitudes do.
        percentile: The share, in percent.
    """
    clipped = (1 - percentile / 100) * seen.counts.sum()
    below, above = seen.counts[: seen.half][::-1].copy(), seen.counts[seen.half :]
    below[0] -= seen.zeros
    lowest = seen.lowest if reaches_below(format) else 0.0
    if lowest and not format.has_zero_point:
        below = above = below + above
    low = max(-_reach(below, clipped) * seen.width, lowest)
    high = min(_reach(above, clipped) * seen.width, seen.highest)
    return (low, high) if low < high else (lowest, seen.highest)


def _reach(counts: np.ndarray, clipped: float) -> float:
    """How far one side of the bins reaches without its outermost `clipped` values, in bins."""
    from_here = counts[::-1].cumsum()[::-1]
    index = int((from_here > clipped).sum()) - 1
    return index + float(from_here[index] - clipped) / float(counts[index]) if index >= 0 else 0.0


def _place_by_density(density: Density, low: Tensor, high: Tensor, format: Format, method: str) -> Placement:
    """Places a format by what bins tell; covers everything where that is as good as bins can tell."""
    widest = place(low, high, format)
    is_finer_than_bins = format.grid == "int" and 1 << format.bits > 2 * density.half
    if method == "kl":
        return widest if is_finer_than_bins else search_ends(low, high, format, divergence(density, format))
    if method == "octav":
        ends = octav_ends(tails_of_density(density), low.double(), high.double(), format)
        criterion, found = noise_loss(density, format), place(ends[0].float(), ends[1].float(), format)
    else:
        criterion = (noise_loss if is_finer_than_bins else rounding_loss)(density, format)
        found = search_ends(low, high, format, criterion)
    return better(found, widest, criterion, by=UNSEEN * density.moments[0])


def _range(placement: Placement) -> Range:
    scale, zero_point = placement
    return Range(float(scale), 0 if zero_point is None else int(zero_point))
