"""Ranges: where the codes of a format lie on the number line.

A smaller range rounds more finely and clips more. `mse` takes the range of least squared error, `minmax` clips nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hwmodels import Format
from search.errors import ConfigError, closest
from search.quantize.affine import Range, quantize_weight

METHODS = ("mse", "minmax")
WEIGHT_SHRINKS = 64  # candidate ranges per channel, evenly spaced up to the largest magnitude
INPUT_SHRINKS = 40  # candidate ends per side of an input range
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


def check_method(key: str, method: str) -> None:
    """Raises ConfigError unless `method` names a way to choose ranges."""
    if method not in METHODS:
        raise ConfigError(f"{key}={method} is unknown{closest(method, METHODS)}; allowed: {', '.join(METHODS)}")


def weight_scale(weight: Tensor, format: Format, axis: int, method: str = "mse") -> Tensor:
    """Returns one symmetric scale per channel along `axis`, shape `(channels,)`, float32."""
    others = [dim for dim in range(weight.dim()) if dim != axis]
    largest = weight.abs().amax(others) if others else weight.abs()
    largest = largest.float().clamp_min(SMALLEST_SCALE * format.highest)
    if method == "minmax":
        return largest / format.highest
    best_error = torch.full_like(largest, torch.inf)
    best = largest / format.highest
    for step in range(WEIGHT_SHRINKS, 0, -1):
        scale = (largest * (step / WEIGHT_SHRINKS) / format.highest).clamp_min(SMALLEST_SCALE)
        squared = (quantize_weight(weight, scale, format, axis) - weight).square()
        error = squared.sum(others) if others else squared
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, scale, best)
    return best


@dataclass
class Histogram:
    """Counts of the values seen so far, in memory that does not grow with them.

    The bins are of equal width and centred on zero; when a value falls outside, the width doubles and neighbouring bins
    merge, so nothing seen is lost and nothing is assumed about the range.

    Attributes:
        counts: Values per bin, shape `(2 * half,)`; bin i covers `[(i - half) * width, (i - half + 1) * width)`.
        width: Width of a bin; 0 until a nonzero value is seen.
        lowest: Smallest value seen.
        highest: Largest value seen.
    """

    half: int = 2048
    counts: Tensor = field(init=False)
    width: float = 0.0
    lowest: float = 0.0
    highest: float = 0.0

    def __post_init__(self) -> None:
        self.counts = torch.zeros(2 * self.half, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Counts the values of a tensor of any shape.

        Raises:
            ValueError: If a value is not finite.
        """
        if not values.numel():
            return
        low, high = (float(end) for end in values.aminmax())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("a value is NaN or infinite")
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        reach = max(-low, high)
        if reach == 0:
            self.counts[self.half] += values.numel()
            return
        if self.width == 0:
            self.width = 2.0 ** np.ceil(np.log2(reach / self.half * (1 + 1e-6)))
        while reach >= self.width * self.half:
            self._widen()
        bins = (values.detach().float().reshape(-1) / self.width).floor_().add_(self.half).clamp_(0, 2 * self.half - 1)
        self.counts += torch.bincount(bins.long(), minlength=2 * self.half).double().cpu()

    def _widen(self) -> None:
        """Doubles the width: bins 2i and 2i + 1, counted from zero, become bin i."""
        merged = self.counts.view(-1, 2).sum(1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[self.half // 2 : self.half // 2 + self.half] = merged
        self.width *= 2

    @property
    def centres(self) -> np.ndarray:
        """The middle of every bin, shape `(2 * half,)`."""
        return (np.arange(2 * self.half) - self.half + 0.5) * self.width


def input_range(seen: Histogram, format: Format, method: str = "mse") -> Range:
    """Returns the affine range of a tensor whose values `seen` has counted; zero always has a code of its own."""
    low, high = min(seen.lowest, 0.0), max(seen.highest, 0.0)
    if low == high:
        return Range(1.0, 0)
    if method == "minmax":
        return affine_range(low, high, format)
    used = seen.counts.numpy() > 0
    centres, counts = seen.centres[used], seen.counts.numpy()[used]
    shrinks = np.arange(1, INPUT_SHRINKS + 1) / INPUT_SHRINKS
    # Shrink both ends in turn, twice: the error is nearly separable in the two ends.
    best = (low, high)
    for _ in range(2 if low < 0 < high else 1):
        for end in (0, 1):
            if (low, high)[end] == 0:
                continue
            ends = [(low * shrink, best[1]) if end == 0 else (best[0], high * shrink) for shrink in shrinks]
            best = min(
                ends, key=lambda ends: _squared_error(centres, counts, affine_range(ends[0], ends[1], format), format)
            )
    return affine_range(*best, format)


def affine_range(low: float, high: float, format: Format) -> Range:
    """Returns the range whose codes cover `[low, high]`, which must hold zero; zero gets an exact code."""
    if format.signed:
        return Range(_float32(max(-low, high) / format.highest), 0)
    scale = _float32((high - low) / format.highest)
    return Range(scale, min(max(round(-low / scale), 0), format.highest))


def _float32(scale: float) -> float:
    return max(float(np.float32(scale)), SMALLEST_SCALE)


def _squared_error(centres: np.ndarray, counts: np.ndarray, range_: Range, format: Format) -> float:
    codes = np.clip(
        np.round(centres / range_.scale), format.lowest - range_.zero_point, format.highest - range_.zero_point
    )
    return float(counts @ np.square(codes * range_.scale - centres))
