"""The device files that come with the package: valid, sourced, and saying what published figures say."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import get_args

import pytest

from hwmodels import Capability, Layer, Network, Precision, Roofline, Tensor, Workload, list_devices, load_device
from hwmodels.capability import LAYER_KINDS
from hwmodels.device import FOLDER
from hwmodels.device_table import BEGIN, END, README, device_table, refresh
from hwmodels.quantity import Confidence, Unit, quantities

GPUS = ("t4", "l4", "rtx_4090", "h200_sxm", "b300_sxm", "mi300x", "jetson_agx_orin")
CPUS = ("sapphire_rapids", "zen4", "neoverse_v1", "cortex_a76")
ETHOS = {
    f"ethos_{family}_{macs}": macs
    for family, sizes in (("u55", (32, 64, 128, 256)), ("u65", (256, 512)), ("u85", (128, 256, 512, 1024, 2048)))
    for macs in sizes
}
NPUS = ("apple_a17", "edge_tpu", "rk3588", "hailo_8", *ETHOS)
DATASHEETS = (*GPUS, *CPUS, *NPUS)
"""Devices that nothing was measured on."""

COMMON = [
    Precision.parse(name)
    for name in (
        "float",
        "fp16/fp16",
        "int8/uint8",
        "int8/int8",
        "int8/int8-token",
        "int4/uint8",
        "int4/int4",
        "int2/uint8",
        "int8",
        "int4-g128",
        "int4-g128/fp8_e4m3",
        "codebook4",
        "fp8_e4m3/fp8_e4m3",
        "nvfp4/nvfp4",
        "int8/int16",
        "int16/int16",
    )
]


def one_layer(layer: Layer) -> Network:
    """A network of that layer."""
    tensors = {
        "input": Tensor("input", layer.input_shape, None, (layer.name,)),
        layer.name: Tensor(layer.name, layer.output_shape, layer.name),
    }
    return Network((layer,), (), tensors, 0, (layer.name,), (layer.name,))


def linear(inputs: int, outputs: int, rows: int = 1) -> Network:
    names, macs = (("input",), ("layer",)), rows * inputs * outputs
    return one_layer(
        Layer("layer", "linear", *names, (outputs, inputs), 0, macs, 0, (1, rows, inputs), (1, rows, outputs))
    )


def conv(channels: int, size: int) -> Network:
    shape, macs = (1, channels, size, size), channels * channels * 9 * size * size
    weight = (channels, channels, 3, 3)
    names = ("input",), ("layer",)
    return one_layer(Layer("layer", "conv2d", *names, weight, 0, macs, 0, shape, shape, kernel=(3, 3), stride=(1, 1)))


def chain(channels: int = 64, size: int = 28) -> Network:
    """Two convolutions, the first read by the second alone, and a linear layer."""
    shape, macs = (1, channels, size, size), channels * channels * 9 * size * size
    first, second = (
        Layer(name, "conv2d", (read,), (name,), (channels, channels, 3, 3), 0, macs, 0, shape, shape, 1, (3, 3), (1, 1))
        for name, read in (("first", "input"), ("second", "first"))
    )
    values = channels * size * size
    head = Layer(
        "head",
        "linear",
        ("second",),
        ("head",),
        (10, values),
        macs=10 * values,
        input_shape=shape,
        output_shape=(1, 10),
    )
    tensors = {
        "input": Tensor("input", shape, None, ("first",)),
        "first": Tensor("first", shape, "first", ("second",)),
        "second": Tensor("second", shape, "second", ("head",)),
        "head": Tensor("head", (1, 10), "head"),
    }
    return Network((first, second, head), (), tensors, 0, ("first", "second", "head"), ("head",))


def seconds(device: str, network: Network, *names: str) -> list[float]:
    """Latency of a network's only layer at each precision, with all threads."""
    model = Roofline(device)
    threads = max(model.device.threads, default=1)
    precisions = [Precision.parse(name) for name in names]
    table = model.cost_table(network, {"layer": precisions}, Workload(threads=threads))
    return [table.layers["layer"][precision].cost.latency_s for precision in precisions]


def capability(device: str, kind: str, name: str, is_depthwise: bool = False) -> Capability:
    return load_device(device).capability(kind, Precision.parse(name), is_depthwise)


def test_the_devices_are_there() -> None:
    assert {*GPUS, *CPUS, *NPUS} <= set(list_devices())
    for kind, names in (("gpu", GPUS), ("cpu", CPUS), ("npu", NPUS)):
        assert {load_device(name).kind for name in names} == {kind}


