"""Bit-serial arrays: the closed form against a simulation step by step, and against HAQ's table entry by entry."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance import CostModelContract
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels import Layer, Network, Precision, Site, Workload
from hwmodels.accelerator import FOLDER, AcceleratorModel, list_accelerators, load_accelerator
from hwmodels.bitserial import BitSerial, BitSerialArray
from hwmodels.cost import COSTS
from hwmodels.energy import mac_energy

STUDY = Path(__file__).parent.parent / "experiments" / "haq_mobilenetv2"
REFERENCE = Path(os.environ.get("BITPLAN_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data"))
TABLE = REFERENCE / "haq_mobilenetv2_latency.npy"
needs_table = pytest.mark.skipif(not TABLE.exists(), reason=f"BITPLAN_REFERENCE_DATA has no {TABLE.name}")

ALL_BITS = [Precision.parse(f"int{w}/uint{a}") for w, a in itertools.product(range(1, 9), repeat=2)]
UNIFORM = [3_433_704, 7_063_425, 11_103_578, 15_716_150, 20_916_896, 26_653_434, 32_886_714, 39_624_933]
"""Cycles of HAQ's table where everything has 1, 2, ... 8 bits."""


class TestHaq(CostModelContract):
    precisions = ("int1/uint1", "int2/uint4", "int4/uint8", "int8/uint8", "int4-asym/int8")

    @pytest.fixture
    def cost_model(self) -> BitSerial:
        return BitSerial("haq")


class TestBismo(CostModelContract):
    precisions = ("int2/uint4", "int4/uint8", "int8/uint8")

    @pytest.fixture
    def cost_model(self) -> BitSerial:
        return BitSerial("bismo")


HAQ = BitSerial("haq")


def array(**numbers: float) -> BitSerial:
    """HAQ's accelerator with other numbers."""
    given = {name: replace(getattr(HAQ.array, name), value=value) for name, value in numbers.items()}
    return BitSerial(replace(HAQ.array, **given))


def linear(m: int, n: int, k: int) -> Layer:
    shapes = {"weight_shape": (n, k), "input_shape": (1, m, k), "output_shape": (1, m, n)}
    return Layer("layer", "linear", ("input",), ("layer",), macs=m * n * k, **shapes)


