"""Vela as an oracle: what is written for it, what it says, and what is made of that. Numbers are of release 5.2.0."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ethosu.vela", reason="needs the extra `vela`")

from ethosu.vela.tflite import BuiltinOperator, Model, TensorType

from hwmodels import CostModel, Layer, Network, Operation, Precision, Tensor, Workload
from hwmodels.base import sum_costs
from hwmodels.vela import Held, Vela, write_tflite
from hwmodels.vela.cache import load_report
from hwmodels.vela.compiler import Target, compile_tflite
from hwmodels.vela.flatbuffer import FlatbufferWriter
from hwmodels.vela.held import weight_codes, weight_values
from tests.conformance import NETWORK, CostModelContract

U55 = Target("ethos-u55-128", "Ethos_U55_High_End_Embedded", "Shared_Sram")
INT8, INT4, INT2, WIDE = map(Precision.parse, ("int8/int8", "int4/uint8", "int2/int8", "int8/int16"))
CODES = range(-127, 128)


def residual_network() -> Network:
    """Two 3x3 convolutions with ReLU, the second added to the first, pooled and classified."""
    image = (1, 32, 16, 16)
    shapes = {"input": (1, 3, 16, 16), **dict.fromkeys(("conv1", "relu", "conv2", "add", "relu2"), image)}
    shapes |= {"mean": (1, 32), "fc": (1, 10)}
    layers = (
        _layer("conv1", "conv2d", "input", shapes, (32, 3, 3, 3)),
        _layer("conv2", "conv2d", "relu", shapes, (32, 32, 3, 3)),
        _layer("fc", "linear", "mean", shapes, (10, 32)),
    )
    operations = (
        Operation("relu", "relu", ("conv1",), ("relu",)),
        Operation("add", "add", ("conv2", "relu"), ("add",)),
        Operation("relu2", "relu", ("add",), ("relu2",)),
        Operation("mean", "mean", ("relu2",), ("mean",)),
    )
    return _network(layers, operations, shapes, ("conv1", "relu", "conv2", "add", "relu2", "mean", "fc"))


def linear_network(features: int = 512) -> Network:
    """Two large linear layers, one after the other."""
    shapes = dict.fromkeys(("input", "fc1", "fc2"), (1, features))
    layers = tuple(
        _layer(name, "linear", reads, shapes, (features, features))
        for name, reads in (("fc1", "input"), ("fc2", "fc1"))
    )
    return _network(layers, (), shapes, ("fc1", "fc2"))


def _layer(name: str, kind: str, reads: str, shapes: dict[str, tuple[int, ...]], weight: tuple[int, ...]) -> Layer:
    positions = math.prod(shapes[name][2:])
    macs = math.prod(weight) * positions
    shape = {"input_shape": shapes[reads], "output_shape": shapes[name], "stride": (1, 1), "kernel": weight[2:]}
    return Layer(name, kind, (reads,), (name,), weight_shape=weight, macs=macs, bias_count=weight[0], **shape)


def _network(
    layers: tuple[Layer, ...],
    operations: tuple[Operation, ...],
    shapes: dict[str, tuple[int, ...]],
    order: tuple[str, ...],
) -> Network:
    by_name = {one.name: one for one in (*layers, *operations)}
    readers = {name: tuple(one for one in order if name in by_name[one].reads) for name in shapes}
    tensors = {
        name: Tensor(name, shape, name if name in by_name else None, readers[name]) for name, shape in shapes.items()
    }
    return Network(layers, operations, tensors, order=order, outputs=(order[-1],))


def uniform(network: Network, precision: Precision) -> dict[str, Precision]:
    return dict.fromkeys(network.names, precision)


def held(network: Network, precision: Precision) -> dict[str, Held]:
    return {layer.name: Held.of(layer, precision) for layer in network}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vela")


@pytest.fixture(scope="module")
def vela(cache: Path) -> Vela:
    return Vela("ethos-u55-128", cache=cache)


class TestVela(CostModelContract):
    precisions = ("int4/uint8", "int8/uint8", "int8/int16")

    @pytest.fixture
    def cost_model(self, cache: Path) -> CostModel:
        return Vela("ethos-u55-128", cache=cache)


# --- what is written


def test_file_reads_back_with_its_shapes_and_types() -> None:
    network = residual_network()
    file = write_tflite(network, held(network, INT8))
    graph = Model.Model.GetRootAs(file.data, 0).Subgraphs(0)
    tensors = {graph.Tensors(i).Name().decode(): graph.Tensors(i) for i in range(graph.TensorsLength())}
    assert tensors["input"].ShapeAsNumpy().tolist() == [1, 16, 16, 3]
    assert tensors["conv2.weight"].ShapeAsNumpy().tolist() == [32, 3, 3, 32]
    assert tensors["conv2.weight"].Quantization().ScaleLength() == 32
    assert tensors["fc.weight"].ShapeAsNumpy().tolist() == [10, 32]
    assert tensors["fc"].ShapeAsNumpy().tolist() == [1, 10]
    types = {name: tensors[name].Type() for name in ("conv1", "conv1.weight", "conv1.bias")}
    kinds = TensorType.TensorType
    assert types == {"conv1": kinds.INT8, "conv1.weight": kinds.INT8, "conv1.bias": kinds.INT32}
    assert file.owners == ("conv1", "conv2", "add", "mean", "mean", "fc")
    assert not file.requantized


def test_weights_in_the_file_are_the_layers_channels_last() -> None:
    network = residual_network()
    model = Model.Model.GetRootAs(write_tflite(network, held(network, INT4)).data, 0)
    graph = model.Subgraphs(0)
    tensor = next(graph.Tensors(i) for i in range(graph.TensorsLength()) if graph.Tensors(i).Name() == b"conv2.weight")
    written = model.Buffers(tensor.Buffer()).DataAsNumpy().view(np.int8).reshape(tensor.ShapeAsNumpy())
    expected = weight_values(network["conv2"], range(-7, 8))
    assert np.array_equal(written.transpose(0, 3, 1, 2), expected)
    assert (written.min(), written.max()) == (-7, 7)


def test_layers_of_different_width_are_requantized_in_between() -> None:
    network = residual_network()
    file = write_tflite(network, held(network, INT8) | {"conv2": Held(CODES, 16)})
    model = Model.Model.GetRootAs(file.data, 0)
    graph = model.Subgraphs(0)
    codes = [
        model.OperatorCodes(graph.Operators(i).OpcodeIndex()).BuiltinCode() for i in range(graph.OperatorsLength())
    ]
    assert codes.count(BuiltinOperator.BuiltinOperator.QUANTIZE) == 2  # before conv2, and before fc: the sum is wide
    assert file.requantized == {1: (16 * 16 * 32, 16), 6: (32, 8)}


def test_the_file_is_the_same_in_every_process() -> None:
    code = (
        "import hashlib, json, sys; from hwmodels import Network; from hwmodels.vela import Held, write_tflite;"
        "network = Network.from_dict(json.load(sys.stdin));"
        "held = {layer.name: Held(range(-7, 8), 8) for layer in network};"
        "print(hashlib.sha256(write_tflite(network, held).data).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(NETWORK.to_dict()),
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    expected = write_tflite(NETWORK, {layer.name: Held(range(-7, 8), 8) for layer in NETWORK}).data
    assert digests == {hashlib.sha256(expected).hexdigest() + "\n"}


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("int8", range(-127, 128)),
        ("int8-full", range(-128, 128)),
        ("int4", range(-7, 8)),
        ("int2", range(-1, 2)),
        ("int1", range(-1, 2, 2)),
        ("binary", range(-1, 2, 2)),
        ("ternary", range(-1, 2)),
        ("uint4", range(-8, 8)),
        ("int3-tensor", range(-3, 4)),
        ("int4-g32", None),
        ("fp8_e4m3", None),
        ("codebook4", None),
        ("int16", None),
        ("float", None),
    ],
)
def test_weights_are_held_as_8_bit_codes(name: str, codes: range | None) -> None:
    assert weight_codes(Precision.parse(name).weight) == codes


def test_given_weights_are_rounded_to_fewer_codes() -> None:
    layer = linear_network(4)["fc1"]
    given = np.array([-127, -64, 0, 127] * 4, np.int8).reshape(4, 4)
    assert np.array_equal(weight_values(layer, range(-127, 128), given), given)
    assert weight_values(layer, range(-7, 8), given)[0].tolist() == [-7, -4, 0, 7]
    assert weight_values(layer, range(-1, 2, 2), given)[0].tolist()[::3] == [-1, 1]


# --- what Vela says


def test_golden_values(vela: Vela) -> None:
    assert vela.version == "5.2.0", "the golden values are of 5.2.0"
    network = residual_network()
    found = {}
    for precision in (INT8, INT2, WIDE):
        report = vela.compile(network, uniform(network, precision))
        found[str(precision)] = (report.cycles, report.encoded_weight_bytes, report.memory_bytes["sram"])
        assert report.original_weight_bytes == 18_592
        assert sum(operator.cycles for operator in report.operators if operator) == report.cycles
    assert found == {
        "int8/int8": (52_934, 11_904, 25_952),  # cycles, bytes of encoded weights, of SRAM
        "int2/int8": (51_766, 3_472, 18_640),
        "int8/int16": (75_189, 11_904, 42_336),
    }


def test_agrees_with_the_command(vela: Vela, tmp_path: Path) -> None:
    network = residual_network()
    report = vela.compile(network, uniform(network, INT4))
    file = tmp_path / "plain.tflite"
    file.write_bytes(write_tflite(network, held(network, INT4)).data)
    options = ["--accelerator-config", U55.accelerator, "--system-config", U55.system_config]
    options += ["--memory-mode", U55.memory_mode, "--output-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "ethosu.vela", file, *options], check=True, capture_output=True)
    with (tmp_path / f"plain_summary_{U55.system_config}.csv").open() as lines:
        row = next(csv.DictReader(lines))
    assert int(row["cycles_total"]) == report.cycles
    assert float(row["inference_time"]) == report.latency_s
    assert int(row["total_npu_encoded_weights"]) == report.encoded_weight_bytes
    assert int(row["nn_macs"]) == report.macs


def test_fewer_bits_make_linear_layers_smaller_and_faster(vela: Vela) -> None:
    network = linear_network()
    eight, four, two = (vela.compile(network, uniform(network, one)) for one in (INT8, INT4, INT2))
    assert eight.encoded_weight_bytes == pytest.approx(2 * 512 * 512, rel=0.02)
    assert four.encoded_weight_bytes / eight.encoded_weight_bytes == pytest.approx(0.5, abs=0.03)
    assert four.latency_s / eight.latency_s == pytest.approx(0.5, abs=0.05)
    assert two.encoded_weight_bytes < 0.27 * eight.encoded_weight_bytes
    assert two.latency_s < 0.3 * eight.latency_s


def test_wide_inputs_double_a_compute_bound_convolution(vela: Vela) -> None:
    network = residual_network()
    table = vela.cost_table(network, dict.fromkeys(network.names, (INT8, WIDE)), Workload())
    conv = vela.compile(network, uniform(network, INT8)), vela.compile(network, uniform(network, WIDE))
    narrow, wide = (report.operators[1] for report in conv)  # conv2
    assert narrow is not None
    assert wide is not None
    assert wide.npu_cycles / narrow.npu_cycles == pytest.approx(2, rel=0.05)
    assert table.layers["conv2"][WIDE].compute == "int16"
    assert table.layers["conv2"][INT8].bound == "compute"


def test_table_of_uniform_networks_adds_up_to_their_report(vela: Vela) -> None:
    network = residual_network()
    table = vela.cost_table(network, dict.fromkeys(network.names, (INT8, INT4, WIDE)), Workload(batch=3))
    for precision in (INT8, INT4, WIDE):
        policy = uniform(network, precision)
        added = sum_costs(table, network, policy, Workload(batch=3)).total
        confirmed = vela.confirm(network, policy, Workload(batch=3)).total
        assert added.latency_s == pytest.approx(confirmed.latency_s, rel=1e-12)
        assert (added.weight_bytes, added.bit_ops) == (confirmed.weight_bytes, confirmed.bit_ops)
        assert added.activation_bytes == confirmed.activation_bytes
        assert math.isnan(added.energy_j)
        assert math.isnan(confirmed.energy_j)


@pytest.mark.parametrize(
    ("wide", "error"), [("fc", 0.02), ("conv2", 0.12)]
)  # what conv2 and the sum read: priced twice
def test_confirms_a_mixed_policy_with_its_requantizing(vela: Vela, wide: str, error: float) -> None:
    network = residual_network()
    policy = uniform(network, INT8) | {wide: WIDE}
    report = vela.confirm(network, policy, Workload())
    table = vela.cost_table(network, dict.fromkeys(network.names, (INT8, WIDE)), Workload())
    added = sum_costs(table, network, policy, Workload())
    assert added.total.latency_s == pytest.approx(report.total.latency_s, rel=error)
    met = [(one.tensor, one.producer, one.consumer) for one in table.boundaries]
    assert met == [("relu", "conv1", "conv2"), ("mean", "conv2", "fc"), ("relu", "conv2", "conv1")]
    assert sum(layer.cost.latency_s for layer in report.layers.values()) == pytest.approx(report.total.latency_s)
    assert report.tiers["latency_s"] == "datasheet"
    assert "Vela 5.2.0 for ethos-u55-128" in report.source
    assert "encoded from 18,592" in report.source
    assert report.warnings


def test_u85_requantizes_in_both_directions(cache: Path) -> None:
    network = residual_network()
    vela = Vela("ethos-u85-256", cache=cache)
    assert vela.confirm(network, uniform(network, INT8) | {"conv2": WIDE}, Workload()).total.latency_s > 0


# --- the cache


def test_nothing_is_compiled_twice(cache: Path, vela: Vela, monkeypatch: pytest.MonkeyPatch) -> None:
    network, same_width = residual_network(), Precision.parse("int4/int6")
    report = vela.compile(network, uniform(network, INT4))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("hwmodels.vela.compiler.subprocess.run", fail)
    again = Vela("ethos-u55-128", cache=cache)
    assert again.compile(residual_network(), uniform(network, same_width)) == report
    with pytest.raises(AssertionError, match="process"):
        Vela("ethos-u55-64", cache=cache).compile(network, uniform(network, INT4))


def test_cache_is_in_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Vela().compile(NETWORK, {})
    assert [file.suffix for file in (tmp_path / "bitplan" / "vela").iterdir()] == [".json"]


def test_a_spoilt_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text(json.dumps({"cycles": 1}))
    with pytest.raises(ValueError, match=r"key\.json is no report of Vela; delete it"):
        load_report(tmp_path, "key")
    assert load_report(tmp_path, "other") is None


# --- what is refused


def test_a_crash_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules["hwmodels.vela.flatbuffer"].TYPES, "int8", "INT4")
    network = linear_network(32)
    with pytest.raises(ValueError, match=r"Vela 5.2.0 crashed with SIGFPE for ethos-u55-128"):
        Vela(cache=tmp_path).compile(network, uniform(network, INT4))
    assert not list(tmp_path.iterdir())


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did not end within 0\.01 s"):
        Vela(cache=tmp_path, timeout_s=0.01).compile(NETWORK, {})


def test_an_unknown_memory_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ended with status 1.*Memory_Mode.Nope not found"):
        Vela(cache=tmp_path, memory_mode="Nope").compile(NETWORK, {})


def test_what_is_left_to_the_cpu_is_seen() -> None:
    writer = FlatbufferWriter()
    x, y = (writer.activation(name, (1, 8, 8, 16), 8, 0.02) for name in "xy")
    writer.operator("FLOOR", [x], [y])
    report = compile_tflite(writer.finish([x], [y]), 1, U55, 60)
    assert report.operators[0] is not None
    assert not report.operators[0].runs_on_npu


def test_precisions_and_kinds_that_cannot_run_are_refused(vela: Vela) -> None:
    layer = NETWORK["conv"]
    assert vela.refusal(layer, INT4) is None
    for name, why in (
        ("float", "weights in float"),
        ("int4-g32/int8", "weights in int4-g32"),
        ("int8/float", "inputs in float"),
        ("int8/uint8-token", "inputs in uint8-token"),
    ):
        assert why in (vela.refusal(layer, Precision.parse(name)) or "")
    embedding = Layer("words", "embedding", weight_shape=(10, 4), quantizes_input=False)
    assert "words is embedding, which Vela would leave to the CPU" in (vela.refusal(embedding, INT8) or "")


def test_operations_that_cannot_run_are_refused(vela: Vela) -> None:
    network = residual_network()
    operations = tuple(
        Operation(one.name, "sort" if one.name == "add" else one.kind, one.reads, one.writes)
        for one in network.operations
    )
    sorting = Network(network.layers, operations, network.tensors, order=network.order, outputs=network.outputs)
    with pytest.raises(ValueError, match=r"operation add is sort.*allowed: relu"):
        vela.compile(sorting, {})


def test_targets_and_weights_are_checked() -> None:
    with pytest.raises(ValueError, match=r"no accelerator 'ethos-u55-12'; did you mean ethos-u55-128"):
        Vela("ethos-u55-12")
    with pytest.raises(ValueError, match=r"Vela's begin with Ethos_U55_"):
        Vela("ethos-u55-128", "Ethos_U85_SYS_DRAM_Mid")
    with pytest.raises(ValueError, match=r"weights\['conv'\] must be int8, got float64"):
        Vela(weights={"conv": np.zeros((8, 3, 3, 3))})
    with pytest.raises(ValueError, match=r"weights has 'nope', which is no layer"):
        Vela(weights={"nope": np.zeros(1, np.int8)}).compile(NETWORK, {})
    with pytest.raises(ValueError, match=r"weights\['conv'\] has shape \(1,\), the layer \(8, 3, 3, 3\)"):
        Vela(weights={"conv": np.zeros(1, np.int8)}).compile(NETWORK, {})


def test_without_vela_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hwmodels.vela.compiler.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'bitplan\[vela\]'"):
        Vela()