@pytest.mark.parametrize("name", list_devices())
def test_files_are_sourced_to_the_last_number(name: str) -> None:
    device = load_device(name)
    assert device.id == name
    assert len(device.description) > 40
    leaves = dict(device.leaves())
    assert len(leaves) > 20
    for place, quantity in leaves.items():
        assert quantity.unit in get_args(Unit), place
        assert quantity.confidence in get_args(Confidence), place
        assert len(quantity.source) > 5, place
        if name in DATASHEETS:
            assert quantity.confidence not in ("fitted", "measured"), place
            if quantity.confidence == "assumed" and place != "memory.dram.bandwidth.1":
                assert place.startswith(("calibration", "launch")), place
    for capability in device.capabilities:
        assert len(capability.note) > 3
        assert capability.support == "refused" or capability.compute in device.compute
    for anchor in device.anchors:
        if name in DATASHEETS:
            Precision.parse(anchor.precision)
        assert 1e-5 < anchor.latency.number < 10


@pytest.mark.parametrize("name", DATASHEETS)
def test_what_was_not_measured_warns(name: str) -> None:
    device = load_device(name)
    assert device.tier == "datasheet"
    (warning,) = device.warnings
    assert warning.startswith(name)
    assert ("datasheet alone" in warning) == device.knows_time
    assert set(device.calibration) >= {one.path for one in device.capabilities if one.path}
    assert {path.sigma.value for path in device.calibration.values()} == {0.7}


@pytest.mark.parametrize("name", list_devices())
def test_every_layer_at_every_common_precision_runs_or_says_why_not(name: str) -> None:
    device = load_device(name)
    for kind, precision, is_depthwise in itertools.product(LAYER_KINDS, COMMON, (False, True)):
        found = device.capability(kind, precision, is_depthwise)
        assert found.note
        if found.support == "refused":
            assert len(found.note) > 30
        if found.support == "fallback" and name in DATASHEETS:
            assert found.compute == device.float_compute


LINES = {name: (FOLDER / f"{name}.yaml").read_text() for name in ("l4", "sapphire_rapids", "ethos_u55_128", "rtx_4090")}


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("l4", "{value: 121.0e+12", "{value: 242.0e+12", r"compute.bf16: .*not below the sparse one, 2.42e\+14"),
        (
            "rtx_4090",
            "peak: {value: 660.6e+12",
            "peak: {value: 1321.2e+12",
            r"compute.int8: .*not below the sparse one",
        ),
        ("ethos_u55_128", "{value: 128.0e+9", "{value: 256.0e+9", r"compute.int8: .*with sparsity\?"),
        ("l4", "{value: 2.04e+9", "{value: 1.7e+9", r"compute.\w+: .*but 58 units x"),
        ("l4", "tdp:", "clock: {}\ntdp:", r"line \d+: key 'clock' occurs twice"),
        ("l4", "    peak: {value: 30.3e+12", "    peak: {}\n    peak: {value: 30.3e+12", r"key 'peak' occurs twice"),
        ("l4", "{value: 300.0e+9, unit: byte/s", "{value: 300.0e+9, unit: op/s", r"memory.1: .*bandwidth .* in byte/s"),
        ("l4", "{value: 72, unit: W", "{value: 72, unit: kW", r"tdp.unit: Input should be"),
        ("l4", "path: int4_wo", "path: int4_w", r"no path 'int4_w'; did you mean 'int4_wo'\?; calibration has bf16"),
        ("l4", "compute: fp8\n", "compute: fp7\n", r"no compute 'fp7'; did you mean 'fp8'\?; compute has fp32"),
        ("l4", "tier: datasheet", "tier: calibrated", r"calibration.bf16: .*calibrated path names the digest"),
        ("l4", "{value: 72, unit: W, source: ", "{value: unknown, unit: W, source: ", r"tdp: .*confidence is none"),
        ("l4", 'source: "boost; fpsbench.com, NVIDIA L4", ', "", r"clock.source: Field required"),
        ("l4", ", confidence: secondary}\nunits", "}\nunits", r"clock.confidence: Field required"),
        ("l4", "confidence: assumed}\nfloat", "confidence: hoped}\nfloat", r"launch.confidence: Input should be"),
        ("l4", "kinds: [embedding]", "kinds: [embeding]", r"capabilities.1: .*kinds has 'embeding'; allowed: conv1d"),
        (
            "l4",
            "support: fallback\n    compute: bf16",
            "support: refused\n    compute: bf16",
            r"except where .* refused",
        ),
        ("l4", "    support: storage\n    compute: bf16\n", "    support: storage\n", r"compute must be given"),
        ("l4", "float_compute: bf16", "float_compute: fp16", r"float_compute is 'fp16'; compute has fp32, tf32, bf16"),
        ("l4", "  - name: dram\n", "  - name: dram\n    capacity: *l2\n", r"is not valid YAML: .*alias"),
        ("l4", "n: 8, k: 16", "n: 0, k: 16", r"tile: .*tiles are at least 1"),
        ("l4", "runtime:", "colour: red\nruntime:", r"colour: "),
        ("sapphire_rapids", "      1: {value: 20.0e+9", "      2: {value: 20.0e+9", r"the same numbers of threads"),
        (
            "sapphire_rapids",
            "{value: 229.376e+12",
            "{value: 114.688e+12",
            r"compute.int8|int8: 1.147e\+14 op/s, but 56",
        ),
    ],
)
def test_wrong_files_are_refused_naming_the_key(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    assert old in LINES[name], "nothing to change"
    path = tmp_path / "wrong.yaml"
    path.write_text(LINES[name].replace(old, new, 1))
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)) as error:
        load_device(path)
    assert "wrong.yaml" in str(error.value)


