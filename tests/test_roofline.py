"""Devices from YAML and the roofline's prices, against the formula worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import Layer, Network, Operation, Precision, Roofline, StorageModel, Tensor, Workload, load_device
from hwmodels.device import FOLDER, Efficiency, Quantity, list_devices
from hwmodels.roofline import mac_energy, roofline_seconds

FLOAT, INT8, INT4 = (Precision.parse(name) for name in ("float", "int8/uint8", "int4/uint8"))
ZEN5 = (FOLDER / "zen5.yaml").read_text()


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
    )
    tensors = {
        "input": Tensor("input", shape, None, ("conv", "add")),
        "conv": Tensor("conv", shape, "conv", ("add",)),
        "add": Tensor("add", shape, "add"),
    }
    add = Operation("add", "add", ("input", "conv"), ("add",))
    return Network((replace(conv, **changes),), (add,), tensors, 3, ("conv", "add"), ("add",))


def prices(network: Network, *names: str, **workload: int) -> dict[str, tuple[float, float, str, str]]:
    """Latency, energy, compute type and bound of the first layer, by precision name."""
    choices = {network.names[0]: [Precision.parse(name) for name in names]}
    table = Roofline("zen5").cost_table(network, choices, Workload(**workload)).layers[network.names[0]]
    return {
        name: (row.cost.latency_s, row.cost.energy_j, row.compute, row.bound)
        for name, row in zip(names, table.values(), strict=True)
    }


def efficiency(overhead: float = 0.0, sharpness: float = 1.0) -> Efficiency:
    quantity = {name: Quantity(1.0, "1", "test") for name in ("compute", "memory")}
    return Efficiency(
        Quantity(overhead, "s", "test"), **quantity, sharpness=Quantity(sharpness, "1", "test"), tier="datasheet"
    )


def test_latency_is_the_formula() -> None:
    macs, values = 64 * 64 * 9 * 28 * 28, 64 * 28 * 28
    found = prices(conv_network(), "float", "int8/uint8")
    l2 = 340e9 * 0.8  # 144 KiB of weights and 2 x 196 KiB of activations
    compute, memory = 2 * macs / (317e9 * 0.75), (4 * 36864 + 8 * values) / l2
    assert found["float"][0] == pytest.approx(3e-6 + (compute**1.5 + memory**1.5) ** (1 / 1.5))
    compute, memory = 2 * macs / (1350e9 * 0.55), (36864 + 5 * values) / l2
    quantize = 3e-6 + 5 * values / l2
    assert found["int8/uint8"][0] == pytest.approx(3e-6 + (compute**1.5 + memory**1.5) ** (1 / 1.5) + quantize)


def test_energy_counts_operations_and_bytes() -> None:
    macs, values = 64 * 64 * 9 * 28 * 28, 64 * 28 * 28
    found = prices(conv_network(), "float", "int8/uint8")
    assert found["float"][1] == pytest.approx(macs * 4.6e-12 + (4 * 36864 + 8 * values) * 243.75e-12)
    mac = 0.2e-12 + 0.03e-12 * 4**0.87
    assert found["int8/uint8"][1] == pytest.approx(macs * mac + (36864 + 10 * values) * 243.75e-12)


def test_below_eight_bits_is_storage_only() -> None:
    network = conv_network()
    found = prices(network, "int8/uint8", "int4/uint8", "int2/uint4")
    assert len(set(found.values())) == 1
    report = [Roofline("zen5").network_cost(network, {"conv": p}, Workload()).total for p in (INT8, INT4)]
    assert report[0].weight_bytes - report[1].weight_bytes == 36864 / 2


def test_combinations_without_an_integer_kernel_run_in_float() -> None:
    found = prices(conv_network(), "float", "int8/uint8", "int4", "int16/int16", "float/uint8")
    assert {name: row[2] for name, row in found.items()} == {
        "float": "fp32",
        "int8/uint8": "int8",
        "int4": "fp32",
        "int16/int16": "fp32",
        "float/uint8": "fp32",
    }
    assert found["int4"] == found["float"], "weights are dequantized when loaded"
    assert found["float/uint8"][0] > found["float"][0], "inputs are quantized and turned back"


def test_small_layers_are_bound_by_memory_and_large_ones_by_compute() -> None:
    linear = Layer(
        "fc", "linear", ("x",), ("y",), (4096, 4096), macs=4096 * 4096, input_shape=(1, 4096), output_shape=(1, 4096)
    )
    network = Network((linear,), (), {}, 0, ("fc",))
    assert prices(network, "float")["float"][3] == "memory"
    assert prices(network, "float", batch=512)["float"][3] == "compute"
    at_dram = 3e-6 + 4 * 4096 * 4096 / (38e9 * 0.8)
    assert prices(network, "float")["float"][0] == pytest.approx(at_dram, rel=0.2)


def test_fixed_costs_are_the_other_operations() -> None:
    fixed = Roofline("zen5").cost_table(conv_network(), {}, Workload(batch=2)).fixed
    traffic = 2 * 3 * 64 * 28 * 28 * 4
    assert fixed.latency_s == pytest.approx(3e-6 + traffic / (340e9 * 0.8))
    assert fixed.energy_j == pytest.approx(traffic * 243.75e-12)
    assert fixed.weight_bytes == 12


def test_storage_is_the_counted_models() -> None:
    network, choices = conv_network(), {"conv": [FLOAT, INT8, INT4]}
    table = Roofline("zen5").cost_table(network, choices, Workload(batch=3))
    counted = StorageModel().cost_table(network, choices, Workload(batch=3))
    for cost in ("weight_bytes", "activation_bytes", "bit_ops"):
        assert (
            table.column(cost, "conv", (*choices["conv"],)) == counted.column(cost, "conv", (*choices["conv"],))
        ).all()
    assert table.tiers["latency_s"] == "datasheet"
    assert table.tiers["energy_j"] == "index"


def test_calls_are_charged_each() -> None:
    once = prices(conv_network(), "int8/uint8")["int8/uint8"]
    macs = conv_network().layers[0].macs
    thrice = prices(conv_network(calls=3, macs=3 * macs), "int8/uint8")["int8/uint8"]
    assert thrice[:2] == pytest.approx([3 * once[0], 3 * once[1]])


def test_embeddings_read_rows_not_the_table() -> None:
    def latency(rows: int) -> float:
        embedding = Layer(
            "e", "embedding", ("ids",), ("e",), (rows, 64), 0, 0, 0, (1, 8), (1, 8, 64), quantizes_input=False
        )
        network = Network((embedding,), (), {}, 10**7 - rows * 64, ("e",))  # as many bytes resident
        return prices(network, "int8")["int8"][0]

    assert latency(100) == latency(100_000)


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(1, 60), st.floats(0, 1))
def test_joined_time_lies_between_the_longer_and_the_sum(a: float, b: float, sharpness: float, overhead: float) -> None:
    time = roofline_seconds(a, b, efficiency(overhead, sharpness)) - overhead
    assert max(a, b) - 1e-9 <= time <= a + b + 1e-9


def test_tiny_times_do_not_underflow() -> None:
    assert roofline_seconds(3e-9, 4e-9, efficiency(sharpness=50.0)) == pytest.approx(4e-9, rel=1e-6)
    assert roofline_seconds(3e-9, 4e-9, efficiency(sharpness=2.0)) == pytest.approx(5e-9)


def test_mac_energy_passes_through_the_published_figures() -> None:
    energy = load_device("zen5").energy
    adder = 0.03e-12 * 4**0.87
    assert adder == pytest.approx(0.1e-12, rel=0.01)
    assert mac_energy(energy, "int8", 8, 8) == pytest.approx(0.2e-12 + adder)
    assert mac_energy(energy, "int8", 32, 32) == pytest.approx(3.1e-12 + adder, rel=0.01)
    assert mac_energy(energy, "fp32", 32, 32) == pytest.approx(4.6e-12)


def test_workloads_and_layers_the_device_cannot_price() -> None:
    with pytest.raises(ValueError, match=r"figures for 1, 2 threads, got workload.threads=3"):
        prices(conv_network(), "float", threads=3)
    with pytest.raises(ValueError, match=r"weight-only, its input stays in float: use int8, not int8/uint8"):
        prices(conv_network(quantizes_input=False), "int8/uint8")


def test_one_thread_is_slower() -> None:
    assert prices(conv_network(), "float", threads=1)["float"][0] > prices(conv_network(), "float")["float"][0]


@pytest.mark.parametrize("name", list_devices())
def test_shipped_devices_are_consistent(name: str) -> None:
    device = load_device(name)
    assert device.id == name
    for threads in device.threads:
        bandwidths = [level.bandwidth[threads].value for level in device.memory]
        assert bandwidths == sorted(bandwidths, reverse=True)
        assert device.compute["int8"][threads].value > device.compute["fp32"][threads].value
    assert device.compute["fp32"][1].value == pytest.approx(64.1 * device.clock.value, rel=0.01)
    assert device.compute["int8"][1].value == pytest.approx(257 * device.clock.value, rel=0.01)


def test_memory_levels_are_chosen_by_size() -> None:
    device = load_device("zen5")
    sizes = [48 * 1024, 96 * 1024, 2**20, 2**21, 2**25, 2**25 + 1]
    assert [device.level(size, 1).name for size in sizes] == ["l1", "l2", "l2", "l3", "l3", "dram"]
    assert [device.level(size, 2).name for size in sizes] == ["l1", "l1", "l2", "l2", "l3", "dram"]


def test_unknown_devices_are_refused_with_the_closest() -> None:
    with pytest.raises(ValueError, match=r"no device 'zen4'; did you mean 'zen5'\?; known devices: .*zen5"):
        Roofline("zen4")


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(ZEN5.replace("id: zen5", "id: mine").replace("1350.0e9", "2700.0e9"))
    assert Roofline(path).name == Roofline(str(path)).name == "mine"
    assert Roofline(path).device.compute["int8"][2].value == 2.7e12
    with pytest.raises(ValueError, match=r"cannot read device file .*other.yaml: No such file"):
        load_device(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id: zen5\n", "id: zen5\nid: zen6\n", r"line 6: key 'id' occurs twice"),
        ("clock:", "color: red\nclock:", r"color: .*Unexpected keyword|color: .*not permitted"),
        ("{value: 234.0e9, unit: op/s,", "{value: 234.0e9, unit: byte/s,", r"compute.fp32 must be in op/s, got byte/s"),
        ("{value: 234.0e9,", "{value: fast,", r"compute.fp32.1.value: Input should be a valid number"),
        ("{value: 234.0e9,", "{value: -1,", r"not negative, got -1"),
        ("{value: 37.0e9, unit: byte/s, source: ", "{value: 37.0e9, unit: byte/s, origin: ", r"source: "),
        ('"measured by timing a chain of additions; the nominal clock is 2.6 GHz"', '" "', r"source is empty"),
        ("compute: int8\n", "compute: int7\n", r"no peak of 'int7'; did you mean 'int8'\?; compute has fp32, int8"),
        ("kinds: [conv1d, conv2d,", "kinds: [conv1d, conv2,", r"'conv2'; did you mean 'conv2d'\?; allowed: conv1d"),
        ("weight_bits: [8]", "weight_bits: [9]", r"weight_bits has 9.*; allowed: 1, 2, 3"),
        ("tier: datasheet", "tier: guess", r"tier: Input should be 'exact'"),
        ("schema: 1", "schema: 2", r"schema: Input should be 1"),
        ("id: zen5", "id: [", r"is not valid YAML"),
    ],
)
def test_wrong_files_are_refused_naming_the_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in ZEN5
    path = tmp_path / "wrong.yaml"
    path.write_text(ZEN5.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        load_device(path)
    assert "wrong.yaml" in str(error.value)


def test_a_device_without_a_matching_capability_says_so() -> None:
    device = load_device("zen5")
    narrow = replace(device, capabilities=device.capabilities[:1])
    with pytest.raises(ValueError, match="device zen5 has no capability for lstm at int8/float"):
        narrow.capability("lstm", Precision.parse("int8"))


def test_every_number_is_finite_for_every_precision() -> None:
    names = [f"{w}/{a}" for w in ("int2", "int8", "uint4", "int16", "float") for a in ("uint2", "int8", "float")]
    for latency, energy, _, bound in prices(conv_network(channels=2, size=3), *names).values():
        assert 0 < latency < 1
        assert 0 < energy < 1
        assert bound in ("compute", "memory")
        assert not math.isnan(latency)