def conv(c_in: int, c_out: int, size: int, kernel: int = 1, groups: int = 1, stride: int = 1) -> Layer:
    weight, out = (c_out, c_in // groups, kernel, kernel), math.ceil(size / stride)
    shapes = {"weight_shape": weight, "input_shape": (1, c_in, size, size), "output_shape": (1, c_out, out, out)}
    more = {"groups": groups, "kernel": (kernel, kernel), "stride": (stride, stride)}
    return Layer("layer", "conv2d", ("input",), ("layer",), macs=math.prod(weight) * out**2, **shapes, **more)


def cycles(model: AcceleratorModel, layer: Layer, precision: str = "int8/uint8", batch: int = 1) -> float:
    table = model.cost_table(Network((layer,)), {"layer": [Precision.parse(precision)]}, Workload(batch=batch))
    return table.layers["layer"][Precision.parse(precision)].cost.latency_s * model.accelerator.clock.number


def simulated_pass(model: BitSerial, m: int, n: int, depth: int, w: int, a: int, weights_stay: bool) -> float:
    """Cycles of one pass, step by step, planes loaded in the order in which they are first needed."""
    made = {name: getattr(model.array, name).number for name in ("rows", "columns", "width")}
    row_tiles = [min(made["rows"], m - at) for at in range(0, m, int(made["rows"]))]
    column_tiles = [min(made["columns"], n - at) for at in range(0, n, int(made["columns"]))]
    if weights_stay:
        steps = [
            (row, column, k, i, j)
            for column in range(len(column_tiles))
            for row in range(len(row_tiles))
            for k in range(depth)
            for i in range(a)
            for j in range(w)
        ]
    else:
        steps = [
            (row, column, k, i, j)
            for row in range(len(row_tiles))
            for column in range(len(column_tiles))
            for k in range(depth)
            for j in range(w)
            for i in range(a)
        ]
    inputs_there: dict[tuple[int, ...], float] = {}
    weights_there: dict[tuple[int, ...], float] = {}
    input_clock = weight_clock = now = 0.0
    for row, column, k, i, j in steps:
        if (row, k, i) not in inputs_there:
            input_clock += row_tiles[row] * made["width"] / model.array.input_load.number
            inputs_there[row, k, i] = input_clock
        if (column, k, j) not in weights_there:
            weight_clock += column_tiles[column] * made["width"] / model.array.weight_load.number
            weights_there[column, k, j] = weight_clock
        # A step is the cycle in which the last vector comes, or the one after the step before it.
        now = max(now, inputs_there[row, k, i] - 1, weights_there[column, k, j] - 1) + 1
    return now


def simulated(model: BitSerial, m: int, n: int, depth: int, w: int, a: int) -> float:
    """Cycles of a product: its parts one after another, in the quicker order, no faster than the port loads."""
    vector = model.array.width.number / 8
    held_m = model.array.input_buffer.number // (vector * depth * a)
    held_n = model.array.weight_buffer.number // (vector * depth * w)
    rows, columns = int(model.array.rows.number), int(model.array.columns.number)
    part_m = max(int(held_m // rows) * rows, rows)
    part_n = max(int(held_n // columns) * columns, columns)
    parts = [(min(part_m, m - x), min(part_n, n - y)) for x in range(0, m, part_m) for y in range(0, n, part_n)]
    loaded = sum((x * a + y * w) * depth for x, y in parts) * model.array.width.number
    orders = [sum(simulated_pass(model, x, y, depth, w, a, stay) for x, y in parts) for stay in (True, False)]
    return max(min(orders), loaded / model.array.port.number)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 14), st.integers(1, 14), st.integers(1, 24)),
    bits=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    tile=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    loads=st.tuples(st.sampled_from([2, 4, 8, 16]), st.sampled_from([2, 4, 8, 16])),
    buffers=st.tuples(st.integers(4, 60), st.integers(4, 60)),
    port=st.sampled_from([3, 8, 32]),
)
def test_closed_form_is_the_simulation(sizes, bits, tile, loads, buffers, port) -> None:
    model = array(
        rows=tile[0],
        columns=tile[1],
        width=8,
        input_load=loads[0],
        weight_load=loads[1],
        input_buffer=buffers[0],
        weight_buffer=buffers[1],
        port=port,
    )
    (m, n, k), (w, a) = sizes, bits
    expected = simulated(model, m, n, math.ceil(k / 8), w, a)
    assert cycles(model, linear(m, n, k), f"int{w}/uint{a}") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("layer", "passes", "m", "n", "k"),
    [
        (conv(3, 32, 8, kernel=3, stride=2), 2, 16, 32, 27),
        (conv(32, 32, 8, kernel=3, groups=32), 2 * 2, 64, 16, 144),  # 16 channels fill the columns
        (conv(8, 8, 8, kernel=3, groups=8), 2, 64, 8, 72),  # fewer channels than columns
        (conv(24, 24, 8, kernel=3, groups=24), 2 * 2, 64, 16, 144),  # the last pass is priced as a full one
        (conv(64, 64, 8, groups=2), 2 * 2, 64, 32, 32),  # wide groups one by one
        (linear(5, 10, 20), 1, 10, 10, 20),  # samples are rows
    ],
)
def test_layers_become_products(layer: Layer, passes: int, m: int, n: int, k: int) -> None:
    assert HAQ.product(Site.of(layer, Workload(batch=2))) == (passes, m, n, k)
    expected = passes * simulated(HAQ, m, n, math.ceil(k / 256), 3, 2)
    assert cycles(HAQ, layer, "int3/uint2", batch=2) == pytest.approx(expected, rel=1e-12)


layers = st.one_of(
    st.builds(linear, st.integers(1, 200), st.integers(1, 400), st.integers(1, 1500)),
    st.builds(conv, st.integers(1, 300), st.integers(1, 300), st.integers(1, 30)),
    st.integers(1, 300).flatmap(
        lambda c: st.builds(conv, st.just(c), st.just(c), st.integers(1, 30), st.just(3), st.just(c))
    ),
)


@settings(max_examples=30, deadline=None)
@given(layer=layers, model=st.sampled_from([HAQ, BitSerial("bismo")]))
def test_more_bits_take_no_less(layer: Layer, model: BitSerial) -> None:
    found = bit_cycles(model, Network((layer,)), 1)[0]
    assert (np.diff(found, axis=0) >= 0).all()
    assert (np.diff(found, axis=1) >= 0).all()


def test_where_computing_bounds_time_grows_with_the_product_of_bits() -> None:
    layer = linear(4096, 4096, 256)
    for w, a in itertools.product((1, 2, 3, 5, 8), repeat=2):
        steps = 256 * 256 * w * a
        found = cycles(HAQ, layer, f"int{w}/uint{a}")
        assert steps <= found <= steps + 4096 * (w + a)  # what is loaded first is waited for
        if w * a > 8:
            assert found == pytest.approx(steps, rel=0.02)


def test_where_weights_bound_time_grows_with_weight_bits() -> None:
    layer = linear(1, 4096, 4096)
    assert cycles(HAQ, layer, "int8/uint8") == pytest.approx(8 * cycles(HAQ, layer, "int1/uint8"), rel=1e-3)
    assert cycles(HAQ, layer, "int8/uint8") == pytest.approx(cycles(HAQ, layer, "int8/uint1"), rel=1e-3)
    table = HAQ.cost_table(Network((layer,)), {"layer": ALL_BITS}, Workload())
    assert {table.layers["layer"][precision].bound for precision in ALL_BITS} == {"memory"}


def test_images_follow_each_other_and_rows_share_weights() -> None:
    layer = conv(64, 64, 7)
    assert cycles(HAQ, layer, batch=4) == 4 * cycles(HAQ, layer)
    row = linear(1, 512, 512)
    assert cycles(HAQ, row, batch=16) < 1.1 * cycles(HAQ, row)
    assert cycles(HAQ, replace(row, calls=3, macs=3 * row.macs)) == 3 * cycles(HAQ, row)


def test_energy_counts_operations_and_bytes_loaded() -> None:
    layer, precision = linear(16, 16, 256), Precision.parse("int4/uint2")
    cost = HAQ.cost_table(Network((layer,)), {"layer": [precision]}, Workload()).layers["layer"][precision].cost
    energy = HAQ.array.energy
    loaded = (16 * 2 + 16 * 4) * 256 / 8
    macs = 16 * 16 * 256
    assert cost.energy_j == pytest.approx(
        macs * mac_energy(energy, "bit-serial", 4, 2) + loaded * energy.memory.number, rel=1e-12
    )


def test_embeddings_are_looked_up() -> None:
    layer = Layer("layer", "embedding", weight_shape=(100, 64), input_shape=(1, 8), output_shape=(1, 8, 64))
    layer = replace(layer, quantizes_input=False)
    assert cycles(HAQ, layer, "int4") == 8 * 64 * 4 / 256
    with pytest.raises(ValueError, match=r"layer layer: an embedding is weight-only: use int4, not int4/uint8"):
        cycles(HAQ, layer, "int4/uint8")


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("float", r"layer layer: haq has no weights in float; allowed: integers of 1 to 8 bits with a static scale"),
        ("int8", "layer layer: haq has no inputs in float"),
        ("int8/fp16", "haq has no inputs in fp16"),
        ("int16/uint8", "haq has no weights in int16"),
        ("ternary/uint8", "haq has no weights in ternary"),
        ("codebook4/uint8", "haq has no weights in codebook4"),
        ("int4-g128/uint8", "haq has no weights in int4-g128"),
        ("int4/uint8-token", "haq has no inputs in uint8-token"),
    ],
)
def test_what_is_not_an_integer_is_refused(precision: str, message: str) -> None:
    layer = linear(1, 2, 3)
    assert HAQ.refusal(layer, Precision.parse(precision))
    with pytest.raises(ValueError, match=message):
        cycles(HAQ, layer, precision)


