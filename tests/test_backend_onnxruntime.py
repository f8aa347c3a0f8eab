"""What onnxruntime computes is what the simulation computes, and what the report says is what is in the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import Attention, Branching, Decoder
from plans import ModelTask, make_plan
from torch import Tensor, nn

from hwmodels import Precision
from search.backends import backend
from search.backends.onnxruntime import WORKER, exported_layers, run_in_fresh_process
from search.backends.outcome import ExportReport, LayerExport, Verification
from search.backends.realize import simulate
from search.errors import ConfigError, DataError, UnsupportedError
from search.plan import Plan
from search.tasks.digits import Digits
from search.tasks.networks import InvertedResidual

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BACKEND = backend("onnxruntime")
MIXED = [
    "int8/uint8",
    "int4/uint8",
    "int3/uint6",
    "int2/uint4",
    "int5/uint7",
    "float/uint8",
    "int6/float",
    "float/float",
]


def run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    session = ort.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})


def exported(task: Any, policy: Any, path: Path) -> tuple[Plan, ExportReport]:
    plan = make_plan(task, policy)
    return plan, BACKEND.export(plan, task, path)


def initializers(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in onnx.load(path / "model.onnx").graph.initializer}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, ExportReport, Verification, Path]:
    path, task = tmp_path_factory.mktemp("digits"), Digits()
    plan, report = exported(task, lambda position, layer: MIXED[position % len(MIXED)], path)
    return plan, report, BACKEND.verify(plan, task, path), path


class TestDigits:
    """A mixed plan for the digits task, from end to end."""

    def test_it_predicts_what_the_simulation_predicts(self, made: Any) -> None:
        _, _, found, _ = made
        assert found.samples == 350
        assert found.agreement >= 0.995
        assert 0 < found.largest_difference < 2

    def test_the_promise_is_the_plans(self, made: Any) -> None:
        plan, _, found, _ = made
        assert found.promised == plan.quality.value
        assert found.quality == pytest.approx(found.promised, abs=1 / 350)
        assert found.promised_low == pytest.approx(plan.quality.float_value - plan.quality.drop_high)
        assert found.promised_high == pytest.approx(plan.quality.float_value - plan.quality.drop_low)
        assert found.promised_low <= found.promised <= found.promised_high

    def test_it_is_timed_beside_float_and_int8(self, made: Any) -> None:
        _, _, found, _ = made
        assert [latency.name for latency in found.latencies] == ["plan", "float", "int8"]
        assert all(0 < latency.low_s <= latency.median_s <= latency.high_s for latency in found.latencies)
        assert {latency.batch for latency in found.latencies} == {1}

    def test_bytes_are_the_files(self, made: Any) -> None:
        plan, report, found, path = made
        assert report.files == (path / "model.onnx",)
        assert found.bytes_on_disk == (path / "model.onnx").stat().st_size
        assert found.planned_bytes == sum(layer.weight_bytes for layer in plan.layers)

    def test_every_format_is_labelled(self, made: Any) -> None:
        _, report, found, _ = made
        assert found.layers == report.layers
        for layer in report.layers:
            weight, input_ = layer.precision.split("/")
            contained = {"int3", "int5", "int6", "uint4", "uint6", "uint7"}  # ONNX has types of 2, 4 and 8 bits
            for format, label in ((weight, layer.weight), (input_, layer.input)):
                assert label == ("float" if format == "float" else "contained" if format in contained else "exact")
                assert (format in layer.note) == (label == "contained")

    def test_compute_is_what_the_optimized_graph_does(self, made: Any) -> None:
        _, report, _, path = made
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(path / "optimized.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
        operations = [node.op_type for node in onnx.load(path / "optimized.onnx").graph.node]
        integer = [layer for layer in report.layers if layer.compute == "int8"]
        assert len(integer) == sum(operation in ("QLinearConv", "QGemm") for operation in operations) > 0
        assert {layer.compute for layer in report.layers} == {"int8", "fp32"}
        assert all("bias is rounded" in layer.note for layer in integer)

    def test_codes_are_stored_in_their_types(self, made: Any) -> None:
        plan, _, _, path = made
        stored = initializers(path)
        for name, precision in plan.policy.items():
            if precision.weight.is_float:
                assert stored[f"{name}.weight"].data_type == onnx.TensorProto.FLOAT
                continue
            codes = stored[f"{name}.weight/codes"]
            width = next(width for width in (2, 4, 8) if width >= precision.weight.bits)
            assert codes.data_type == getattr(onnx.TensorProto, f"INT{width}")
            values = onnx.numpy_helper.to_array(codes).astype(np.float32)
            assert np.abs(values).max() == precision.weight.highest
            assert f"{name}.weight" not in stored

    def test_every_quantizer_is_the_plans(self, made: Any) -> None:
        plan, _, _, path = made
        graph = onnx.load(path / "model.onnx").graph
        scales = {node.input[1].rstrip("'") for node in graph.node if node.op_type == "DequantizeLinear"}
        expected = {f"{name}.weight/scale" for name, p in plan.policy.items() if not p.weight.is_float}
        expected |= {f"{name}/input_scale" for name, p in plan.policy.items() if not p.input.is_float}
        assert scales - {"fc.bias/scale"} == expected

    def test_another_plan_is_refused(self, made: Any) -> None:
        _, _, _, path = made
        other = make_plan(Digits(), "int8/uint8")
        with pytest.raises(DataError, match=f"not from {other.digest}"):
            BACKEND.verify(other, Digits(), path)


class EveryFormat(nn.Module):
    """One layer for every pair of formats, side by side: no error can grow from layer to layer."""

    PRECISIONS = tuple(
        f"{weight}/{input_}"
        for weight in ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "int16")
        for input_ in ("uint2", "uint4", "uint6", "uint8", "uint16", "int8", "int16")
    )

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 3) for _ in self.PRECISIONS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"out{position}": layer(x) for position, layer in enumerate(self.layers)}


class EveryOutput(ModelTask):
    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.cat(list(model(batch).values()), -1)


def test_every_format_clips_and_rounds_as_simulated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = EveryOutput(EveryFormat(), torch.randn(8, 16))
    plan, report = exported(task, lambda position, _: EveryFormat.PRECISIONS[position], tmp_path)
    x = torch.cat([task.example_input, 100 * torch.randn(8, 16)])  # far outside the ranges: codes must clip
    expected = plan.apply(task.model)(x)
    for name, found, layer in zip(expected, run(tmp_path, x), report.layers, strict=True):
        precision = Precision.parse(layer.precision)
        scale = plan.ranges.weights[layer.name, precision.weight]["scale"]
        step = scale * plan.ranges.inputs[layer.name, precision.input].scale
        step = step / 2 ** (8 - precision.weight.bits) if layer.compute == "int8" else 0 * step
        difference = np.abs(found - expected[name].detach().numpy())  # the bias alone is rounded, to half a step
        assert (difference <= step.numpy() / 2 + 1e-4 + 1e-4 * np.abs(found)).all(), layer
    by_input = {layer.precision.split("/")[1]: layer.input for layer in report.layers}
    assert by_input == dict.fromkeys(("uint2", "uint4", "uint6"), "contained") | dict.fromkeys(
        ("uint8", "uint16", "int8", "int16"), "exact"
    )
    integer = {layer.compute for layer in report.layers if re.fullmatch(r"int[2-8]/uint[2-8]", layer.precision)}
    assert integer == {"int8"}


def test_a_depthwise_network_with_relu6(tmp_path: Path) -> None:
    torch.manual_seed(1)
    blocks = [InvertedResidual(4, 4, 1, 3), InvertedResidual(4, 8, 2, 3)]
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6(), *blocks, nn.Flatten())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
    task = ModelTask(model, torch.rand(64, 1, 10, 10))
    plan, report = exported(task, lambda position, _: MIXED[position % 5], tmp_path)
    found = run(tmp_path, task.example_input)[0]
    expected = plan.apply(model)(task.example_input).detach().numpy()
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.98
    assert np.quantile(np.abs(found - expected), 0.99) < 0.1 * expected.std()
    depthwise = [layer for layer in report.layers if layer.name.endswith("body.3")]
    assert "int8" in {layer.compute for layer in depthwise}


class TestOtherNetworks:
    """Transformers, several inputs, shared weights, recurrent cells."""

    def test_linear_layers_on_sequences_compute_in_int8(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        task = ModelTask(Attention(), torch.randn(8, 6, 16))
        plan, report = exported(task, lambda position, _: MIXED[position % 4], tmp_path)
        assert [layer.compute for layer in report.layers] == ["int8"] * 4
        x = torch.randn(3, 6, 16)  # another batch size
        np.testing.assert_allclose(run(tmp_path, x)[0], plan.apply(task.model)(x).detach().numpy(), atol=1e-4)

    def test_layers_that_share_a_weight_are_told_apart(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        task = ModelTask(Decoder(), torch.randint(0, 20, (16, 8)))
        plan, report = exported(task, "int4/uint8", tmp_path)
        layers = {layer.name: layer for layer in report.layers}
        assert (layers["embedding"].compute, layers["decoder"].compute) == ("fp32", "int8")
        assert (layers["embedding"].input, layers["decoder"].input) == ("float", "exact")
        expected = plan.apply(task.model)(task.example_input).detach().numpy()
        np.testing.assert_allclose(run(tmp_path, task.example_input)[0], expected, atol=1e-4)
        codes = [tensor for name, tensor in initializers(tmp_path).items() if name.endswith("/codes")]
        assert sum(tensor.dims[0] == 20 for tensor in codes) == 1

    def test_keywords_and_a_dictionary_of_outputs_survive_the_fresh_process(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        task = ModelTask(TwoInputs(), {"x": torch.randn(32, 8), "a": torch.randn(32, 3, 8)})
        plan, _ = exported(task, {"near": "int4/uint8", "far": "int8/uint8", "out": "int3/uint6"}, tmp_path)
        found = BACKEND.verify(plan, task, tmp_path)
        assert found.agreement >= 31 / 32
        assert found.largest_difference < 0.05

    def test_weights_of_recurrent_cells_are_quantized(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        task = ModelTask(Recurrent(), torch.randn(16, 5, 8))
        plan, report = exported(task, "int4/uint8", tmp_path)
        assert [(layer.weight, layer.input) for layer in report.layers] == [("exact", "float")] * 2 + [
            ("exact", "exact")
        ]
        expected = plan.apply(task.model)(task.example_input).detach().numpy()
        np.testing.assert_allclose(run(tmp_path, task.example_input)[0], expected, atol=1e-3)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.far, self.out = nn.Linear(8, 16), nn.Conv1d(3, 16, 3), nn.Linear(16, 5)

    def forward(self, x: Tensor, a: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.far(a)).mean(-1) + self.near(x)
        return {"hidden": hidden, "logits": self.out(torch.relu(hidden))}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


def test_the_bias_of_a_dead_channel_survives_integer_arithmetic(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[1] = model[4].weight[2] = 0
        model[0].bias[1], model[4].bias[2] = 3, 7
    task = ModelTask(model, torch.rand(16, 2, 4, 4))
    plan, report = exported(task, "int8/uint8", tmp_path)
    assert [layer.compute for layer in report.layers] == ["int8"] * 3
    expected = plan.apply(model)(task.example_input).detach().numpy()
    np.testing.assert_allclose(run(tmp_path, task.example_input)[0], expected, atol=0.05)
    assert np.allclose(expected[:, 2], 7)


def test_altered_parameters_are_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ModelTask(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(8, 4))
    plan = make_plan(task, "float/float", altered={"2.bias": torch.tensor([1.0, 20.0, 3.0])})
    BACKEND.export(plan, task, tmp_path)
    expected = task.model(task.example_input) - task.model[2].bias + torch.tensor([1.0, 20.0, 3.0])
    np.testing.assert_allclose(run(tmp_path, task.example_input)[0], expected.detach().numpy(), atol=1e-5)


def test_float_layers_are_labelled_float(tmp_path: Path) -> None:
    task = ModelTask(nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4))
    plan, report = exported(task, "float/float", tmp_path)
    assert report.layers == (LayerExport("0", "float/float", "float", "float", "fp32"),)
    assert exported_layers(plan, tmp_path / "model.onnx") == report.layers


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(8, 4))


class TestErrors:
    """Every failure says what is wrong."""

    @pytest.mark.parametrize(
        ("model", "reason"), [(Branching(), "data-dependent"), (FixedBatch(), "static shape of 8")]
    )
    def test_models_that_cannot_be_exported(self, model: nn.Module, reason: str, tmp_path: Path) -> None:
        task = ModelTask(model, torch.randn(8, 4))
        with pytest.raises(UnsupportedError, match=reason):
            BACKEND.export(make_plan(task, "int8/uint8"), task, tmp_path)

    def test_verify_before_export(self, tmp_path: Path) -> None:
        task = ModelTask(nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4))
        with pytest.raises(DataError, match="bitplan export"):
            BACKEND.verify(make_plan(task, "int8/uint8"), task, tmp_path)

    def test_a_damaged_model_in_the_fresh_process(self, tmp_path: Path) -> None:
        (tmp_path / "model.onnx").write_bytes(b"no model")
        with pytest.raises(UnsupportedError, match="does not run"):
            run_in_fresh_process({"plan": tmp_path / "model.onnx"}, [((torch.ones(2, 2),), {})], tmp_path)

    def test_unknown_backends_are_named_with_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'onnxruntime'"):
            backend("onnx-runtime")

    def test_missing_packages_name_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("search.backends.find_spec", lambda name: None if name == "onnxruntime" else object())
        with pytest.raises(UnsupportedError, match=re.escape("pip install 'bitplan[onnxruntime]'")):
            backend("onnxruntime")


def test_the_worker_needs_no_torch() -> None:
    source = WORKER.read_text()
    assert not re.search(r"^\s*(import|from) (torch|search)", source, re.MULTILINE)


ANY_WEIGHT = (
    *("int1", "uint1", "uint2", "uint4", "uint8", "uint16", "int2-full", "int4-full", "int4-asym", "int3-asym"),
    *("int8-asym", "uint4-sym", "int4-tensor", "uint8-tensor", "int4-g16", "int4-asym-g24", "uint8-g16", "int2-g8"),
    *("int16-g32", "mxint8", "int4-g1000", "ternary", "binary", "ttq", "codebook4", "nf4", "fp8_e4m3", "mxfp4"),
    *("nvfp4", "fp16", "bf16", "int16", "float"),
)
ANY_INPUT = (
    *(
        "int8-full",
        "int8-asym",
        "uint8-sym",
        "uint1",
        "int3",
        "int16-asym",
        "fp16",
        "bf16",
        "int8-token",
        "int8-dynamic",
    ),
    *("int8-g16", "fp8_e4m3", "mxint8", "int1"),
)
DYNAMIC = {"int8-token", "int8-dynamic", "int8-g16", "fp8_e4m3", "mxint8", "int1"}
AS_VALUES = {"ttq", "codebook4", "nf4", "fp8_e4m3", "mxfp4", "nvfp4"}
WIDER = {"int1", "uint1", "int3-asym", "binary", "mxint8"}


class Parallel(nn.Module):
    """A layer for every weight format and for every input format, each read by one in int8."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        made = {
            "linear": lambda: nn.Linear(48, 6),
            "conv2d": lambda: nn.Conv2d(4, 6, 3),
            "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
            "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
        }[kind]
        self.layers = nn.ModuleList(made() for _ in (*ANY_WEIGHT, *ANY_INPUT))
        self.readers = nn.ModuleList(
            nn.Linear(6, 3) if kind == "linear" else nn.Conv2d(6, 3, 1) for _ in (*ANY_WEIGHT, *ANY_INPUT)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(reader(torch.relu(layer(x))) for layer, reader in zip(self.layers, self.readers, strict=True))


class EveryResult(ModelTask):
    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.cat([result.flatten(1) for result in model(batch)], -1)


SHAPES = {"linear": (8, 5, 48), "conv2d": (8, 4, 6, 6), "depthwise": (8, 6, 6, 6), "transposed": (8, 4, 4, 4)}


@pytest.mark.parametrize(
    "kind", ["linear", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SHAPES if kind != "linear")]
)
def test_any_format_is_exact_contained_or_said_not_to_be(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = EveryResult(Parallel(kind), torch.randn(SHAPES[kind]))
    names = [f"{weight}/uint8" for weight in ANY_WEIGHT] + [f"int4/{input_}" for input_ in ANY_INPUT]
    policy = {f"layers.{position}": name for position, name in enumerate(names)}
    policy |= {f"readers.{position}": "int8/uint8" for position in range(len(names))}
    plan, report = exported(task, policy, tmp_path)
    expected = simulate(plan, task, report.policy).model(task.example_input)
    found = run(tmp_path, task.example_input)
    for position, name in enumerate(names):
        layer, precision = report.layers[2 * position], Precision.parse(name)
        assert layer.name == f"layers.{position}"
        difference = np.abs(found[position] - expected[position].detach().numpy())
        spread = np.abs(found[position]).max()
        if "bias is rounded" in layer.note:  # a code of the reader's input may be the one next door
            assert (difference > 1e-4 * spread).mean() < (0.2 if precision.input.bits > 1 else 0.6), layer
            assert difference.max() < 0.02 * spread, layer
        else:
            assert (difference > 1e-4 * spread).mean() < 0.03, layer
        weight, input_ = name.split("/")
        assert layer.input == (
            "float" if input_ in DYNAMIC else "contained" if input_ in ("uint1", "int3") else "exact"
        )
        assert layer.runs == (f"{weight}/float" if input_ in DYNAMIC else "")
        if weight != "float":
            assert layer.weight == ("contained" if weight in AS_VALUES | WIDER else "exact")
        if weight in AS_VALUES:
            assert "stored as float32" in layer.note
        assert layer.compute == "fp32" or not precision.weight.is_float, "float weights must not be rounded to int8"


class TestRecalibration:
    """onnxruntime's own ranges: its calibration's, and said to be other values."""

    def test_ranges_are_the_ends_of_what_calibration_saw(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        task = ModelTask(model, torch.randn(64, 4))
        plan = make_plan(task, {"0": "int4/uint8", "2": "int8-asym/int8"})
        report = BACKEND.export(plan, task, tmp_path, recalibrate=True)
        assert {(layer.weight, layer.input) for layer in report.layers} == {("altered", "altered")}
        assert [layer.runs for layer in report.layers] == ["int4/uint8", "int8-asym/int8"]
        assert all("onnxruntime found the range of its weight and input" in layer.note for layer in report.layers)
        assert report.recalibrated
        stored = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in initializers(tmp_path).items()}
        x = task.example_input
        np.testing.assert_allclose(stored["0/input_scale"], (x.max() - x.min()).item() / 255, rtol=1e-5)
        hidden = torch.relu(model[0](x)).max().item()
        np.testing.assert_allclose(stored["2/input_scale"], 2 * hidden / 254, rtol=1e-5)
        weight = model[0].weight.detach().abs().amax(1).numpy()
        np.testing.assert_allclose(stored["0.weight/scale"] * 16, weight / 7, rtol=1e-5)

    def test_what_has_no_integer_range_keeps_its_own(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        task = ModelTask(nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4))
        report = BACKEND.export(make_plan(task, "ternary/int8-token"), task, tmp_path, recalibrate=True)
        assert (report.layers[0].weight, report.layers[0].input, report.layers[0].runs) == (
            "exact",
            "float",
            "ternary/float",
        )


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x)
        return self.used(x)


