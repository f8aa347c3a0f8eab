"""Bit-serial arrays: time grows with weight bits times input bits, or with the bits that have to be loaded.

In a cycle, each unit of an array of rows x columns multiplies a vector of single bits of an input with one of a weight
and adds up the products; BISMO is such an array (Umuroglu, Rasnayake and Sjalander, FPL 2018, arXiv 1806.08862). The
law below was found by looking at HAQ's latency table of MobileNetV2, all 3,392 entries of which it gives to the cycle.

A product of m x n x k is cut into tiles of rows x columns x width. A tile of a-bit inputs and w-bit weights takes w a
steps of a cycle, each for one bit of either: a plane of up to `rows` input vectors meets one of up to `columns` weight
vectors. Planes are loaded one after another in the order in which they are first needed, inputs and weights at the same
time, and stay in a buffer until the pass is over. A step waits for its planes and for the step before it. There are two
orders of steps, and the quicker one counts:

    weights stay   columns of tiles, rows of tiles, k, input bits, weight bits
    inputs stay    rows of tiles, columns of tiles, k, weight bits, input bits

What a buffer cannot hold is cut into parts of whole tiles, inputs by rows and weights by columns, and every pair of
parts is a pass of its own. Convolutions are run image by image. Of a depthwise or grouped one, as many groups as fill
the columns are run at once, as one product whose weights are zero across groups. Writing results takes no time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from hwmodels.accelerator import Accelerator, AcceleratorModel, Priced, load_accelerator, numbers, of_pairs
from hwmodels.energy import mac_energy
from hwmodels.quantity import Quantity, expect, expect_positive
from hwmodels.site import Site


@dataclass(frozen=True)
class BitSerialArray(Accelerator):
    """A bit-serial array.

    Attributes:
        rows: Input vectors that are multiplied at once.
        columns: Weight vectors that are multiplied at once.
        width: Bits of a vector, the products that a unit adds up in a cycle.
        most_bits: Bits that weights and inputs may have.
        input_load: Bits of inputs that are loaded in a cycle.
        weight_load: Bits of weights that are loaded in a cycle.
        port: Bits of either that are loaded in a cycle at most.
        input_buffer: Size of the input buffer.
        weight_buffer: Size of the weight buffer.
    """

    kind: Literal["bit-serial"]
    rows: Quantity
    columns: Quantity
    width: Quantity
    most_bits: Quantity
    input_load: Quantity
    weight_load: Quantity
    port: Quantity
    input_buffer: Quantity
    weight_buffer: Quantity

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_counts("rows", "columns", "width", "most_bits")
        expect("input_load, weight_load and port", "1", self.input_load, self.weight_load, self.port)
        expect_positive("input_load, weight_load and port", self.input_load, self.weight_load, self.port)
        expect("input_buffer and weight_buffer", "byte", self.input_buffer, self.weight_buffer)


class Product(NamedTuple):
    """One call of a layer as the array runs it: `passes` products of m x k by k x n, one after another."""

    passes: int
    m: int
    n: int
    k: int


class Uses(NamedTuple):
    """Steps from the first use of a plane to that of the next: in the next tile, of the next k, of the next bit."""

    tile: np.ndarray
    depth: np.ndarray
    bit: np.ndarray


class BitSerial(AcceleratorModel):
    """Prices integers on a bit-serial array; energy counts operations and the bytes that are loaded."""

    compute = "bit-serial"

    def __init__(self, accelerator: str | Path | BitSerialArray) -> None:
        """Takes an array, its name, or the path of its YAML file.

        Raises:
            ValueError: If there is no such accelerator, or its file is not valid.
        """
        self.array = (
            accelerator if isinstance(accelerator, BitSerialArray) else load_accelerator(BitSerialArray, accelerator)
        )
        super().__init__(
            self.array, tuple(range(1, int(self.array.most_bits.number) + 1)), self.array.weight_load.number
        )

    def product(self, site: Site) -> Product:
        """What a call of a layer is to the array."""
        m, n, k, groups = site.gemm
        images = site.batch if site.kind.startswith("conv") else 1
        together = min(groups, max(1, int(self.array.columns.number) // n)) if groups > 1 else 1
        return Product(images * math.ceil(groups / together), m // images, n * together, k * together)

    def price(self, sites: Sequence[Site], rows: np.ndarray, weight_bits: np.ndarray, input_bits: np.ndarray) -> Priced:
        passes, m, n, k, macs = numbers([(*self.product(site), site.macs) for site in sites], rows)
        array = self.array
        depth = np.ceil(k / array.width.number)
        steps, input_vectors, weight_vectors, cycles = self._cycles(m, n, depth, weight_bits, input_bits)
        loaded = (input_vectors + weight_vectors) * array.width.number
        loading = np.maximum(input_vectors * self._input_cycles, weight_vectors * self._weight_cycles)
        loading = np.maximum(loading, loaded / array.port.number)
        cycles = np.maximum(cycles, loading)
        mac_j = of_pairs(lambda w, a: mac_energy(array.energy, self.compute, w, a), weight_bits, input_bits)
        joules = macs * mac_j + passes * loaded / 8 * array.energy.memory.number
        return Priced(passes * cycles, joules, steps >= loading)

    @property
    def _input_cycles(self) -> float:
        """Cycles that loading an input vector takes."""
        return self.array.width.number / self.array.input_load.number

    @property
    def _weight_cycles(self) -> float:
        """Cycles that loading a weight vector takes."""
        return self.array.width.number / self.array.weight_load.number

    def _cycles(
        self, m: np.ndarray, n: np.ndarray, depth: np.ndarray, weight_bits: np.ndarray, input_bits: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Steps, input vectors and weight vectors loaded, and cycles of products, part by part."""
        array = self.array
        vector = array.width.number / 8
        input_parts = _parts(m, depth * input_bits * vector, array.rows.number, array.input_buffer.number)
        weight_parts = _parts(n, depth * weight_bits * vector, array.columns.number, array.weight_buffer.number)
        steps, weights_stay, inputs_stay = np.zeros((3, len(m)))
        for input_count, part_m in input_parts:
            for weight_count, part_n in weight_parts:
                often = input_count * weight_count
                taken = self._pass(part_m, part_n, depth, weight_bits, input_bits)
                steps, weights_stay, inputs_stay = (
                    total + often * one for total, one in zip((steps, weights_stay, inputs_stay), taken, strict=True)
                )
        input_vectors = m * depth * input_bits * sum(often for often, _ in weight_parts)
        weight_vectors = n * depth * weight_bits * sum(often for often, _ in input_parts)
        return steps, input_vectors, weight_vectors, np.minimum(weights_stay, inputs_stay)

    def _pass(
        self, m: np.ndarray, n: np.ndarray, depth: np.ndarray, weight_bits: np.ndarray, input_bits: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Steps of one pass, and its cycles in either order.

        A pass ends when all steps are done that follow the plane that came latest: with S steps, and planes that are
        complete at the end of cycle `t` and first needed by step `s`, counted from 0, after S - 1 + max(1, t - s).
        """
        rows, columns = self.array.rows.number, self.array.columns.number
        across, along = np.ceil(m / rows), np.ceil(n / columns)  # tiles
        tile = depth * weight_bits * input_bits  # steps of a tile
        steps = across * along * tile
        pairs, one = weight_bits * input_bits, np.ones(len(m))
        # Steps from the first use of a plane to that of the next tile's, the next k's, the next bit's.
        weights_stay = Uses(tile, pairs, weight_bits), Uses(across * tile, pairs, one)
        inputs_stay = Uses(along * tile, pairs, one), Uses(tile, pairs, input_bits)
        cycles = []
        for of_inputs, of_weights in (weights_stay, inputs_stay):
            late = np.maximum(
                _latest(m, rows, depth, input_bits, self._input_cycles, of_inputs),
                _latest(n, columns, depth, weight_bits, self._weight_cycles, of_weights),
            )
            cycles.append(steps - 1 + np.maximum(1, late))
        return steps, *cycles


def _latest(
    vectors: np.ndarray,
    tile: float,
    depth: np.ndarray,
    bits: np.ndarray,
    cycles: float,
    uses: Uses,
) -> np.ndarray:
    """The most cycles by which a plane is complete after the first step that needs it, were no step to wait.

    Planes are loaded tile by tile, in a tile k by k, for each k bit by bit. From one to the next, both the cycle at
    which a plane is complete and the step that needs it move on evenly, except at a last tile that is not full: so the
    most is at a corner, a first or last plane of all tiles that are full, or of the last one.

    Args:
        vectors: Vectors, of each bit of each k.
        tile: Vectors of a full plane.
        depth: How many k there are.
        bits: Bits.
        cycles: Cycles of loading a vector.
        uses: When steps first need them.
    """
    whole = np.floor(vectors / tile)
    rest = vectors - whole * tile

    def within(size: np.ndarray | float) -> np.ndarray:
        """The most within the first tile, were it of this size."""
        plane = size * cycles
        over_bits = (bits - 1) * np.maximum(0, plane - uses.bit)
        found: np.ndarray = plane + over_bits + (depth - 1) * np.maximum(0, plane * bits - uses.depth)
        return found

    further = tile * cycles * depth * bits - uses.tile  # from one full tile to the next
    full = np.where(whole > 0, within(tile) + np.maximum(0, whole - 1) * np.maximum(0, further), 0)
    last = np.where(rest > 0, within(rest) + whole * further, 0)
    return np.maximum(full, last)


def _parts(size: np.ndarray, each: np.ndarray, tile: float, capacity: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cuts `size` vectors of `each` bytes into parts of whole tiles that a buffer holds, at least one tile.

    Returns:
        How many parts there are of what size: those that are full, and the rest.
    """
    most = np.maximum(np.floor(capacity / each / tile) * tile, tile)
    whole = np.floor(size / most)
    rest = size - whole * most
    return [(whole, most), ((rest > 0).astype(np.float64), rest)]
