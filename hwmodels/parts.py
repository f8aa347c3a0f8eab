"""What the time of a layer is made of, for figures and tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hwmodels.device import MemoryLevel


@dataclass(frozen=True)
class Parts:
    """What the time of one layer is made of, over all its calls.

    Attributes:
        operations: Two per multiply-accumulate, padding left out.
        traffic: Bytes moved by the layer itself.
        level: Name of the memory level they move through.
        compute_s: Seconds of computing: its share of what computing and moving bytes take together, where the p-th
            powers of both add up.
        memory_s: Seconds of moving bytes: the rest of that, and what operations around the layer take to move the
            tensors that are as wide as its precision says.
        overhead_s: Seconds of starting.
        conversion_s: Seconds of converting what it reads.
    """

    operations: float
    traffic: float
    level: str
    compute_s: float
    memory_s: float
    overhead_s: float
    conversion_s: float


class Terms(NamedTuple):
    """The terms of the roofline for one call of a layer at each of several precisions, each of shape `(precisions,)`.

    Attributes:
        macs: Multiply-accumulates, a single number.
        compute_s: Seconds of computing.
        memory_s: Seconds of moving bytes.
        joined_s: Seconds of both together.
        overhead_s: Seconds of starting.
        sharpness: Exponent that joins the first two.
        traffic: Bytes moved.
        level: Memory level they move through.
    """

    macs: float
    compute_s: np.ndarray
    memory_s: np.ndarray
    joined_s: np.ndarray
    overhead_s: np.ndarray
    sharpness: np.ndarray
    traffic: np.ndarray
    level: MemoryLevel

    def parts(self, calls: int, moving_s: float, converting_s: float) -> Parts:
        """The parts of a layer's time, of the first precision.

        Args:
            calls: Calls of the layer.
            moving_s: Seconds that operations around it move its tensors.
            converting_s: Seconds that converting what it reads takes.
        """
        joined = float(self.joined_s[0])
        computing = joined * (float(self.compute_s[0]) / joined) ** float(self.sharpness[0]) if joined else 0.0
        return Parts(
            operations=2.0 * calls * self.macs,
            traffic=calls * float(self.traffic[0]),
            level=self.level.name,
            compute_s=calls * computing,
            memory_s=calls * (joined - computing) + moving_s,
            overhead_s=calls * float(self.overhead_s[0]),
            conversion_s=converting_s,
        )
