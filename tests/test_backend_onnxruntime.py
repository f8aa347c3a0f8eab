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
            contained = {"int2", "int3", "int5", "int6", "uint4", "uint6", "uint7"}
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
            assert codes.data_type == (onnx.TensorProto.INT4 if precision.weight.bits == 4 else onnx.TensorProto.INT8)
            values = onnx.numpy_helper.to_array(codes).astype(np.float32)
            scale = onnx.numpy_helper.to_array(stored[f"{name}.weight/scale"])
            steps = values * (scale / plan.ranges.weights[name, precision.weight]["scale"].numpy()).reshape(
                -1, *[1] * (values.ndim - 1)
            )
            np.testing.assert_array_equal(steps, steps.round())
            assert np.abs(steps).max() == precision.weight.highest
            assert f"{name}.weight" not in stored

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
        if layer.compute == "int8":  # only the bias is rounded, to half a step of the codes that are stored
            step = step / 2 ** ((4 if precision.weight.bits == 4 else 8) - precision.weight.bits)
        rounding = step.numpy() / 2 if layer.compute == "int8" else 0
        difference = np.abs(found - expected[name].detach().numpy())
        assert (difference <= rounding + 1e-4 + 1e-4 * np.abs(found)).all(), layer
    by_input = {layer.precision.split("/")[1]: layer.input for layer in report.layers}
    assert by_input == dict.fromkeys(("uint2", "uint4", "uint6"), "contained") | dict.fromkeys(
        ("uint8", "uint16", "int8", "int16"), "exact"
    )
    assert {layer.compute for layer in report.layers if re.fullmatch(r"int[2-8]/uint[2-8]", layer.precision)} == {
        "int8"
    }


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


def test_weights_without_a_type_are_stored_as_values_and_said_to_be(tmp_path: Path) -> None:
    """onnxruntime rounds float weights between quantizers to int8 of its own: that is another network, and is said."""
    task = Digits()
    names = ("codebook4/uint8", "ternary/uint8", "int4-g32/uint8", "mxfp4/float", "int4-asym/uint8")
    _, report = exported(task, lambda position, _: names[position % len(names)], tmp_path)
    for layer in report.layers:
        assert layer.weight == ("altered" if layer.compute == "int8" else "contained")
        assert "stored as float32" in layer.note
        assert ("rounds them to int8" in layer.note) == (layer.weight == "altered")
    assert {layer.weight for layer in report.layers} == {"altered", "contained"}


@pytest.mark.parametrize("format", ["int8-token", "int8-dynamic", "fp8_e4m3", "mxint8", "int1", "bf16"])
def test_inputs_it_cannot_take_are_refused_by_name(format: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"no {format} input of layer"):
        exported(Digits(), f"int8/{format}", tmp_path)
