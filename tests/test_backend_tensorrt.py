"""The file keeps TensorRT's rules, and its quantizers hold the plan's own values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import BackendContract, contents
from networks import Decoder
from plans import ModelTask, make_plan
from torch import Tensor, nn

from hwmodels import Layer, Precision
from search.backends import backend
from search.errors import DataError
from search.tasks.digits import Digits

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

BACKEND: Any = backend("tensorrt")
WEIGHTS = (
    *("int8", "int4", "int3", "int2", "int8-full", "int8-tensor", "int1", "binary", "ternary", "fp8_e4m3"),
    *("int4-g32", "int8-g64", "int3-g32", "int4-full-g64", "int4-g16", "int4-g128", "uint8", "int4-asym-g32"),
    *("nf4", "codebook4", "int16", "mxint8", "fp16", "float"),
)
INPUTS = ("int8", "int8-full", "int4", "uint4", "uint7", "uint4-sym", "int5-asym", "fp8_e4m3", "float")


class TestTensorRT(BackendContract):
    precision = "int8/int8"

    @pytest.fixture
    def backend(self) -> Any:
        return BACKEND

    def test_reads_back_what_it_wrote(self, planned: Any, tmp_path: Path) -> None:
        plan, task = planned
        report = BACKEND.export(plan, task, tmp_path / "out")
        assert dict(BACKEND.read(tmp_path / "out")) == dict(report.policy)


class Each(nn.Module):
    """Layers that all read the input, and return what they make of it side by side."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.each = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.each], -1)


def run(path: Path, *inputs: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0])


def test_identity_returns_the_simulated_weights_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ModelTask(Each(*(nn.Linear(128, 6, bias=False) for _ in WEIGHTS)), torch.randn(4, 128))
    plan = make_plan(task, lambda position, _: f"{WEIGHTS[position]}/float")
    BACKEND.export(plan, task, tmp_path)
    found = run(tmp_path, torch.eye(128)).split(6, -1)
    for format, layer, returned in zip(WEIGHTS, plan.apply(task.model).each, found, strict=True):
        torch.testing.assert_close(returned, layer.weight.T, rtol=0, atol=0, msg=format)
    assert dict(BACKEND.read(tmp_path)) == dict(plan.policy)


def test_inputs_take_the_simulated_values(tmp_path: Path) -> None:
    task = ModelTask(Each(*(nn.Linear(8, 8, bias=False) for _ in INPUTS)), torch.randn(64, 8) * 3 + 1)
    for layer in task.model.each:
        layer.weight.data = torch.eye(8)
    plan = make_plan(task, lambda position, _: f"float/{INPUTS[position]}")
    BACKEND.export(plan, task, tmp_path)
    x = torch.linspace(-20, 20, 1024 * 8).view(-1, 8)
    torch.testing.assert_close(run(tmp_path, x), plan.apply(task.model)(x), rtol=1e-6, atol=1e-6)
    assert dict(BACKEND.read(tmp_path)) == dict(plan.policy)


@pytest.mark.backend
def test_digits_end_to_end(tmp_path: Path) -> None:
    precisions = ("int8/int8", "int4/int8", "int8/uint4", "fp8_e4m3/fp8_e4m3", "float", "int8/uint8", "nf4/int6")
    plan = make_plan(Digits(), lambda position, _: precisions[position % len(precisions)])
    report = BACKEND.export(plan, Digits(), tmp_path)
    found = BACKEND.verify(plan, Digits(), tmp_path)
    assert found.proof == "emitted"
    assert "TensorRT 11" in found.by
    said = {layer.precision: (layer.weight, layer.input, layer.runs) for layer in report.layers}
    assert said["int8/int8"] == ("exact", "exact", "")
    assert said["int4/int8"] == ("contained", "exact", "")
    assert said["int8/uint4"] == ("exact", "contained", "")
    assert said["fp8_e4m3/fp8_e4m3"] == ("exact", "exact", "")
    assert said["int8/uint8"] == ("exact", "altered", "int8/int8")
    assert said["nf4/int6"] == ("contained", "contained", "")


@pytest.mark.backend
def test_an_embedding_and_the_decoder_that_shares_its_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ModelTask(Decoder(), torch.randint(0, 20, (4, 8)))
    plan = make_plan(task, "int8/int8")
    BACKEND.export(plan, task, tmp_path)
    assert dict(BACKEND.read(tmp_path)) == dict(plan.policy)
    expected = plan.apply(task.model)(task.example_input)
    torch.testing.assert_close(run(tmp_path, task.example_input), expected, rtol=1e-4, atol=1e-4)


def _zero_point(graph: Any, node: Any) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(3, np.int8), "three"))
    node.input[2] = "three"


def _unsigned(graph: Any, node: Any) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.uint8), "none"))
    node.input[2] = "none"


def _negative(graph: Any, node: Any) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(-1), "minus"))
    node.input[1] = "minus"


def _many(graph: Any, node: Any) -> None:
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), "many"))
    node.input[1] = "many"


@pytest.mark.parametrize(
    ("change", "rule"),
    [(_zero_point, "zero"), (_unsigned, "UINT8"), (_negative, "positive"), (_many, "one scale")],
)
def test_a_file_that_breaks_a_rule_is_refused(change: Any, rule: str, tmp_path: Path) -> None:
    task = ModelTask(nn.Sequential(nn.Linear(8, 4)), torch.randn(8, 8))
    BACKEND.export(make_plan(task, "int8/int8"), task, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    [node] = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    change(model.graph, node)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(DataError, match=rule):
        BACKEND.read(tmp_path)


def test_a_file_that_no_export_wrote_is_refused(tmp_path: Path) -> None:
    task = ModelTask(nn.Sequential(nn.Linear(8, 4)), torch.randn(8, 8))
    BACKEND.export(make_plan(task, "int8/int8"), task, tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(DataError, match="export again"):
        BACKEND.read(tmp_path)
    assert contents(tmp_path)


def test_what_has_no_type_is_said() -> None:
    layer = Layer("fc", "linear", weight_shape=(16, 128))
    said = {name: BACKEND.express(layer, Precision.parse(name)) for name in ("int4-g32", "int4", "int4-g16", "uint8")}
    assert {name: one.weight for name, one in said.items()} == {
        "int4-g32": "exact",
        "int4": "contained",
        "int4-g16": "contained",
        "uint8": "contained",
    }
    assert "blocks" in said["int4"].note
    assert BACKEND.express(layer, Precision.parse("int8/int8-token")).runs == "int8/float"
    assert BACKEND.refuses(layer, Precision.parse("int8/uint8")) is not None
    assert BACKEND.refuses(layer, Precision.parse("int8/int8")) is None