def test_a_layer_that_the_exporter_dropped_is_named(tmp_path: Path) -> None:
    task = ModelTask(Unused(), torch.randn(8, 4))
    with pytest.raises(UnsupportedError, match="unused"):
        BACKEND.export(make_plan(task, "int8/uint8"), task, tmp_path)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"a-b": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.body["a-b"](self.body["a-b"](x))


def test_a_module_called_twice_is_one_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ModelTask(Twice(), torch.randn(16, 4))
    plan, report = exported(task, "int4/uint8", tmp_path)
    assert [(layer.name, layer.compute) for layer in report.layers] == [("body.a-b", "int8")]
    expected = plan.apply(task.model)(task.example_input).detach().numpy()
    np.testing.assert_allclose(run(tmp_path, task.example_input)[0], expected, atol=0.02)


def test_a_bias_beyond_32_bits_stays_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight[1] *= 1e-9
        model[0].bias[1] = 3
    task = ModelTask(model, torch.rand(16, 2, 4, 4))
    plan, report = exported(task, "int8/uint8", tmp_path)
    expected = plan.apply(model)(task.example_input).detach().numpy()
    np.testing.assert_allclose(run(tmp_path, task.example_input)[0], expected, atol=0.02)
    assert report.layers[0].compute == "fp32"


def test_two_bits_are_stored_as_two_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ModelTask(nn.Sequential(nn.Linear(256, 64)), torch.randn(8, 256))
    _, report = exported(task, "int2/uint8", tmp_path)
    assert report.layers[0].weight == "exact"
    assert len(initializers(tmp_path)["0.weight/codes"].raw_data) == 256 * 64 // 4
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 25
