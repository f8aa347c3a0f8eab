"""BitFusion: an array of units that are one multiplier of 8 bits or up to sixteen of 2 bits, as a layer wants.

After Sharma et al., "Bit Fusion: Bit-Level Dynamically Composable Architecture for Accelerating Deep Neural Networks",
ISCA 2018 (arXiv 1712.01507). A fusion unit has 16 bricks that multiply 2 by 2 bits. Fused, they are (8 / w)(8 / a)
multipliers of w by a bits for widths of 2, 4 and 8; a width of 16 takes two turns of 8. Others are rounded up.

A product of m x n x k is run a row at a time: rows of units sum what a weight's k is cut into, columns are n. With f
multipliers in a unit that takes

    m ceil(k / (rows f)) ceil(n / columns)

cycles, groups of a convolution one after another, so depthwise ones leave most of the array idle. In the meantime
weights, inputs and outputs move through a port, each held in half of its buffer while the other half is filled: weights
once and inputs again for every part of the weights, or the other way round, whichever is less. The longer of computing
and moving counts. Outputs are written as wide as the layer's inputs, for the next layer's are not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hwmodels.accelerator import Accelerator, AcceleratorModel, Priced, load_accelerator, numbers
from hwmodels.energy import mac_energy
from hwmodels.quantity import Quantity, expect, expect_positive
from hwmodels.site import Site

WIDTHS = (2, 4, 8, 16)
UNIT_BITS = 8
"""Widest operands that a fusion unit multiplies in one turn."""


@dataclass(frozen=True)
class FusionArray(Accelerator):
    """An array of fusion units.

    Attributes:
        rows: Units whose products are added up.
        columns: Units that compute different outputs.
        port: Bits that are moved from and to memory in a cycle.
        weight_buffer: Size of the weight buffer.
        input_buffer: Size of the input buffer.
        output_buffer: Size of the output buffer; it limits nothing here.
        fusion_tax: Energy of a fusion unit over that of a plain multiplier of 8 bits.
    """

    kind: Literal["bitfusion"]
    rows: Quantity
    columns: Quantity
    port: Quantity
    weight_buffer: Quantity
    input_buffer: Quantity
    output_buffer: Quantity
    fusion_tax: Quantity

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_counts("rows", "columns")
        expect("port and fusion_tax", "1", self.port, self.fusion_tax)
        buffers = self.weight_buffer, self.input_buffer, self.output_buffer
        expect("a buffer", "byte", *buffers)
        expect_positive("port and buffers", self.port, *buffers)


class BitFusion(AcceleratorModel):
    """Prices integers of 2, 4, 8 and 16 bits on an array of fusion units; others are rounded up."""

    compute = "bitfusion"

    def __init__(self, accelerator: str | Path | FusionArray = "bitfusion_eyeriss") -> None:
        """Takes an array, its name, or the path of its YAML file.

        Raises:
            ValueError: If there is no such accelerator, or its file is not valid.
        """
        self.array = accelerator if isinstance(accelerator, FusionArray) else load_accelerator(FusionArray, accelerator)
        super().__init__(self.array, WIDTHS, self.array.port.number)

    def price(self, sites: Sequence[Site], rows: np.ndarray, weight_bits: np.ndarray, input_bits: np.ndarray) -> Priced:
        array = self.array
        m, n, k, groups, macs = numbers([(*site.gemm, site.macs) for site in sites], rows)
        fused = multipliers(weight_bits) * multipliers(input_bits)
        computing = groups * m * np.ceil(k / (array.rows.number * fused)) * np.ceil(n / array.columns.number)
        bits = self._traffic(sites, rows, weight_bits, input_bits)
        moving = bits / array.port.number
        joules = macs * self._mac_energy(fused) + bits / 8 * array.energy.memory.number
        return Priced(np.maximum(computing, moving), joules, computing >= moving)

    def _traffic(
        self, sites: Sequence[Site], rows: np.ndarray, weight_bits: np.ndarray, input_bits: np.ndarray
    ) -> np.ndarray:
        """Bits moved from and to memory."""
        values = numbers([(site.weight_values, site.input_values, site.output_values) for site in sites], rows)
        weights, inputs, outputs = values * (weight_bits, input_bits, input_bits)
        weight_parts = np.ceil(weights / (8 * self.array.weight_buffer.number / 2))
        input_parts = np.ceil(inputs / (8 * self.array.input_buffer.number / 2))
        again = np.minimum(weights + inputs * weight_parts, inputs + weights * input_parts)
        traffic: np.ndarray = outputs + again
        return traffic

    def _mac_energy(self, fused: np.ndarray) -> np.ndarray:
        """Joules of a multiply-accumulate: a unit's turn shared by its multipliers, and a plain adder."""
        energy = self.array.energy
        add = mac_energy(energy, self.compute, UNIT_BITS, UNIT_BITS) - energy.int8_multiply.number
        joules: np.ndarray = energy.int8_multiply.number * self.array.fusion_tax.number / fused + add
        return joules


def multipliers(bits: np.ndarray) -> np.ndarray:
    """How many operands of so many bits fit side by side in a fusion unit; less than 1 for those that take turns."""
    fit: np.ndarray = UNIT_BITS / bits
    return fit
