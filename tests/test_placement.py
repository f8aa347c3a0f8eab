"""placement=full: which tensors are quantized where they are produced, and with which values."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import Bench, TinyTask, make_bench, tiny_plan
from torch import Tensor, nn
from torch.nn import functional as F

from hwmodels import Format, Precision
from search.errors import UnsupportedError
from search.policy import Policy
from search.quantize.inputs import input_quantizer
from search.quantize.placement import find_points, formats_of
from search.quantize.settings import QuantizerSettings
from search.quantize.simulate import QuantizedModel, exact_inference
from search.trace import trace

FULL = QuantizerSettings(placement="full")
UINT8 = Format.parse("uint8")


@pytest.fixture
def full() -> Bench:
    return make_bench(TinyTask(), quantizer=FULL)


def test_what_integer_runtimes_compute_is_quantized(full: Bench) -> None:
    policy = Policy.uniform(full.network, Precision.parse("int8/uint4"))
    found = formats_of(full.simulated.points, full.network, policy, UINT8)
    assert {name: str(format) for name, format in found.items()} == {
        "relu": "uint4",  # what `left` and `right` read; `stem` itself is fused with it
        "left": "uint8",  # read by the sum alone
        "right": "uint8",
        "relu.1": "uint8",  # the sum is fused with it
        "mean": "uint4",  # what `head` reads
        "head": "uint8",  # what the network returns
    }


def test_operations_on_floats_stay_in_float(full: Bench) -> None:
    def formats(policy: dict[str, Precision]) -> dict[str, Format]:
        return formats_of(full.simulated.points, full.network, policy, UINT8)

    assert formats({}) == {}
    assert formats({"left": Precision.parse("int4")}) == {}, "weights alone leave the layer in float"
    assert set(formats({"left": Precision.parse("int4/uint8")})) == {"relu", "left"}, "the sum reads a float too"
    both = dict.fromkeys(("left", "right"), Precision.parse("int4/uint8"))
    assert set(formats(both)) == {"relu", "left", "right", "relu.1"}


def test_values_are_those_of_a_network_quantized_by_hand(full: Bench) -> None:
    policy = Policy.uniform(full.network, Precision.parse("int4/uint8"))
    simulated, images = full.simulated, full.task.example_input
    with exact_inference():
        found = simulated.apply(policy)(images).clone()

    def as_input(layer: str, x: Tensor) -> Tensor:
        return input_quantizer(UINT8, simulated.input_range(layer, UINT8), 1)(x)

    def as_tensor(name: str, x: Tensor) -> Tensor:
        return input_quantizer(UINT8, simulated.tensor_range(name, UINT8), 1)(x)

    def layer(name: str, x: Tensor) -> Tensor:
        module = full.simulated.model.get_submodule(name)
        weight = simulated.quantized_weight(name, Format.parse("int4"))
        step = (
            simulated.input_range(name, UINT8).scale * simulated.weight_parameters(name, Format.parse("int4"))["scale"]
        )
        bias = (full.simulated._float_bias[name] / step).round() * step
        if isinstance(module, nn.Linear):
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=module.padding)

    with torch.no_grad():
        x = as_input("left", F.relu(layer("stem", as_input("stem", images))))
        left, right = as_tensor("left", layer("left", x)), as_tensor("right", layer("right", x))
        x = as_tensor("relu.1", F.relu(left + right))
        x = as_input("head", x.mean((2, 3)))
        expected = as_tensor("head", layer("head", x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_float_comes_back_bit_for_bit(full: Bench) -> None:
    images = full.task.example_input
    with exact_inference():
        expected = full.simulated.apply({})(images).clone()
        quantized = full.simulated.apply(Policy.uniform(full.network, Precision.parse("int8/uint8")))(images).clone()
        assert not torch.equal(quantized, expected)
        assert torch.equal(full.simulated.apply({})(images), expected)
    assert not any(module._forward_hooks for module in full.simulated.model.modules())


def test_the_plan_holds_every_range(full: Bench, tmp_path) -> None:
    policy = Policy.uniform(full.network, Precision.parse("int4/uint4"))
    plan = tiny_plan(full, tmp_path, policy)
    plan.save(tmp_path / "plan.json")
    with exact_inference():
        expected = full.simulated.apply(policy)(full.task.example_input).clone()
        loaded = type(plan).load(tmp_path / "plan.json")
        assert torch.equal(loaded.apply(full.task.model)(full.task.example_input), expected)


def test_backends_refuse_what_they_cannot_express(full: Bench, tmp_path) -> None:
    pytest.importorskip("torchao")
    from search.backends import backend

    plan = tiny_plan(full, tmp_path, Policy.uniform(full.network, Precision.parse("int4/uint8")))
    with pytest.raises(UnsupportedError, match="placement=full"):
        backend("torchao").export(plan, full.task, tmp_path / "torchao")


def operations(folder: Path) -> Counter[str]:
    from search.backends.onnxruntime import optimized_graph

    return Counter(node.op_type for node in optimized_graph(folder / "model.onnx").node)


@pytest.mark.parametrize("precision", ["int8/uint8", "int4/uint4"])
def test_onnxruntime_computes_the_very_values_in_integers(full: Bench, tmp_path: Path, precision: str) -> None:
    pytest.importorskip("onnxruntime")
    from search.backends import backend

    plan = tiny_plan(full, tmp_path, Policy.uniform(full.network, Precision.parse(precision)))
    report = backend("onnxruntime").export(plan, full.task, tmp_path / "out")
    assert {layer.compute for layer in report.layers} == {"int8"}
    found = operations(tmp_path / "out")
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (3, 1, 1)
    assert not found["Conv"] + found["Add"] + found["Gemm"]
    checked = backend("onnxruntime").verify(plan, full.task, tmp_path / "out")
    assert checked.agreement == 1
    assert checked.largest_difference < 1e-4, "the last code of the mean may round the other way"
    assert checked.verdict == "delivered"


def test_onnxruntime_leaves_what_floats_reach_in_float(full: Bench, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from search.backends import backend

    mixed = dict.fromkeys(("left", "right"), "int8/uint8") | {"stem": "float/float", "head": "int8/int8-token"}
    plan = tiny_plan(full, tmp_path, Policy.from_dict(mixed))
    report = backend("onnxruntime").export(plan, full.task, tmp_path / "out")
    assert {layer.name: layer.compute for layer in report.layers} == {
        "stem": "fp32",
        "left": "int8",
        "right": "int8",
        "head": "fp32",
    }
    assert {layer.name: layer.runs for layer in report.layers if layer.runs} == {"head": "int8/float"}
    assert backend("onnxruntime").verify(plan, full.task, tmp_path / "out").agreement > 0.99


class Pooled(nn.Module):
    """Concatenation, pooling modules, activations written in place, one module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 3, 3, padding=1)
        self.act, self.pool, self.head = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat(tensors=[self.act(self.one(x)), self.act(self.two(x))], dim=1)
        x = F.adaptive_avg_pool2d(self.pool(x), 1)
        return self.head(x.flatten(1))


