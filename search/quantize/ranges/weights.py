"""Parameters of weights: a scale for every row of values that share one, chosen by a method."""

from __future__ import annotations

import torch
from torch import Tensor

from hwmodels import Format
from search.quantize.affine import SMALLEST_SCALE
from search.quantize.formats import Parameters, defined_parameters, quantize_rows
from search.quantize.grouping import to_groups
from search.quantize.ranges.density import Density
from search.quantize.ranges.entropy import divergence
from search.quantize.ranges.methods import PERCENTILE, WEIGHT_METHODS, check_fits, check_method
from search.quantize.ranges.octav import octav_ends, tails_of_rows
from search.quantize.ranges.search import (
    Criterion,
    Placement,
    better,
    one_by_one,
    place,
    reaches_below,
    search_ends,
)

CPU_BLOCK = 1 << 16  # values placed at a time, so that candidates are judged within the cache
DEVICE_BLOCK = 1 << 24
KL_BLOCK = 1 << 12  # codes placed at a time, over all rows


def weight_parameters(
    weight: Tensor, format: Format, axis: int, method: str = "mse", percentile: float = PERCENTILE
) -> Parameters:
    """Returns what places a format's codes on the values of a weight, as `search.quantize.formats` has it.

    Formats whose parameters follow from the weight ignore the method. Else every row of values that share a scale is
    placed on its own; a row of zeros has scale 1.

    Args:
        weight: Of any shape and type.
        format: Any but float.
        axis: Of the output channels.
        method: One of `WEIGHT_METHODS`.
        percentile: Share of the magnitudes that the method of that name keeps, in percent; where the format has a zero
            point, share of the values that either end keeps.

    Raises:
        ValueError: If the weight is empty or holds NaN or infinite values.
        ConfigError: If the method is unknown, or not for this format.
    """
    check_method("method", method, WEIGHT_METHODS)
    defined = defined_parameters(weight, format, axis)
    if defined is not None:
        return defined
    check_fits(method, format)
    groups = to_groups(weight.detach(), format, axis)
    block = CPU_BLOCK if weight.device.type == "cpu" else DEVICE_BLOCK
    count = max(block // groups.rows.shape[1], 1)
    if method == "kl":
        count = min(count, max(KL_BLOCK >> format.bits, 1))
    masks = [None] * len(groups.rows) if groups.mask is None else torch.split(groups.mask, count)
    scales, zero_points = [], []
    for rows, mask in zip(torch.split(groups.rows, count), masks, strict=False):
        scale, zero_point = place_rows(rows.float(), mask, format, method, percentile)
        scales.append(scale)
        zero_points += [] if zero_point is None else [zero_point]
    parameters = {"scale": torch.cat(scales)}
    return parameters | ({"zero_point": torch.cat(zero_points).int()} if zero_points else {})


def place_rows(rows: Tensor, mask: Tensor | None, format: Format, method: str, percentile: float) -> Placement:
    """Returns the placement of each row.

    Rows are first divided by a power of two near their largest magnitude, which changes no rounding, so that squares
    neither overflow nor vanish.

    Args:
        rows: Shape `(rows, values)`, float32.
        mask: False for padding, of the same shape; None where nothing is padded.
        format: Integers or a minifloat.
        method: One of `WEIGHT_METHODS`.
        percentile: See `weight_parameters`.
    """
    largest = rows.abs().amax(1).clamp_min(SMALLEST_SCALE)
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
    scaled = rows / unit[:, None]
    low, high = scaled.amin(1).clamp_max_(0), scaled.amax(1).clamp_min_(0)
    if not reaches_below(format):
        low = torch.zeros_like(low)
    scale, zero_point = _choose(scaled, mask, low, high, format, method, percentile)
    return torch.where(low == high, 1.0, (scale * unit).clamp_min(SMALLEST_SCALE)), zero_point


def _choose(
    rows: Tensor, mask: Tensor | None, low: Tensor, high: Tensor, format: Format, method: str, percentile: float
) -> Placement:
    widest = place(low, high, format)
    match method:
        case "percentile":
            kept_low, kept_high = percentile_ends(rows, mask, format, percentile)
            is_zero = kept_low == kept_high  # a share that is all zeros places nothing; then everything is kept
            return place(torch.where(is_zero, low, kept_low), torch.where(is_zero, high, kept_high), format)
        case "octav":
            ends = octav_ends(tails_of_rows(rows), low, high, format)
            return better(place(*ends, format), widest, noise_loss(rows, format))
        case "kl" if format.bits <= 8:  # steps of 16 bits are finer than any bins; nothing but clipping costs
            return search_ends(low, high, format, divergence(binned(rows, format), format))
        case "mse":
            return search_ends(low, high, format, rounding_loss(rows, mask, format))
    return widest


def rounding_loss(rows: Tensor, mask: Tensor | None, format: Format) -> Criterion:
    """Returns the criterion of squared error, summed over each row."""

    def one(scale: Tensor, zero_point: Tensor | None) -> Tensor:
        parameters = {"scale": scale} if zero_point is None else {"scale": scale, "zero_point": zero_point}
        errors = quantize_rows(rows, format, parameters).sub_(rows)
        if mask is not None:
            errors.mul_(mask)
        return errors.square_().sum(1)

    return one_by_one(one)


def noise_loss(rows: Tensor, format: Format) -> Criterion:
    """Returns the criterion that `octav_ends` solves: squared error where rounding makes noise of `step**2 / 12`."""
    nonzero = rows.ne(0).to(rows.dtype)

    def one(scale: Tensor, zero_point: Tensor | None) -> Tensor:
        zero = torch.zeros_like(scale) if zero_point is None else zero_point
        ends = ((code - zero) * scale for code in (format.lowest, format.highest))
        clipped = rows.clamp(*(end[:, None] for end in ends)).sub_(rows)
        inside = clipped.eq(0).to(rows.dtype).mul_(nonzero).sum(1)
        return clipped.square_().sum(1) + inside * scale.square() / 12

    return one_by_one(one)


def percentile_ends(rows: Tensor, mask: Tensor | None, format: Format, percentile: float) -> tuple[Tensor, Tensor]:
    """Returns the ends between which a share of each row's values lies, and zero; as `numpy.quantile` interpolates.

    Args:
        rows: Shape `(rows, values)`.
        mask: False for padding, which is zero, so that counting from the outside never meets it; None without padding.
        format: With a zero point, both ends keep the share, each of all values; without, the magnitudes do.
        percentile: The share, in percent.
    """
    count = rows.new_full(rows.shape[:1], rows.shape[1]) if mask is None else mask.to(rows.dtype).sum(1)
    clipped = (1 - percentile / 100) * (count - 1)
    if reaches_below(format) and not format.has_zero_point:
        high = _from_top(rows.abs(), clipped)
        return -high, high
    low = -_from_top(-rows, clipped) if reaches_below(format) else torch.zeros_like(clipped)
    return low, _from_top(rows, clipped)


def _from_top(rows: Tensor, rank: Tensor) -> Tensor:
    """The value of each row that `rank` values lie above, between two where `rank` is no whole number; at least 0."""
    ordered = rows.sort(1, descending=True).values
    above = ordered.gather(1, rank.floor().long()[:, None])[:, 0]
    below = ordered.gather(1, rank.ceil().long()[:, None])[:, 0]
    return (above + (below - above) * (rank - rank.floor())).clamp_min_(0)


def binned(rows: Tensor, format: Format) -> Density:
    """Returns the distributions of rows whose magnitudes are below 2, in 16 bins to a code as TensorRT takes them."""
    half = 8 << format.bits
    index = (rows * (half / 2)).ceil_().add_(half - 1).long()
    counts = torch.zeros(len(rows), 2 * half, dtype=torch.float64, device=rows.device)
    counts.scatter_add_(1, index, rows.ne(0).double())
    zeros = rows.eq(0).double().sum(1)
    return Density(counts, zeros, torch.full_like(zeros, 2 / half))
