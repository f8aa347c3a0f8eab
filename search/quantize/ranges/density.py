"""How values are distributed, as far as bins tell, and the squared error that a placement of codes then makes.

Within a bin values are taken to lie evenly; exact zeros, of which rectified tensors are full, are counted on their own.
Lengths are in widths of a bin, so that neither tiny nor huge tensors lose accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from hwmodels import Format
from search.quantize.minifloat import magnitudes
from search.quantize.ranges.histogram import Histogram
from search.quantize.ranges.search import Criterion

Sums = tuple[Tensor, Tensor, Tensor]  # how many values, their sum, the sum of their squares


@dataclass(frozen=True)
class Density:
    """Distributions of several rows of values over bins centred on zero.

    Attributes:
        counts: Values per bin without zeros, float64, shape `(rows, 2 * half)`; bins as in `Histogram`.
        zeros: Values that are zero, shape `(rows,)`.
        width: Width of a bin, shape `(rows,)`.
    """

    counts: Tensor
    zeros: Tensor
    width: Tensor

    @classmethod
    def of_histogram(cls, seen: Histogram) -> Density:
        """The one row that a histogram holds."""
        counts = torch.from_numpy(seen.counts)[None].clone()
        counts[0, seen.half - 1] -= seen.zeros
        zeros, width = (torch.tensor([value], dtype=torch.float64) for value in (seen.zeros, seen.width))
        return cls(counts, zeros, width)

    @property
    def half(self) -> int:
        """Bins on either side of zero."""
        return self.counts.shape[1] // 2

    @cached_property
    def moments(self) -> Sums:
        """How many values are not zero, their sum and the sum of their squares, shape `(rows,)` each."""
        count, total, squares = self.below(self.counts.new_full((1, len(self.counts), 1), self.half))
        return count[0, :, 0], total[0, :, 0], squares[0, :, 0]

    @cached_property
    def _below_bin(self) -> Sums:
        """The sums of what lies below each bin, shape `(rows * bins,)` each."""
        left = torch.arange(-self.half, self.half, dtype=torch.float64, device=self.counts.device)
        inside = self.counts, self.counts * (left + 0.5), self.counts * (left**2 + left + 1 / 3)
        count, total, squares = (_exclusive(sums).flatten() for sums in inside)
        return count, total, squares

    @cached_property
    def _shortfall_at_bin(self) -> Tensor:
        """`shortfall` at the left end of each bin, shape `(rows * bins,)`."""
        return _exclusive(_exclusive(self.counts) + self.counts / 2).flatten()

    def _bin_of(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points no further out than the bins, the left ends of their bins, the bins' indices and counts."""
        points = points.clamp(-self.half, self.half)
        left = points.floor().clamp_max_(self.half - 1)
        index = left.long().add_(self.half)
        if len(self.counts) > 1:
            index += torch.arange(len(self.counts), device=points.device)[:, None] * 2 * self.half
        return points, left, index, self.counts.flatten()[index]

    def below(self, points: Tensor) -> Sums:
        """Returns the sums of what lies below points, which are in widths of a bin, `(candidates, rows, points)`."""
        points, left, index, inside = self._bin_of(points)
        count, total, squares = (sums[index] for sums in self._below_bin)
        inside, mean = inside * (points - left), (points + left) / 2
        return count + inside, total + inside * mean, squares + inside * (4 * mean**2 - points * left) / 3

    def shortfall(self, points: Tensor) -> Tensor:
        """Returns by how much the values below points fall short of them in sum: `sum(max(point - x, 0))`."""
        above_all = (points - self.half).clamp_min_(0) * self.moments[0][:, None]
        points, left, index, inside = self._bin_of(points)
        beyond = points - left
        return self._shortfall_at_bin[index] + beyond * (self._below_bin[0][index] + inside * beyond / 2) + above_all


def _exclusive(values: Tensor) -> Tensor:
    """Of each entry, the sum of those before it in its row."""
    return F.pad(values.cumsum(1)[:, :-1], (1, 0))


def grid_units(format: Format, device: torch.device) -> Tensor:
    """The values of a format's codes at scale 1 and zero point 0, ascending, float64."""
    if format.grid == "minifloat":
        positive = torch.tensor(magnitudes(format), dtype=torch.float64, device=device)
        return torch.cat([-positive[1:].flip(0), positive])
    if format.bits == 1 and format.signed:
        return torch.tensor([-1.0, 1.0], dtype=torch.float64, device=device)
    return torch.arange(format.lowest, format.highest + 1, dtype=torch.float64, device=device)


def grid_values(scale: Tensor, zero_point: Tensor | None, units: Tensor, density: Density) -> Tensor:
    """The values of all codes under each placement, in widths of a bin, shape `(candidates, rows, codes)`."""
    units = units if zero_point is None else units - zero_point[..., None]
    return units * (scale / density.width)[..., None]


def rounding_loss(density: Density, format: Format) -> Criterion:
    """Returns the criterion of squared error, summed over the values, in squared widths of a bin.

    Rounding to the nearest of the values `v_0 < ... < v_n` costs what putting all at `v_n` costs, less what is saved
    step by step: `sum((x - v_n)**2) - 2 * sum_i (v_i - v_(i-1)) * shortfall((v_i + v_(i-1)) / 2)`.
    """
    units = grid_units(format, density.counts.device)
    count, total, squares = density.moments

    def lost(scale: Tensor, zero_point: Tensor | None) -> Tensor:
        codes = grid_values(scale, zero_point, units, density)
        left, right, top = codes[..., :-1], codes[..., 1:], codes[..., -1]
        saved = 2 * ((right - left) * density.shortfall((left + right) / 2)).sum(-1)
        return squares + top * (top * count - 2 * total) - saved + of_zeros(codes)

    def of_zeros(codes: Tensor) -> Tensor | float:
        is_kept = format.grid != "int" or format.bits > 1 or not format.signed
        return 0.0 if is_kept else density.zeros * codes[..., -1].square()

    return lost


def noise_loss(density: Density, format: Format) -> Criterion:
    """Returns the criterion of squared error with rounding taken for noise, `step**2 / 12` where nothing is clipped.

    It is also right where codes are finer than bins (Bennett, "Spectra of Quantized Signals", 1948).
    """
    all_count, all_total, all_squares = density.moments

    def lost(scale: Tensor, zero_point: Tensor | None) -> Tensor:
        step = scale / density.width
        zero = 0 if zero_point is None else zero_point
        low, high = (step * (code - zero) for code in (format.lowest, format.highest))
        count, total, squares = (sums.unbind(-1) for sums in density.below(torch.stack([low, high], -1)))
        clipped_low = squares[0] - 2 * low * total[0] + low**2 * count[0]
        clipped_high = all_squares - squares[1] - 2 * high * (all_total - total[1]) + high**2 * (all_count - count[1])
        return step**2 / 12 * (count[1] - count[0]) + clipped_low + clipped_high

    return lost
