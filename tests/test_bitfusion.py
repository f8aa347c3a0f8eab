"""BitFusion: the closed form against loops over rows, columns and turns, and what its paper says of fused units."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from conformance import CostModelContract
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import Layer, Network, Precision, Workload
from hwmodels.accelerator import FOLDER, load_accelerator
from hwmodels.bitfusion import WIDTHS, BitFusion, FusionArray
from hwmodels.cost import LayerCost
from hwmodels.energy import mac_energy

EYERISS, STRIPES = BitFusion("bitfusion_eyeriss"), BitFusion("bitfusion_stripes")
ALL_BITS = [Precision.parse(f"int{w}/uint{a}") for w, a in itertools.product((*range(1, 9), 16), repeat=2)]


class TestEyeriss(CostModelContract):
    precisions = ("int2/uint4", "int3/uint8", "int8/uint8", "int16/uint16")

    @pytest.fixture
    def cost_model(self) -> BitFusion:
        return BitFusion()


class TestStripes(CostModelContract):
    precisions = ("int2/uint4", "int3/uint8", "int8/uint8", "int16/uint16")

    @pytest.fixture
    def cost_model(self) -> BitFusion:
        return STRIPES


def array(model: BitFusion = EYERISS, **numbers: float) -> BitFusion:
    """An array with other numbers."""
    given = {name: replace(getattr(model.array, name), value=value) for name, value in numbers.items()}
    return BitFusion(replace(model.array, **given))


def linear(m: int, n: int, k: int) -> Layer:
    shapes = {"weight_shape": (n, k), "input_shape": (1, m, k), "output_shape": (1, m, n)}
    return Layer("layer", "linear", ("input",), ("layer",), macs=m * n * k, **shapes)


def depthwise(channels: int, size: int) -> Layer:
    shape = (1, channels, size, size)
    shapes = {"weight_shape": (channels, 1, 3, 3), "input_shape": shape, "output_shape": shape, "groups": channels}
    return Layer("layer", "conv2d", macs=9 * channels * size**2, kernel=(3, 3), stride=(1, 1), **shapes)


def price(model: BitFusion, layer: Layer, precision: str) -> LayerCost:
    table = model.cost_table(Network((layer,)), {"layer": [Precision.parse(precision)]}, Workload())
    return table.layers["layer"][Precision.parse(precision)]


def cycles(model: BitFusion, layer: Layer, precision: str) -> float:
    return price(model, layer, precision).cost.latency_s * model.accelerator.clock.number


def simulated_computing(model: BitFusion, m: int, n: int, k: int, w: int, a: int) -> int:
    """Turns of the array, one by one: what its units multiply is taken from what is left to multiply."""
    rows, columns = int(model.array.rows.number), int(model.array.columns.number)
    turns = 0
    for _ in range(m):
        for _ in range(0, n, columns):
            left = k * max(w, 8) // 8 * max(a, 8) // 8  # a product of 16 bits is several of 8
            while left > 0:
                left -= rows * (8 // min(w, 8)) * (8 // min(a, 8))
                turns += 1
    return turns


def simulated_moving(model: BitFusion, m: int, n: int, k: int, w: int, a: int) -> float:
    """Bits through the port: halves of the one buffer filled in turn, all of the other operand read for each."""

    def bits(kept: int, kept_buffer: float, again: int) -> int:
        moved, left = 0, kept
        while left > 0:
            part = min(left, int(kept_buffer * 8 / 2))
            moved, left = moved + part + again, left - part
        return moved

    weights, inputs = n * k * w, m * k * a
    least = min(
        bits(weights, model.array.weight_buffer.number, inputs), bits(inputs, model.array.input_buffer.number, weights)
    )
    return (least + m * n * a) / model.array.port.number


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 40)),
    bits=st.tuples(st.sampled_from(WIDTHS), st.sampled_from(WIDTHS)),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    buffers=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    port=st.sampled_from([1, 16, 192]),
)
def test_closed_form_is_the_simulation(sizes, bits, tile, buffers, port) -> None:
    model = array(rows=tile[0], columns=tile[1], weight_buffer=buffers[0], input_buffer=buffers[1], port=port)
    computing = simulated_computing(model, *sizes, *bits)
    moving = simulated_moving(model, *sizes, *bits)
    priced = price(model, linear(*sizes), f"int{bits[0]}/uint{bits[1]}")
    assert priced.cost.latency_s * 5e8 == pytest.approx(max(computing, moving), rel=1e-12)
    assert priced.bound == ("compute" if computing >= moving else "memory")


@pytest.mark.parametrize(
    ("precision", "factor"),
    [
        ("int8/uint8", 1),
        ("int2/uint8", 4),
        ("int4/uint4", 4),
        ("int8/uint2", 4),
        ("int4/uint2", 8),
        ("int2/uint2", 16),
        ("int16/uint8", 1 / 2),
        ("int16/uint16", 1 / 4),
    ],
)
def test_units_fuse_as_the_paper_says(precision: str, factor: float) -> None:
    layer = linear(256, 1024, 4096)
    at8 = cycles(STRIPES, layer, "int8/uint8")
    assert at8 == 256 * 1024 * 4096 / (16 * 32)
    assert cycles(STRIPES, layer, precision) == at8 / factor


@pytest.mark.parametrize(("given", "run"), [(1, 2), (3, 4), (5, 8), (6, 8), (7, 8)])
def test_other_widths_are_rounded_up(given: int, run: int) -> None:
    layer = linear(100, 100, 1000)
    for model in (EYERISS, STRIPES):
        assert cycles(model, layer, f"int{given}/uint8") == cycles(model, layer, f"int{run}/uint8")
        assert cycles(model, layer, f"int8/uint{given}") == cycles(model, layer, f"int8/uint{run}")
    assert price(EYERISS, layer, f"int{given}/uint8").support == "storage"
    assert price(EYERISS, layer, f"int{run}/uint8").support == "native"


def test_depthwise_leaves_the_array_idle() -> None:
    layer = depthwise(64, 14)
    assert cycles(STRIPES, layer, "int8/uint8") == 64 * 14**2  # 9 of 16 rows, 1 of 32 columns
    assert cycles(STRIPES, layer, "int2/uint2") == 64 * 14**2


def test_weights_that_exceed_their_buffer_are_moved_once_or_inputs_again() -> None:
    small = price(EYERISS, linear(1, 1000, 1280), "int8/uint8")
    assert small.bound == "memory"
    assert cycles(EYERISS, linear(1, 1000, 1280), "int8/uint8") == (1280 * 1000 + 1280 + 1000) * 8 / 192


@settings(max_examples=30, deadline=None)
@given(
    layer=st.builds(linear, st.integers(1, 300), st.integers(1, 600), st.integers(1, 2000))
    | st.builds(depthwise, st.integers(1, 200), st.integers(1, 30)),
    model=st.sampled_from([EYERISS, STRIPES]),
)
def test_more_bits_take_no_less(layer: Layer, model: BitFusion) -> None:
    table = model.cost_table(Network((layer,)), {"layer": ALL_BITS}, Workload())
    for cost in ("latency_s", "energy_j"):
        found = table.layers["layer"].column(cost, ALL_BITS).reshape(9, 9)
        assert (np.diff(found, axis=0) >= 0).all(), cost
        assert (np.diff(found, axis=1) >= 0).all(), cost


def test_energy_shares_a_units_turn_among_its_multipliers() -> None:
    layer, energy = linear(16, 16, 256), EYERISS.array.energy
    add = mac_energy(energy, "int8", 8, 8) - energy.int8_multiply.number
    values = 16 * 256 + 16 * 256 + 16 * 16
    for bits, fused in ((8, 1), (4, 4), (2, 16), (16, 1 / 4)):
        cost = price(EYERISS, layer, f"int{bits}/uint{bits}").cost
        macs_j = 16 * 16 * 256 * (0.2e-12 * 3.15 / fused + add)
        assert cost.energy_j == pytest.approx(macs_j + values * bits / 8 * energy.memory.number, rel=1e-12)


@pytest.mark.parametrize(
    "precision", ["float", "int8", "fp16/fp16", "int4-g128/uint8", "nf4/uint8", "int4/uint8-token"]
)
def test_what_is_not_an_integer_is_refused(precision: str) -> None:
    with pytest.raises(ValueError, match=r"layer layer: bitfusion_eyeriss has no .*allowed: integers of 1 to 16 bits"):
        price(EYERISS, linear(1, 2, 3), precision)


def test_arrays_that_come_along() -> None:
    eyeriss, stripes = EYERISS.array, STRIPES.array
    assert (eyeriss.rows.number * eyeriss.columns.number, eyeriss.clock.number) == (512, 500e6)
    buffers = (eyeriss.weight_buffer, eyeriss.input_buffer, eyeriss.output_buffer)
    assert sum(buffer.number for buffer in buffers) == 112 * 1024  # as the paper has it
    assert stripes.clock.number == 980e6
    assert load_accelerator(FusionArray, FOLDER / "bitfusion_stripes.yaml") == stripes
    with pytest.raises(ValueError, match=r"no accelerator 'bitfusion'; did you mean 'bitfusion_"):
        BitFusion("bitfusion")
    with pytest.raises(ValueError, match=r"haq\.yaml is not a valid FusionArray: "):
        BitFusion("haq")


def test_tiers() -> None:
    table = EYERISS.cost_table(Network((linear(1, 2, 3),)), {"layer": ALL_BITS}, Workload())
    assert table.tiers["latency_s"] == "datasheet"
    assert table.tiers["energy_j"] == "index"
    assert table.warnings == ("bitfusion_eyeriss: what runs between layers is not priced",)
    assert math.isfinite(table.sigmas["bitfusion_eyeriss"])