def test_weight_only_layers_are_refused() -> None:
    layer = replace(linear(1, 2, 3), kind="lstm", quantizes_input=False)
    with pytest.raises(
        ValueError, match="layer layer: haq multiplies integers only, and a weight-only lstm reads floats"
    ):
        cycles(HAQ, layer, "int8")


def test_accelerators_that_come_along_are_valid() -> None:
    assert list_accelerators() == ("bismo", "bitfusion_eyeriss", "bitfusion_stripes", "haq")
    for name in ("haq", "bismo"):
        accelerator = load_accelerator(BitSerialArray, name)
        assert accelerator.id == name
        assert len(accelerator.quantities) == 19
    bismo = load_accelerator(BitSerialArray, "bismo")
    binary = 2 * bismo.rows.number * bismo.columns.number * bismo.width.number * bismo.clock.number
    assert binary == pytest.approx(6.5e12, rel=0.01)  # as its documentation says


def test_accelerators_that_do_not_exist_are_named() -> None:
    with pytest.raises(ValueError, match=r"no accelerator 'hqa'; did you mean 'haq'\?; known accelerators: bismo"):
        BitSerial("hqa")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rows: {value: 16", "rows: {value: 0", "rows must be a whole number of at least 1, got 0"),
        ("columns: {value: 16", "columns: {value: 2.5", "columns must be a whole number"),
        ("clock: {value: 1.0e9, unit: Hz", "clock: {value: 1.0e9, unit: s", "clock must be in Hz, got s"),
        ("input_load: {value: 256", "input_load: {value: 0", "input_load, weight_load and port must be above 0"),
        ("kind: bit-serial", "kind: bitfusion", "kind: Input should be 'bit-serial'"),
        ("schema: 1", "schema: 1\nlanes: 4", "lanes: Unexpected keyword argument"),
        ("schema: 1", "schema: 1\nschema: 1", "key 'schema' occurs twice"),
    ],
)
def test_files_that_are_wrong_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (FOLDER / "haq.yaml").read_text()
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        BitSerial(path)