@pytest.mark.parametrize("model", [Pooled()])
def test_every_point_is_reached_and_rounded(model: nn.Module) -> None:
    x = torch.randn(4, 1, 8, 8)
    model.eval()
    network = trace(model, x)
    simulated = QuantizedModel(copy.deepcopy(model), network, FULL)
    simulated.calibrate([x])
    assert simulated.points == find_points(simulated.model, network, x)
    policy = Policy.uniform(network, Precision.parse("int8/uint4"))
    with exact_inference():
        returned = simulated.apply(policy)(x)
        twice = simulated.model(x)
    tensor = network.outputs[0]
    assert torch.equal(returned, twice)
    on_grid = input_quantizer(UINT8, simulated.tensor_range(tensor, UINT8), -1)(returned)
    assert torch.equal(on_grid, returned)
    placed = formats_of(simulated.points, network, policy, UINT8)
    assert set(placed) == {"act", "act.1", "cat", "pool", "adaptive_avg_pool2d", "head"}


def test_onnxruntime_concatenates_in_integers(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from search.backends.onnx_capture import capture
    from search.backends.onnx_quantize import quantized, save

    torch.manual_seed(0)
    model, x = Pooled().eval(), torch.randn(4, 1, 8, 8)
    network = trace(model, x)
    simulated = QuantizedModel(copy.deepcopy(model), network, FULL)
    simulated.calibrate([x])
    policy = Policy.uniform(network, Precision.parse("int8/uint8"))
    captured = capture(simulated.model, network, x, simulated.points)
    save(quantized(captured, simulated, policy), tmp_path / "model.onnx")
    assert {"QLinearConv", "QLinearConcat", "QGemm"} <= set(operations(tmp_path))
    assert "Conv" not in operations(tmp_path)
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    with exact_inference():
        expected = simulated.apply(policy)(x).numpy()
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    step = simulated.tensor_range(network.outputs[0], UINT8).scale
    assert abs(found - expected).max() < 1.5 * step, "a code next door at most"