def test_peaks_are_held_against_a_clock_of_its_own_source_where_the_readme_says_so() -> None:
    def is_checked(name: str) -> bool:
        device = load_device(name)
        known = [one for one in device.compute.values() if one.macs_per_cycle is not None and device.clock.is_known]
        numbers = [(one.clock or device.clock, *quantities(one.peak)) for one in known]
        return any("derived" not in {number.confidence for number in both} for both in numbers)

    found = {name for name in list_devices() if is_checked(name) and not name.startswith("zen")}
    assert found == {"a100_sxm_80gb", "l40s", "l4", "t4", "rtx_4090", "mi300x", "rk3588"}


def test_peaks_stand_in_the_published_ratios() -> None:
    narrow = {"t4": 2, "l4": 2, "rtx_4090": 4, "h200_sxm": 2, "b300_sxm": 153.5 / 2250, "mi300x": 2}
    narrow["jetson_agx_orin"] = 2  # GeForce accumulates 16-bit products in fp32 at half the rate, hence 4
    for name, ratio in narrow.items():
        device = load_device(name)
        peaks = {compute: device.peak(compute, 1) for compute in device.compute}
        assert peaks["int8"] / peaks[device.float_compute] == pytest.approx(ratio, rel=2e-3)
        if name in ("l4", "h200_sxm", "mi300x"):
            assert peaks["fp8"] == peaks["int8"]
        for compute, peak in device.compute.items():
            if peak.sparse is not None:
                expected = 18 / 14 if compute == "nvfp4" else 2
                assert peak.sparse.number / peaks[compute] == pytest.approx(expected, rel=3e-3)
    for name in ("t4", "l4", "rtx_4090"):
        assert load_device(name).peak("int4", 1) == 2 * load_device(name).peak("int8", 1)
    assert not any("int4" in load_device(name).compute for name in ("h200_sxm", "b300_sxm", "mi300x"))


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("sapphire_rapids", {"fp32": 64, "bf16": 1024, "int8": 2048}),
        ("zen4", {"fp32": 32, "bf16": 64, "int8": 128}),
        ("neoverse_v1", {"fp32": 32, "bf16": 128, "int8": 256}),
        ("cortex_a76", {"fp32": 16, "int8": 64}),
    ],
)
def test_cpus_reach_so_many_operations_per_cycle_and_core(name: str, ops: dict[str, int]) -> None:
    device = load_device(name)
    threads = device.threads[-1]
    assert device.units.value == threads
    for compute, per_cycle in ops.items():
        assert device.peak(compute, threads) == pytest.approx(per_cycle * threads * device.clock.number)
        per_thread = device.peak(compute, 1)
        assert per_thread >= per_cycle * device.clock.number * (1 - 1e-9)
        assert per_thread < device.peak(compute, 2) < device.peak(compute, threads)


