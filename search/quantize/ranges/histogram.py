"""What is remembered of a tensor whose values pass by in batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from search.quantize.affine import SMALLEST_SCALE

HALF = 4096  # bins on either side of zero
NEWEST = 0.1  # weight of the newest batch in the moving averages
CPU_BLOCK = 1 << 17  # values counted at a time, so that what is written in between stays in the cache
DEVICE_BLOCK = 1 << 24


@dataclass
class Histogram:
    """Counts of the values seen so far, and their ends, in memory that does not grow with them.

    The bins are of equal width and centred on zero; when a value falls outside, the width doubles and neighbouring bins
    merge, so nothing seen is lost and nothing is assumed about the range. All values are counted.

    Attributes:
        half: Bins on either side of zero.
        newest: Weight of the newest batch in the moving averages.
        counts: Values per bin, shape `(2 * half,)`; bin i covers `((i - half) * width, (i + 1 - half) * width]`.
        zeros: Values that are exactly zero; they are also counted in their bin.
        width: Width of a bin, a power of two; 0 until a nonzero value is seen.
        lowest: Smallest value seen, or 0.
        highest: Largest value seen, or 0.
        average_low: Moving average of the batches' smallest values, beginning with the first batch's:
            `(1 - newest) * average + newest * batch`.
        average_high: The same of their largest values.
    """

    half: int = HALF
    newest: float = NEWEST
    counts: np.ndarray = field(init=False)
    zeros: int = 0
    width: float = 0.0
    lowest: float = 0.0
    highest: float = 0.0
    average_low: float = field(default=0.0, init=False)
    average_high: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.counts = np.zeros(2 * self.half)

    def add(self, values: Tensor) -> None:
        """Counts the values of a batch, a tensor of any shape, type and memory layout.

        Raises:
            ValueError: If a value is not finite as a float32.
        """
        if not values.numel():
            return
        values = _in_memory_order(values.detach())
        if values.dtype not in (torch.bfloat16, torch.float16):
            values = values.float()
        low, high = (float(end) for end in values.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("a value is NaN or infinite")
        weight = self.newest if self.counts.any() else 1.0
        self.average_low += weight * (low - self.average_low)
        self.average_high += weight * (high - self.average_high)
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        self._reach(max(-low, high))
        if self.width == 0:
            self.counts[self.half - 1] += values.numel()
            self.zeros += values.numel()
        else:
            self._count(values, low)

    def _reach(self, reach: float) -> None:
        """Widens the bins until every magnitude up to `reach` lies inside."""
        if self.width == 0 and reach:
            self.width = max(2.0 ** math.frexp(reach)[1] / self.half, SMALLEST_SCALE)
        while reach >= self.width * self.half and self.width:
            # Bins 2i and 2i + 1, counted from zero, become bin i.
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.zeros_like(self.counts)
            self.counts[self.half // 2 : self.half // 2 + self.half] = merged
            self.width *= 2

    def _count(self, values: Tensor, low: float) -> None:
        """Counts a flat tensor, block by block."""
        block = min(len(values), CPU_BLOCK if values.device.type == "cpu" else DEVICE_BLOCK)
        scaled = torch.empty(block, device=values.device)
        bins = torch.empty(block, device=values.device, dtype=torch.int32)
        counts = torch.zeros(2 * self.half, device=values.device, dtype=torch.int64)
        zeros = torch.zeros((), device=values.device, dtype=torch.int64)
        for part in torch.split(values, block):
            scaled, bins = scaled[: len(part)], bins[: len(part)]
            if low < 0:
                zeros += torch.eq(part, 0, out=scaled).sum().long()
            # Exact, as the width is a power of two; rounding up leaves zero at the top of its bin.
            torch.mul(part.float(), 1 / self.width, out=scaled).ceil_().add_(self.half - 1)
            counts += torch.bincount(bins.copy_(scaled), minlength=2 * self.half)
        # Where nothing is negative, the bin that ends at zero holds zeros alone.
        self.zeros += int(zeros if low < 0 else counts[self.half - 1])
        self.counts += counts.cpu().numpy()


def _in_memory_order(values: Tensor) -> Tensor:
    """The values as a flat tensor, without copying where they fill their memory in any order of axes."""
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    return values.permute(order).reshape(-1)
