"""Four laws for HAQ's latency table, from counting bit operations to the array that gives it to the cycle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from experiments.haq_mobilenetv2.latency import BATCH
from hwmodels import Layer, Network, Precision, Site, Workload
from hwmodels.bitserial import BitSerial

BITS = np.arange(1, 9)
PRECISIONS = [Precision.parse(f"int{w}/uint{a}") for w, a in itertools.product(BITS, repeat=2)]

OPERATIONS, ROOFLINE, TILES, ARRAY = "bit operations", "roofline", "tiles, longest of three", "array, step by step"
PARAMETERS = ("rows", "columns", "width", "input_load", "weight_load", "port", "input_buffer", "weight_buffer")

Law = Callable[[Layer, BitSerial], np.ndarray]
Terms = tuple[np.ndarray, np.ndarray, np.ndarray]


def roofline(layer: Layer, model: BitSerial) -> Terms:
    """Cycles of computing, of inputs and of weights, every value once and nothing padded."""
    site, array = Site.of(layer, Workload(batch=BATCH)), model.array
    weight_bits, input_bits = np.meshgrid(BITS, BITS, indexing="ij")
    per_cycle = array.rows.number * array.columns.number * array.width.number
    computing = site.macs * weight_bits * input_bits / per_cycle
    inputs = site.input_values * input_bits / array.input_load.number
    return computing, inputs, site.weight_values * weight_bits / array.weight_load.number


def tiles(layer: Layer, model: BitSerial) -> Terms:
    """The same in whole tiles and vectors, image by image, depthwise convolutions as many channels as columns."""
    array = model.array
    passes, m, n, k = model.product(Site.of(layer, Workload(batch=BATCH)))
    weight_bits, input_bits = np.meshgrid(BITS, BITS, indexing="ij")
    depth = math.ceil(k / array.width.number)
    steps = math.ceil(m / array.rows.number) * math.ceil(n / array.columns.number) * depth
    vectors = passes * depth * array.width.number
    inputs = m * vectors * input_bits / array.input_load.number
    return passes * steps * weight_bits * input_bits, inputs, n * vectors * weight_bits / array.weight_load.number


def array_cycles(network: Network, model: BitSerial) -> np.ndarray:
    """Cycles that the cost model predicts, shape `(layers, weight bits, input bits)`."""
    table = model.cost_table(network, dict.fromkeys(network.names, PRECISIONS), Workload(batch=BATCH))
    seconds = np.array([table.layers[name].column("latency_s", PRECISIONS) for name in network.names])
    cycles: np.ndarray = np.rint(seconds * model.accelerator.clock.number).reshape(-1, len(BITS), len(BITS))
    return cycles


def predictions(network: Network, cycles: np.ndarray) -> dict[str, np.ndarray]:
    """What each law makes of the table, of the table's shape; bit operations are scaled by one number fitted to it."""
    model = BitSerial("haq")
    operations = np.array([roofline(layer, model)[0] for layer in network])
    return {
        OPERATIONS: operations * np.median(cycles / operations),
        ROOFLINE: np.array([np.max(roofline(layer, model), axis=0) for layer in network]),
        TILES: np.array([np.max(tiles(layer, model), axis=0) for layer in network]),
        ARRAY: array_cycles(network, model),
    }


def kind_of(layer: Layer) -> str:
    """What a layer of MobileNetV2 is counted as."""
    if layer.kind == "linear":
        return "classifier"
    if layer.is_depthwise:
        return "depthwise"
    if layer.kernel != (1, 1):
        return "stem"
    if layer.output_shape[-1] == 7:
        return "pointwise, 7 x 7"
    return "expand" if layer.channels > layer.weight_shape[1] else "project"


def fitting_range(network: Network, cycles: np.ndarray, name: str, step: int = 1) -> tuple[float, float]:
    """The least and the most that one of the array's numbers can be, the others as they are, for every entry to fit.

    Args:
        network: The network.
        cycles: The table.
        name: One of `PARAMETERS`; loads and buffers go with `width`, so that it takes as many cycles and vectors.
        step: What it is counted in.
    """
    model = BitSerial("haq")
    shipped = round(getattr(model.array, name).number / step)

    def fits(count: int) -> bool:
        value = count * step
        given = {name: value}
        if name == "width":
            with_it = ("input_load", "weight_load", "port", "input_buffer", "weight_buffer")
            given |= {one: getattr(model.array, one).number * value / model.array.width.number for one in with_it}
        numbers = {one: replace(getattr(model.array, one), value=float(number)) for one, number in given.items()}
        return np.array_equal(array_cycles(network, BitSerial(replace(model.array, **numbers))), cycles)

    return _edge(fits, shipped, max(shipped // 2, 1)) * step, _edge(fits, shipped, 2 * shipped) * step


def _edge(fits: Callable[[int], bool], inside: int, outside: int) -> float:
    """The last number that fits on the way from one that does to one that may not; without end where that one does."""
    if fits(outside):
        return math.inf if outside > inside else 0.0
    while abs(outside - inside) > 1:
        middle = (inside + outside) // 2
        inside, outside = (middle, outside) if fits(middle) else (inside, middle)
    return inside