def test_own_files_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((FOLDER / "haq.yaml").read_text().replace("id: haq", "id: mine"))
    assert BitSerial(path).name == "mine"


def test_tiers_say_what_the_clock_is_worth() -> None:
    for name, tier in (("haq", "index"), ("bismo", "datasheet")):
        table = BitSerial(name).cost_table(Network((linear(1, 2, 3),)), {"layer": ALL_BITS}, Workload())
        assert table.tiers["latency_s"] == tier
        assert table.tiers["energy_j"] == "index"
        run = table.layers["layer"][ALL_BITS[0]]
        assert (run.compute, run.path, run.tier, run.support) == ("bit-serial", name, tier, "native")
        assert any("nominal" in warning for warning in table.warnings) == (tier == "index")
        assert set(table.sigmas) == {name}


@pytest.fixture(scope="module")
def network() -> Network:
    """MobileNetV2 as the study on HAQ's table writes it down."""
    spec = importlib.util.spec_from_file_location("written_mobilenetv2", STUDY / "mobilenetv2.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: Network = module.mobilenetv2()
    return network


def bit_cycles(model: BitSerial, network: Network, batch: int) -> np.ndarray:
    """Cycles of all layers at 1 to 8 bits, shape `(layers, weight bits, input bits)`."""
    table = model.cost_table(network, dict.fromkeys(network.names, ALL_BITS), Workload(batch=batch))
    seconds = np.array([table.layers[name].column("latency_s", ALL_BITS) for name in network.names])
    return (seconds * model.accelerator.clock.number).reshape(-1, 8, 8)


def test_uniform_bits_take_what_haqs_table_says(network: Network) -> None:
    totals = np.rint(bit_cycles(HAQ, network, 16)).sum(0).diagonal()
    assert totals.tolist() == UNIFORM


@needs_table
def test_all_of_haqs_table_is_met_to_the_cycle(network: Network) -> None:
    assert np.array_equal(np.rint(bit_cycles(HAQ, network, 16)), np.load(TABLE))


@needs_table
@pytest.mark.parametrize(
    "other", [{"rows": 15}, {"columns": 8}, {"weight_load": 128}, {"input_load": 128}, {"input_buffer": 501_728}]
)
def test_other_arrays_do_not_make_that_table(network: Network, other: dict[str, float]) -> None:
    assert not np.array_equal(np.rint(bit_cycles(array(**other), network, 16)), np.load(TABLE))


@pytest.mark.parametrize("name", ["haq", "bismo", "bitfusion"])
def test_configurations_build_their_model(name: str) -> None:
    from hwmodels import CostModel
    from search.config import build, compose

    model = build(compose([f"hardware={name}"]).hardware, CostModel, "hardware")
    assert isinstance(model, AcceleratorModel)
    assert model.name.startswith(name)


def test_costs_that_are_counted_are_those_of_storage() -> None:
    from hwmodels.base import storage_columns

    layer = conv(16, 8, 5)
    table = HAQ.cost_table(Network((layer,)), {"layer": ALL_BITS}, Workload(batch=2))
    counted = storage_columns(layer, ALL_BITS, Workload(batch=2))
    for cost in ("weight_bytes", "activation_bytes", "bit_ops"):
        assert table.layers["layer"].column(cost, ALL_BITS).tolist() == counted[:, COSTS.index(cost)].tolist()
