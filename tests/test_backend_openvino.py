"""OpenVINO computes with the plan's own values, and says where in integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import BackendContract
from networks import Decoder
from plans import ModelTask, make_plan
from torch import Tensor, nn

from hwmodels import Layer, Precision
from search.backends import backend
from search.plan import Plan
from search.quiet import quietly
from search.tasks.digits import Digits

onnx = pytest.importorskip("onnx")
with quietly("openvino"):
    openvino = pytest.importorskip("openvino")

BACKEND = backend("openvino")
WEIGHTS = (
    *("int8", "int4", "int3", "int2", "int5", "int8-full", "uint8", "uint4", "int4-asym", "int4-tensor", "int1"),
    *("int4-g32", "uint4-g32", "int8-g64", "int4-asym-g128", "int4-g24", "ternary", "binary", "mxint8"),
    *("int16", "codebook4", "nf4", "fp8_e4m3", "ttq", "fp16", "float"),
)
INPUTS = ("uint8", "int8", "int8-full", "uint4", "int3", "uint8-sym", "int8-asym", "uint2", "float")


class TestOpenVino(BackendContract):
    @pytest.fixture
    def backend(self) -> Any:
        return BACKEND


class Each(nn.Module):
    """Layers that all read the input, and return what they make of it side by side."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.each = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.each], -1)


def run(path: Path, *inputs: Tensor) -> Tensor:
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_NUM_THREADS": 1}
    model = openvino.Core().compile_model(path / "model.xml", "CPU", exact)
    return torch.from_numpy(model([x.numpy() for x in inputs])[0])


def test_identity_returns_the_simulated_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ModelTask(Each(*(nn.Linear(128, 6, bias=False) for _ in WEIGHTS)), torch.randn(4, 128))
    plan = make_plan(task, lambda position, _: f"{WEIGHTS[position]}/float")
    BACKEND.export(plan, task, tmp_path)
    found = run(tmp_path, torch.eye(128)).split(6, -1)
    for format, layer, returned in zip(WEIGHTS, plan.apply(task.model).each, found, strict=True):
        torch.testing.assert_close(returned, layer.weight.T, rtol=1e-6, atol=0, msg=format)


def test_inputs_take_the_simulated_values(tmp_path: Path) -> None:
    """Weights of one select single inputs, quantized; the grid of inputs holds no middle between two codes."""
    task = ModelTask(Each(*(nn.Linear(8, 8, bias=False) for _ in INPUTS)), torch.randn(64, 8) * 3 + 1)
    for layer in task.model.each:
        layer.weight.data = torch.eye(8)
    plan = make_plan(task, lambda position, _: f"float/{INPUTS[position]}")
    BACKEND.export(plan, task, tmp_path)
    simulated = plan.apply(task.model)
    x = torch.linspace(-20, 20, 1024 * 8).view(-1, 8)
    difference = (run(tmp_path, x) - simulated(x)).abs()
    assert (difference > 1e-5).float().mean() < 1e-3
    torch.testing.assert_close(run(tmp_path, x)[:, -8:], x)


class TestDigits:
    """A mixed plan, from end to end."""

    PRECISIONS = ("int8/uint8", "int4/uint8", "int3/uint6", "int8/int8", "float", "int4/float", "nf4/int6")

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Any, Path]:
        path = tmp_path_factory.mktemp("openvino")
        plan = make_plan(Digits(), lambda position, _: cls.PRECISIONS[position % len(cls.PRECISIONS)])
        return plan, BACKEND.export(plan, Digits(), path), path

    def test_the_fresh_process_delivers(self, made: tuple[Plan, Any, Path]) -> None:
        plan, report, path = made
        found = BACKEND.verify(plan, Digits(), path)
        assert found.agreement >= 0.99
        assert abs(found.quality - found.promised) <= 1 / found.samples + 1e-9
        assert [latency.name for latency in found.latencies] == ["plan", "float", "int8"]
        assert found.bytes_on_disk == sum(
            file.stat().st_size for file in report.files if file.suffix in (".xml", ".bin")
        )
        assert found.layers == report.layers

    def test_compute_types_are_those_of_the_kernels(self, made: tuple[Plan, Any, Path]) -> None:
        plan, report, _ = made
        for layer, precision in zip(report.layers, plan.policy.values(), strict=True):
            weight, input_ = precision.weight, precision.input
            expected = {"int8"} if weight.is_symmetric_integer and not input_.is_float else {"fp32"}
            assert {layer.compute} == expected, layer

    def test_weights_of_4_bits_take_4_bits_for_float_inputs(self, made: tuple[Plan, Any, Path]) -> None:
        plan, report, path = made
        said = {(layer.precision, layer.weight) for layer in report.layers}
        assert {("int4/uint8", "contained"), ("int4/float", "exact"), ("int8/uint8", "exact")} <= said
        [narrow] = [layer for layer in plan.layers if layer.weight == "int4" and layer.input == "float"]
        ir = (path / "model.xml").read_text()
        assert 'element_type="i4"' in ir
        assert f'size="{np.prod(narrow.weight_shape) // 2}"' in ir


def test_an_embedding_and_the_decoder_that_shares_its_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ModelTask(Decoder(), torch.randint(0, 20, (4, 8)))
    plan = make_plan(task, "int4-g16/float")
    BACKEND.export(plan, task, tmp_path)
    expected = plan.apply(task.model)(task.example_input)
    torch.testing.assert_close(run(tmp_path, task.example_input), expected, rtol=1e-4, atol=1e-5)


def test_other_inputs_stay_in_float() -> None:
    layer = Layer("fc", "linear", weight_shape=(16, 128))
    said = BACKEND.express(layer, Precision.parse("int8/int8-token"))
    assert (said.weight, said.input, said.runs) == ("exact", "float", "int8/float")
    assert "int8-token" in said.note
    assert BACKEND.refuses(layer, Precision.parse("int8/uint16")) is not None
    assert BACKEND.refuses(layer, Precision.parse("int8/uint8")) is None


@pytest.mark.parametrize(("features", "precision"), [(37, "int4/float"), (37, "uint4/float"), (70, "int4-g35/float")])
def test_rows_of_an_odd_number_of_4_bit_codes_keep_their_values(features: int, precision: str, tmp_path: Path) -> None:
    task = ModelTask(nn.Sequential(nn.Linear(features, 8)), torch.randn(16, features))
    plan = make_plan(task, precision)
    (layer,) = backend("openvino").export(plan, task, tmp_path / "out").layers
    assert (layer.weight, layer.runs) == ("contained", "")
    found = backend("openvino").verify(plan, task, tmp_path / "out")
    assert found.largest_difference < 1e-4