@pytest.mark.parametrize("name", list_devices())
def test_the_roofline_prices_eight_bits_wherever_times_are_known(name: str) -> None:
    device = load_device(name)
    eight = Precision.parse("int8/uint8")
    choices = {layer: (eight,) for layer in ("first", "second", "head")}
    one, many = (
        Roofline(device).cost_table(chain(), choices, Workload(threads=threads))
        for threads in (min(device.threads, default=1), max(device.threads, default=1))
    )
    assert many.warnings == device.warnings
    for layer in choices:
        slow, fast = one.layers[layer][eight], many.layers[layer][eight]
        assert fast.cost.weight_bytes > 0
        if device.knows_time:
            assert 1e-7 < fast.cost.latency_s <= slow.cost.latency_s < 10
            assert 0 < fast.cost.energy_j < 1
        else:
            assert math.isnan(fast.cost.latency_s), "not known, hence not made up"
            assert "judge by bytes" in many.warnings[0]
        if name in DATASHEETS:
            assert (fast.compute, fast.support) == ("int8", "native")
    assert math.isfinite(many.fixed.latency_s)
    if name in DATASHEETS and device.knows_time and capability(name, "conv2d", "int8/uint8").requantizes:
        assert [boundary.cost(eight, eight).latency_s for boundary in many.boundaries] == [0.0, 0.0]


def test_levels_of_unknown_bandwidth_are_passed_over() -> None:
    assert load_device("l4").level(1000, 1).name == "dram"
    assert [load_device("mi300x").level(size, 1).name for size in (1e8, 1e9)] == ["infinity_cache", "dram"]
    assert [load_device("zen4").level(size, 1).name for size in (1e4, 1e5, 1e7)] == ["l1", "l2", "dram"]


@pytest.mark.parametrize("name", ["t4", "l4", "rtx_4090", "h200_sxm", "jetson_agx_orin"])
def test_weight_only_pays_at_few_rows_and_not_at_many(name: str) -> None:
    float_, int4 = seconds(name, linear(8192, 8192), "float", "int4-g128")
    assert 2.2 < float_ / int4 < 4
    float_, int4 = seconds(name, linear(4096, 4096, rows=4096), "float", "int4-g128")
    assert float_ / int4 < 1.05
    assert capability(name, "linear", "int4-g128").support == "storage"
    assert capability(name, "linear", "int4-g128").compute == load_device(name).float_compute


@pytest.mark.parametrize("name", [*GPUS, *CPUS, "zen5"])
def test_convolutions_below_eight_bits_save_no_time_on_gpus_and_cpus(name: str) -> None:
    for narrow in ("int4/uint8", "int2/uint4", "int4/int4"):
        eight, four = seconds(name, conv(64, 28), "int8/uint8", narrow)
        assert four == eight
        assert capability(name, "conv2d", narrow).support == "storage"
    sixteen, weights = seconds(name, conv(64, 28), "float", "int4-g128")
    assert weights >= sixteen  # more where weights are dequantized at every run


def test_integers_on_blackwell_ultra_are_slow() -> None:
    bf16, int8, fp8, nvfp4 = seconds(
        "b300_sxm", linear(8192, 8192, rows=4096), "float", "int8/int8", "fp8_e4m3/fp8_e4m3", "nvfp4/nvfp4"
    )
    assert int8 > 5 * bf16
    assert nvfp4 < fp8 < bf16
    assert "153.5" in capability("b300_sxm", "linear", "int8/int8").note


def test_formats_without_tensor_cores_fall_back() -> None:
    for name in ("t4", "jetson_agx_orin"):
        assert capability(name, "linear", "fp8_e4m3/fp8_e4m3").support == "fallback"
    assert capability("t4", "linear", "bf16/bf16").support == "fallback", "Turing has no bf16"
    assert capability("h200_sxm", "linear", "nvfp4/nvfp4").support == "fallback"
    assert capability("l4", "conv2d", "fp8_e4m3/fp8_e4m3", is_depthwise=True).support == "fallback"
    assert capability("sapphire_rapids", "conv2d", "int8/uint8", is_depthwise=True).path == "int8_depthwise"


def test_npus_take_what_their_makers_say() -> None:
    runs = {p: capability("edge_tpu", "conv2d", str(p)).support for p in COMMON}
    assert {str(p) for p, support in runs.items() if support != "refused"} == {"int8/uint8", "int8/int8"}
    assert "save nothing" in capability("edge_tpu", "conv2d", "int4/uint8").note

    four = capability("hailo_8", "conv2d", "int4/uint8")
    assert (four.support, four.kernel, four.held_weight_bits) == ("native", "a8_w4", None)
    assert capability("hailo_8", "conv2d", "int16/int16").kernel == "a16_w16"
    assert capability("hailo_8", "linear", "float").support == "refused"

    assert capability("rk3588", "linear", "int8-g128/int8-token").path == "int8_group"
    assert "2.35" in capability("rk3588", "linear", "int8-g128/int8-token").note
    assert capability("rk3588", "conv2d", "int4/uint8").support == "storage"

    for name in ("codebook1", "codebook4", "int4", "int4-g32", "int8"):
        run = capability("apple_a17", "conv2d", name)
        assert (run.support, run.compute, run.held_weight_bits) == ("storage", "fp16", None)
    assert capability("apple_a17", "conv2d", "int8/int8").compute == "int8"


