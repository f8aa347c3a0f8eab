"""The roofline's prices, against the formula worked by hand on a device of round numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import Layer, Network, Operation, Precision, Roofline, StorageModel, Tensor, Workload, load_device
from hwmodels.capability import Capability
from hwmodels.cost import CostReport
from hwmodels.device import Tile
from hwmodels.energy import mac_energy
from hwmodels.roofline import join_seconds, padded_operations
from hwmodels.site import Gemm, Site

TOY = load_device(Path(__file__).parent / "devices" / "toy.yaml")
FLOAT, INT8, INT4 = (Precision.parse(name) for name in ("float", "int8/uint8", "int4/uint8"))
T0, CACHE, DRAM = 1e-6, 2e11 * 0.8, 1e10 * 0.8  # at two threads, with the share that kernels reach
MACS, VALUES, WEIGHTS = 64 * 64 * 9 * 28 * 28, 64 * 28 * 28, 64 * 64 * 9


def conv_network(channels: int = 64, size: int = 28, **changes: object) -> Network:
    """One 3x3 convolution, and an addition after it."""
    shape = (1, channels, size, size)
    conv = Layer(
        "conv",
        "conv2d",
        ("input",),
        ("conv",),
        weight_shape=(channels, channels, 3, 3),
        macs=channels * channels * 9 * size * size,
        input_shape=shape,
        output_shape=shape,
        kernel=(3, 3),
        stride=(1, 1),
    )
    tensors = {
        "input": Tensor("input", shape, None, ("conv", "add")),
        "conv": Tensor("conv", shape, "conv", ("add",)),
        "add": Tensor("add", shape, "add"),
    }
    add = Operation("add", "add", ("input", "conv"), ("add",))
    return Network((replace(conv, **changes),), (add,), tensors, 3, ("conv", "add"), ("add",))


def chain(*layers: tuple[str, int, int], between: str = "relu", rows: int = 16) -> Network:
    """Linear layers of (name, inputs, outputs), one after the other, with an operation after each."""
    built, operations, tensors, order = [], [], {}, []
    read = "input"
    tensors["input"] = Tensor("input", (1, rows, layers[0][1]), None, (layers[0][0],))
    for number, (name, inputs, outputs) in enumerate(layers):
        after = layers[number + 1][0] if number + 1 < len(layers) else None
        shape = (1, rows, outputs)
        built.append(
            Layer(
                name,
                "linear",
                (read,),
                (name,),
                (outputs, inputs),
                macs=rows * inputs * outputs,
                input_shape=(1, rows, inputs),
                output_shape=shape,
            )
        )
        act = f"{name}.{between}"
        operations.append(Operation(act, between, (name,), (act,)))
        tensors[name] = Tensor(name, shape, name, (act,))
        tensors[act] = Tensor(act, shape, act, (after,) if after else ())
        order += [name, act]
        read = act
    return Network(tuple(built), tuple(operations), tensors, 0, tuple(order), (read,))


def joined(compute: float, memory: float) -> float:
    return math.hypot(compute, memory)  # sharpness 2


def prices(network: Network, *names: str, **workload: int) -> dict[str, tuple[float, float, str, str]]:
    """Latency, energy, compute type and bound of the first layer, by precision name."""
    choices = {network.names[0]: [Precision.parse(name) for name in names]}
    table = Roofline(TOY).cost_table(network, choices, Workload(**workload)).layers[network.names[0]]
    return {
        name: (row.cost.latency_s, row.cost.energy_j, row.compute, row.bound)
        for name, row in zip(names, table.values(), strict=True)
    }


def report(network: Network, *names: str, **workload: int) -> CostReport:
    """What a network costs with one precision for each layer."""
    policy = dict(zip(network.names, map(Precision.parse, names), strict=True))
    return Roofline(TOY).network_cost(network, policy, Workload(**workload))


def test_latency_is_the_formula() -> None:
    found = prices(conv_network(), "float", "int8/uint8")
    memory = (4 * WEIGHTS + 8 * VALUES) / CACHE
    assert found["float"][0] == pytest.approx(T0 + joined(2 * MACS / 50e9, memory))
    memory, quantize = (WEIGHTS + 5 * VALUES) / CACHE, T0 + 5 * VALUES / CACHE
    assert found["int8/uint8"][0] == pytest.approx(T0 + joined(2 * MACS / 200e9, memory) + quantize)


def test_energy_counts_operations_bytes_and_idling() -> None:
    found = prices(conv_network(), "float", "int8/uint8")
    latency, energy, *_ = found["float"]
    assert energy == pytest.approx(MACS * 4.6e-12 + (4 * WEIGHTS + 8 * VALUES) * 1e-12 + 2 * latency)
    latency, energy, *_ = found["int8/uint8"]
    mac = 0.2e-12 + 0.03e-12 * 4**0.87
    assert energy == pytest.approx(MACS * mac + (WEIGHTS + 10 * VALUES) * 1e-12 + 2 * latency)


def test_products_are_padded_to_the_kernels_tile() -> None:
    path = TOY.calibration["int8"]
    assert path.tile == Tile(1, 16, 4, "made up")
    assert padded_operations(Gemm(7, 17, 5, 2), path) == 2 * 7 * 32 * 8 * 2
    narrow, wide = (prices(conv_network(channels=c), "int8/uint8")["int8/uint8"] for c in (2, 16))
    macs = 16 * 20 * 28 * 28  # 2 output channels are 16, 18 products are 20
    moved = (2 * 2 * 9 + 5 * 2 * 28 * 28) / CACHE
    assert narrow[0] == pytest.approx(2 * T0 + joined(2 * macs / 200e9, moved) + 5 * 2 * 28 * 28 / CACHE)
    assert wide[0] < 8 * narrow[0]


def test_storage_only_formats_cost_what_they_are_unpacked_to() -> None:
    network = conv_network()
    found = prices(network, "int8/uint8", "int4/uint8", "int2/uint4")
    assert len(set(found.values())) == 1
    whole = [Roofline(TOY).network_cost(network, {"conv": p}, Workload()) for p in (INT8, INT4)]
    assert whole[0].total.weight_bytes - whole[1].total.weight_bytes == WEIGHTS / 2
    assert [one.layers["conv"].support for one in whole] == ["native", "storage"]


def test_packed_weights_move_as_they_are_stored_with_their_scales() -> None:
    network = chain(("fc", 256, 256), rows=1)
    row = report(network, "int4-g128").layers["fc"]
    stored = 256 * 256 / 2 + 4 * 512  # two groups of each channel, a scale of 4 bytes each
    memory = (stored + 4 * (256 + 256)) / CACHE
    assert row.cost.latency_s == pytest.approx(2 * T0 + joined(2 * 256 * 256 / 50e9, memory)), "unpacking is a kernel"
    assert (row.path, row.compute, row.tier, row.bound) == ("packed", "fp32", "datasheet", "compute")


def test_what_the_device_refuses_is_refused_with_its_note() -> None:
    network = conv_network(channels=8, weight_shape=(8, 1, 3, 3), groups=8, macs=8 * 9 * 28 * 28)
    with pytest.raises(ValueError, match="cannot run conv2d conv at int8/uint8: depthwise convolutions have no"):
        prices(network, "int8/uint8")
    assert prices(network, "int4/uint8")["int4/uint8"][2] == "int8", "the refusal is about int8 alone"


def test_combinations_without_a_kernel_run_in_float() -> None:
    found = prices(conv_network(), "float", "int4", "int16/int16", "float/uint8")
    assert {row[2] for row in found.values()} == {"fp32"}
    assert found["int4"] == found["float"], "weights are dequantized when loaded"
    assert found["float/uint8"][0] == pytest.approx(found["float"][0] + 2 * T0 + 2 * 5 * VALUES / CACHE)


def test_bounds() -> None:
    assert prices(chain(("fc", 1024, 1024), rows=1), "float")["float"][3] == "memory"
    assert prices(chain(("fc", 1024, 1024), rows=512), "float")["float"][3] == "compute"
    assert prices(chain(("fc", 4, 4), rows=1), "float")["float"][3] == "overhead"


def test_fixed_costs_are_the_other_operations_and_the_launch() -> None:
    fixed = Roofline(TOY).cost_table(conv_network(), {}, Workload(batch=2)).fixed
    traffic = 2 * 3 * VALUES * 4
    assert fixed.latency_s == pytest.approx(1e-5 + T0 + traffic / CACHE)
    assert fixed.energy_j == pytest.approx(traffic * 1e-12 + 2 * fixed.latency_s)
    assert fixed.weight_bytes == 12


def test_what_outgrows_the_caches_comes_from_memory() -> None:
    fixed = Roofline(TOY).cost_table(conv_network(), {}, Workload(batch=4)).fixed
    traffic = 4 * 3 * VALUES * 4
    assert fixed.latency_s == pytest.approx(1e-5 + T0 + traffic / DRAM), "two caches of a megabyte hold 2.4 MB no more"
    assert fixed.energy_j == pytest.approx(traffic * 100e-12 + 2 * fixed.latency_s)


def test_activations_in_an_epilogue_are_free() -> None:
    relu, tanh = (
        Roofline(TOY).cost_table(chain(("fc", 8, 8), between=kind), {}, Workload()) for kind in ("relu", "tanh")
    )
    assert relu.fixed.latency_s == pytest.approx(1e-5)
    assert tanh.fixed.latency_s == pytest.approx(1e-5 + T0 + 2 * 16 * 8 * 4 / CACHE)


def test_an_integer_kernel_hands_on_integers_for_nothing() -> None:
    network, values = chain(("a", 8, 32), ("b", 32, 8)), 16 * 32
    both = report(network, "int8/uint8", "int8/uint8")
    assert both.total.latency_s == pytest.approx(sum(x.cost.latency_s for x in both.layers.values()) + 1e-5)
    first = (8 * 32 + 16 * 8 + values) / CACHE  # weights, inputs and outputs of a byte each
    compute = 2 * 16 * 32 * 8 / 200e9
    assert both.layers["a"].cost.latency_s == pytest.approx(
        T0 + joined(compute, first) + T0 + 5 * 16 * 8 / CACHE  # the network's input comes in floats
    )


@pytest.mark.parametrize(
    ("first", "second", "seconds"),
    [
        ("float", "float", 0.0),
        ("float", "int8/uint8", T0 + 5 * 512 / CACHE),
        ("int8/uint8", "float", 3 * 512 / CACHE),  # written in four bytes instead of one
        ("int8/uint8", "int8/uint8-token", 2 * T0 + (3 + 9) * 512 / CACHE),
        ("float", "int8/uint8-dynamic", 2 * T0 + 9 * 512 / CACHE),
        ("float", "float/uint8", 2 * T0 + 10 * 512 / CACHE),
        ("int8/uint8", "float/uint8", T0 + 5 * 512 / CACHE),
        ("float", "int16/int16", 2 * T0 + 10 * 512 / CACHE),
    ],
)
def test_boundaries_by_hand(first: str, second: str, seconds: float) -> None:
    network = chain(("a", 8, 32), ("b", 32, 8))
    policy = {"a": Precision.parse(first), "b": Precision.parse(second)}
    table = Roofline(TOY).cost_table(network, {name: [p] for name, p in policy.items()}, Workload())
    (boundary,) = table.boundaries
    assert (boundary.tensor, boundary.producer, boundary.consumer) == ("a.relu", "a", "b")
    assert boundary.cost(policy["a"], policy["b"]).latency_s == pytest.approx(seconds)
    found = report(network, first, second)
    layers = sum(layer.cost.latency_s for layer in found.layers.values())
    assert found.total.latency_s == pytest.approx(layers + seconds + 1e-5)
    assert sum(found.path_seconds.values()) == pytest.approx(found.total.latency_s)


@pytest.mark.parametrize("float_bits", [8, 16, 32])
def test_integers_of_sixteen_bits_are_handed_on_as_such(float_bits: int) -> None:
    """Also where floats have 16 bits: what is as wide as a float is not one."""
    wide = Capability(("linear",), ("int8",), ("int16",), "native", "16 bits", "int8", held_weight_bits=8)
    device = replace(TOY, float_bits=float_bits, capabilities=(replace(wide, requantizes=True), *TOY.capabilities))
    sixteen, choices = Precision.parse("int8/int16"), (Precision.parse("int8/int16"), INT8, FLOAT)
    table = Roofline(device).cost_table(chain(("a", 8, 32), ("b", 32, 8)), {"a": choices, "b": choices}, Workload())
    (boundary,) = table.boundaries
    for left in (sixteen, INT8):
        assert boundary.cost(left, sixteen).latency_s == pytest.approx(512 / CACHE), "two bytes written, not one"
        assert boundary.cost(left, INT8).latency_s == 0
    assert boundary.cost(FLOAT, sixteen).latency_s == pytest.approx(T0 + (float_bits / 8 + 2) * 512 / CACHE)


def test_other_readers_keep_a_tensor_in_floats() -> None:
    """What a skip connection reads as well is left in floats: the layer that wants another converts it."""
    network = chain(("a", 8, 32), ("b", 32, 8), between="tanh")
    table = Roofline(TOY).cost_table(network, dict.fromkeys(network.names, (INT8,)), Workload())
    assert not table.boundaries
    passes = T0 + 5 * 512 / CACHE
    alone = T0 + joined(2 * 16 * 16 * 32 / 200e9, (32 * 8 + 512 + 4 * 16 * 8) / CACHE)
    assert table.layers["b"][INT8].cost.latency_s == pytest.approx(alone + passes)


def test_a_tensor_is_converted_once_for_all_its_readers() -> None:
    network = chain(("a", 8, 32), ("b", 32, 8))
    twin = replace(network.layers[1], name="c", writes=("c",))
    tensors = network.tensors | {
        "a.relu": replace(network.tensors["a.relu"], consumers=("b", "c")),
        "c": Tensor("c", (1, 16, 8), "c"),
    }
    both = replace(network, layers=(*network.layers, twin), tensors=tensors, order=(*network.order, "c"))
    table = Roofline(TOY).cost_table(both, dict.fromkeys(both.names, (INT8, FLOAT)), Workload())
    assert [boundary.consumer for boundary in table.boundaries] == ["b"]
    assert table.layers["b"][INT8] == table.layers["c"][INT8]


def test_storage_is_the_counted_models() -> None:
    network, choices = conv_network(), {"conv": [FLOAT, INT8, INT4]}
    table = Roofline(TOY).cost_table(network, choices, Workload(batch=3))
    counted = StorageModel().cost_table(network, choices, Workload(batch=3))
    for cost in ("weight_bytes", "activation_bytes", "bit_ops"):
        precisions = (*choices["conv"],)
        assert (table.column(cost, "conv", precisions) == counted.column(cost, "conv", precisions)).all()
    assert table.tiers["latency_s"] == "calibrated"
    assert table.tiers["energy_j"] == "index"


def test_the_tier_is_that_of_the_worst_path_that_is_run() -> None:
    network = chain(("fc", 256, 256))
    tiers = [
        Roofline(TOY).cost_table(network, {"fc": [Precision.parse(name)]}, Workload()).tiers["latency_s"]
        for name in ("float", "int4-g32")
    ]
    assert tiers == ["calibrated", "datasheet"]


def test_calls_are_charged_each() -> None:
    once = prices(conv_network(), "int8/uint8")["int8/uint8"]
    thrice = prices(conv_network(calls=3, macs=3 * MACS), "int8/uint8")["int8/uint8"]
    assert thrice[0] == pytest.approx(3 * once[0], rel=0.05), "one pass converts the input of all calls"


def test_calls_of_different_sizes_are_charged_for_theirs() -> None:
    """One convolution, called on 28 x 28 and on 14 x 14."""
    twice = conv_network(calls=2, macs=MACS + MACS // 4)
    moved = (4 * WEIGHTS + 8 * 0.625 * VALUES) / CACHE
    expected = 2 * (T0 + joined(0.625 * 2 * MACS / 50e9, moved))
    assert prices(twice, "float")["float"][0] == pytest.approx(expected)
    quantize = T0 + 5 * 1.25 * VALUES / CACHE
    moved = (WEIGHTS + 5 * 0.625 * VALUES) / CACHE
    expected = 2 * (T0 + joined(0.625 * 2 * MACS / 200e9, moved)) + quantize
    assert prices(twice, "int8/uint8")["int8/uint8"][0] == pytest.approx(expected)
    parts = Roofline(TOY).parts(twice, {"conv": FLOAT}, Workload(batch=3))["conv"]
    assert parts.operations == pytest.approx(3 * 2 * 1.25 * MACS)


def test_embeddings_read_rows_not_the_table() -> None:
    def latency(rows: int) -> float:
        embedding = Layer(
            "e", "embedding", ("ids",), ("e",), (rows, 64), 0, 0, 0, (1, 8), (1, 8, 64), quantizes_input=False
        )
        network = Network((embedding,), (), {}, 10**7 - rows * 64, ("e",))  # as many bytes resident
        return prices(network, "int8")["int8"][0]

    assert latency(100) == latency(100_000)
    assert latency(100) == pytest.approx(T0 + (8 * 64 * (1 + 4) + 8 * 4) / DRAM)


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(1, 60))
def test_joined_time_lies_between_the_longer_and_the_sum(a: float, b: float, sharpness: float) -> None:
    time = join_seconds(np.array([a]), np.array([b]), sharpness)[0]
    assert max(a, b) - 1e-9 <= time <= a + b + 1e-9


def test_tiny_times_do_not_underflow() -> None:
    small = np.array([3e-9]), np.array([4e-9])
    assert join_seconds(*small, 50.0)[0] == pytest.approx(4e-9, rel=1e-6)
    assert join_seconds(*small, 2.0)[0] == pytest.approx(5e-9)
    assert join_seconds(*small, math.inf)[0] == 4e-9


def test_mac_energy_passes_through_the_published_figures() -> None:
    adder = 0.03e-12 * 4**0.87
    assert adder == pytest.approx(0.1e-12, rel=0.01)
    assert mac_energy(TOY.energy, "int8", 8, 8) == pytest.approx(0.2e-12 + adder)
    assert mac_energy(TOY.energy, "int32", 32, 32) == pytest.approx(3.1e-12 + adder, rel=0.01)
    assert mac_energy(TOY.energy, "fp32", 32, 32) == pytest.approx(4.6e-12)
    assert mac_energy(TOY.energy, "bf16", 16, 16) == pytest.approx(2.0e-12), "sums are kept in fp32"


def test_workloads_and_layers_the_device_cannot_price() -> None:
    with pytest.raises(ValueError, match=r"figures for 1 to 2 threads, got workload.threads=3"):
        prices(conv_network(), "float", threads=3)
    with pytest.raises(ValueError, match=r"weight-only, its input stays in float: use int8, not int8/uint8"):
        prices(conv_network(quantizes_input=False), "int8/uint8")


def test_one_thread_is_slower() -> None:
    assert prices(conv_network(), "float", threads=1)["float"][0] > prices(conv_network(), "float")["float"][0]


def test_what_is_not_known_is_not_priced() -> None:
    unknown = replace(TOY.memory[-1], bandwidth=replace(TOY.tdp, unit="byte/s"))
    device = replace(TOY, memory=(unknown,), compute={n: replace(p, peak=p.peak[2]) for n, p in TOY.compute.items()})
    table = Roofline(device).cost_table(conv_network(), {"conv": [FLOAT, INT8]}, Workload())
    assert np.isnan(table.column("latency_s", "conv", (FLOAT, INT8))).all()
    assert "latencies are not" in table.warnings[0]


def test_sites_of_convolutions() -> None:
    layer = conv_network(channels=8, weight_shape=(8, 2, 3, 3), groups=4, macs=8 * 2 * 9 * 28 * 28).layers[0]
    site = Site.of(layer, Workload(batch=5))
    assert site == Site("conv2d", 5, 8, 8, (3, 3), (1, 1), 4, (28, 28), (28, 28))
    assert site.gemm == Gemm(5 * 28 * 28, 2, 18, 4)
    assert (site.macs, site.weight_values, site.input_values) == (5 * layer.macs, 144, 5 * 8 * 28 * 28)


def picky_toy() -> Roofline:
    """The toy, whose convolutions and linear layers are integer kernels only where they requantize."""
    picky = tuple(replace(one, needs_integer_output=one.requantizes) for one in TOY.capabilities)
    return Roofline(replace(TOY, capabilities=picky))


def test_kernels_that_must_requantize_fall_back_where_floats_are_wanted() -> None:
    network, model = chain(("a", 8, 32), ("b", 32, 8)), picky_toy()

    def total(first: str, second: str) -> float:
        policy = {"a": Precision.parse(first), "b": Precision.parse(second)}
        return model.network_cost(network, policy, Workload()).total.latency_s

    plain = report(network, "int8/uint8", "int8/uint8")
    both = model.network_cost(network, dict.fromkeys(network.names, INT8), Workload())
    assert both.layers["a"] == plain.layers["a"], "the next layer reads integers"
    assert (both.layers["b"].compute, both.layers["b"].support) == ("fp32", "fallback"), "the output is left in floats"
    fallback = T0 + joined(2 * 16 * 8 * 32 / 50e9, 4 * (8 * 32 + 16 * 8 + 16 * 32) / CACHE)
    reads, last = 5 * 16 * 8 / CACHE, report(network, "float", "float").layers["b"].cost.latency_s
    assert total("int8/uint8", "float") == pytest.approx(fallback + T0 + reads + last + 1e-5)


def test_detours_of_precisions_that_run_alike_are_each_their_own() -> None:
    """Kernels that move packed weights run alike at any width, but what runs in their place gains differently."""
    packed = replace(TOY.capabilities[2], held_weight_bits=None, needs_integer_output=True)
    model = Roofline(replace(TOY, capabilities=(packed, *TOY.capabilities)))
    network, narrow, wide = (
        chain(("a", 256, 256), ("b", 256, 8), rows=1),
        *map(Precision.parse, ("int2/uint8", "int7/uint8")),
    )
    choices = {"a": (narrow, wide), "b": (FLOAT,)}
    many = model.cost_table(network, choices, Workload())
    for precision in choices["a"]:
        alone = model.network_cost(network, {"a": precision, "b": FLOAT}, Workload()).total.latency_s
        rows = many.layers["a"][precision].cost.latency_s + many.layers["b"][FLOAT].cost.latency_s
        assert rows + many.boundaries[0].cost(precision, FLOAT).latency_s + 1e-5 == pytest.approx(alone, rel=1e-12)


def test_a_depthwise_layer_is_told_from_others() -> None:
    assert TOY.capability("conv2d", INT8, is_depthwise=True).support == "refused"
    assert TOY.capability("conv2d", INT8).support == "native"


def test_only_kernels_that_requantize_can_need_it() -> None:
    with pytest.raises(ValueError, match="needs_integer_output is for kernels that requantize"):
        replace(TOY.capabilities[-1], needs_integer_output=True)


def test_packed_operands_are_multiplied_as_wide_as_the_kernel_does() -> None:
    """Weights of 4 bits with floats as inputs, multiplied in int8, cost what int4 times int8 does."""
    assert mac_energy(TOY.energy, "int8", 4, 32) == mac_energy(TOY.energy, "int8", 4, 8)


def test_a_device_that_lists_nothing_for_a_layer_refuses_it() -> None:
    device = replace(TOY, capabilities=TOY.capabilities[:2])
    layer = conv_network().layers[0]
    assert "none of the capabilities" in str(Roofline(device).refusal(layer, FLOAT))
    assert Roofline(device).refusal(layer, INT8) is None


def test_a_peak_that_is_not_known_leaves_the_other_tiers() -> None:
    rate = {threads: replace(TOY.tdp, unit="op/s") for threads in (1, 2)}
    int8 = replace(TOY.compute["int8"], peak=rate, sparse=None)
    device = replace(TOY, compute={**TOY.compute, "int8": int8})
    table = Roofline(device).cost_table(conv_network(), {"conv": [FLOAT, INT8]}, Workload())
    assert [table.layers["conv"][one].tier for one in (FLOAT, INT8)] == ["calibrated", ""]
    assert np.isnan(table.column("latency_s", "conv", (FLOAT, INT8))).tolist() == [False, True]
    assert table.tiers["latency_s"] == "calibrated"