def test_published_latencies_are_kept_as_they_are() -> None:
    apple = {(one.network, one.precision): one.latency.number for one in load_device("apple_a17").anchors}
    assert apple["MobileNetV2", "float"] / apple["MobileNetV2", "int8/int8"] == pytest.approx(0.49 / 0.20)
    assert apple["ResNet-50", "int8"] > apple["ResNet-50", "float"], "8-bit weights alone are no faster"
    frames = {one.network: 1 / one.latency.number for one in load_device("rk3588").anchors}
    assert frames["MobileNetV2"] == pytest.approx(450.7, rel=1e-4)
    assert {one.network: one.latency.value for one in load_device("edge_tpu").anchors}["MobileNetV2"] == 2.6e-3


@pytest.mark.parametrize(("name", "macs"), ETHOS.items())
def test_ethos_u(name: str, macs: int) -> None:
    device = load_device(name)
    assert device.peak("int8", 1) == 2 * macs * device.clock.number
    assert device.peak("int16", 1) == device.peak("int8", 1) / 2
    assert device.capabilities == load_device("ethos_u55_128").capabilities
    assert capability(name, "conv2d", "int16/int16").support == "refused"
    assert capability(name, "conv2d", "float").support == "refused"
    eight, four = seconds(name, linear(4096, 4096), "int8/uint8", "int4/uint8")
    assert eight / four == pytest.approx(2, rel=0.01), "weights bound the time, and are compressed"


def test_ethos_u_comes_near_what_arms_compiler_says() -> None:
    def found(name: str, network: Network, *names: str) -> list[float]:
        """Microseconds, without quantizing the network's input, which reaches the NPU as integers."""
        device = load_device(name)
        values = network.tensors["input"].values
        path = device.calibration["int8"]
        moved = 2 * values / (device.memory[-1].bandwidth.number * path.memory.number)  # type: ignore[union-attr]
        return [1e6 * (one - moved - path.overhead.number) for one in seconds(name, network, *names)]

    layers = [f"int{bits}/int8" for bits in (8, 7, 6, 5, 4, 3, 2)]
    u55 = (2068, 1812, 1680, 1301, 1044, 788, 446)  # a linear layer of 1024 x 1000, by ethos-u-vela 5.2.0
    assert found("ethos_u55_128", linear(1024, 1000), *layers) == pytest.approx(u55, rel=0.2)
    u85 = (312.5, 273.5, 253, 195, 156, 117, 78)
    assert found("ethos_u85_256", linear(1024, 1000), *layers) == pytest.approx(u85, rel=0.1)
    eight, four = found("ethos_u55_128", conv(256, 14), "int8/int8", "int4/int8")
    assert (eight, four) == pytest.approx((1890, 1860), rel=0.05), "bound by computing: fewer bits save next to nothing"


def test_sixteen_bit_integers_are_no_floats() -> None:
    network, sixteen = chain(), Precision.parse("int8/int16")
    choices = {layer: (sixteen,) for layer in ("first", "second", "head")}
    boundaries = Roofline("ethos_u85_256").cost_table(network, choices, Workload()).boundaries
    assert [one.read[sixteen] for one in boundaries] == ["16", "16"]
    boundaries = Roofline("l4").cost_table(network, choices, Workload()).boundaries
    assert [one.read[sixteen] for one in boundaries] == ["turned back", "turned back"]


def test_the_readme_lists_what_the_files_rest_on(tmp_path: Path) -> None:
    text = README.read_text()
    listed = text[text.index(BEGIN) : text.index(END)]
    assert device_table() in listed, "run python -m hwmodels.device_table"
    copy = tmp_path / "README.md"
    copy.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    refresh(copy)
    assert copy.read_text() == f"above\n{BEGIN}\n{device_table()}\n{END}\nbelow\n"
    copy.write_text("no marks")
    with pytest.raises(ValueError, match=r"README.md has no lines"):
        refresh(copy)
