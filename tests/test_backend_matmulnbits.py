"""Blocks of codes in onnxruntime's own operators stand for the simulation's weights, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import BackendContract
from networks import Decoder
from plans import ModelTask, make_plan
from torch import Tensor, nn

from hwmodels import Format, Layer, Precision
from search.backends import backend
from search.plan import Plan

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

BLOCKED = (
    *("int4-g32", "uint4-g32", "int4-asym-g128", "int4-full-g64", "int8-g128", "int2-g32", "uint2-g16", "int4-g48"),
    *("int4", "int8", "uint8", "int2", "int3", "int5", "int6-g32", "int7-asym", "int8-full", "uint4-sym", "int1"),
    *("int4-tensor", "int4-asym-tensor", "binary", "ternary", "mxint8", "ternary-g32"),
)
OTHERS = ("int16", "codebook4", "nf4", "fp8_e4m3", "ttq", "int4-g24", "fp16")  # keep their values elsewhere
FORMATS = BLOCKED + OTHERS
BACKEND = backend("matmulnbits")


class TestMatMulNBits(BackendContract):
    precision = "int4-g32"

    @pytest.fixture
    def backend(self) -> Any:
        return BACKEND


def run(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0])


def nodes(path: Path) -> dict[str, Any]:
    """The nodes that read a layer's weight, by the layer."""
    graph = onnx.load(path / "model.onnx").graph
    return {node.name.split("<")[1].strip(">"): node for node in graph.node if "<" in node.name}


def planned(model: nn.Module, inputs: Tensor, policy: Any, path: Path) -> tuple[Plan, ModelTask, nn.Module]:
    task = ModelTask(model, inputs)
    plan = make_plan(task, policy)
    BACKEND.export(plan, task, path)
    return plan, task, plan.apply(task.model)


class Each(nn.Module):
    """Layers that all read the input, as much of it as they take, and return what they make of it side by side."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.each = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x[:, : layer.weight.shape[1]]) for layer in self.each], -1)


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A linear layer for every format, and as many whose rows fill no whole blocks."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("linear")
    model = Each(nn.Linear(values, 6, bias=False) for values in (200, 27) for _ in FORMATS)
    _, _, simulated = planned(model, torch.randn(4, 200), by_position, path)
    return simulated, path


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """An embedding for every format, and as many of a width that fills no whole block."""
    torch.manual_seed(0)
    model = Each(nn.Embedding(10, values) for values in (64, 24) for _ in FORMATS)
    path = tmp_path_factory.mktemp("embedding")
    _, _, simulated = planned(model, torch.arange(10).reshape(2, 5), by_position, path)
    return simulated, path


def by_position(position: int, layer: Layer) -> str:
    return f"{FORMATS[position % len(FORMATS)]}/float"


def test_identity_returns_the_simulated_weights_bit_for_bit(linear: tuple[nn.Module, Path]) -> None:
    simulated, path = linear
    found = run(path, torch.eye(200)).split(6, -1)
    layers = [(name, layer) for name, layer in simulated.named_modules() if isinstance(layer, nn.Linear)]
    operations = nodes(path)
    for (name, layer), format, returned in zip(layers, FORMATS * 2, found, strict=True):
        weight = layer.weight.T
        torch.testing.assert_close(returned[: len(weight)], weight, rtol=0, atol=0, msg=f"{name} in {format}")
        assert not returned[len(weight) :].any()
        is_blocked = operations[name].op_type == "MatMulNBits"
        assert is_blocked == (format in BLOCKED), format


@pytest.mark.backend
def test_embeddings_return_the_simulated_rows_bit_for_bit(embedding: tuple[nn.Module, Path]) -> None:
    simulated, path = embedding
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(run(path, ids), simulated(ids))
    operations = [node.op_type for node in nodes(path).values()]
    assert operations[: len(BLOCKED)] == ["GatherBlockQuantized"] * len(BLOCKED)
    assert operations[len(BLOCKED) : len(FORMATS)] == ["Gather"] * len(OTHERS)


def test_bits_are_packed_from_the_lowest() -> None:
    from search.backends.onnx_nbits import packed

    codes = np.array([[1, 2, 3, 0, 2]], np.uint8)
    assert packed(codes, 2).tolist() == [[0b00111001, 0b10]]
    assert packed(codes, 4).tolist() == [[0x21, 0x03, 0x02]]
    assert packed(codes, 8).tolist() == codes.tolist()


@pytest.mark.parametrize(
    ("format", "values", "bits", "size", "count"),
    [
        ("int4-g32", 128, 4, 32, 4),
        ("int4-g48", 144, 4, 16, 9),  # a group of three blocks
        ("int4", 256, 4, 256, 1),
        ("int4", 768, 4, 256, 3),  # its scale three times rather than a quarter of a block of padding
        ("int2", 1024, 2, 256, 4),  # the largest block of 2 bits
        ("int8-g128", 64, 8, 64, 1),  # a group that holds the row
        ("int3", 27, 4, 32, 1),
    ],
)
def test_blocks_take_the_fewest_bytes(format: str, values: int, bits: int, size: int, count: int) -> None:
    from search.backends.onnx_nbits import blocks_of

    blocks = blocks_of(Layer("fc", "linear", weight_shape=(8, values)), Format.parse(format))
    assert blocks is not None
    assert (blocks.bits, blocks.size, blocks.count) == (bits, size, count)


class Mixed(nn.Module):
    """A convolution, dotted names, one layer called twice, and a bias of its own beside each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3)
        self.body = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Sequential(nn.Linear(16, 16, bias=False))})
        self.head = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        x = torch.relu(self.body["a"](torch.relu(self.body["a"](x))))
        return self.head((x + self.body["b"](x)).flatten(1))


@pytest.mark.backend
def test_every_kind_of_layer_beside_the_other(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = {"stem": "int4/float", "body.a": "uint4-g16/float", "body.b.0": "float", "head": "int8-g32/uint8"}
    x = torch.randn(8, 1, 6, 6)
    plan, task, _ = planned(Mixed(), x, policy, tmp_path)
    weights = make_plan(task, policy | {"head": "int8-g32"}).apply(task.model)
    torch.testing.assert_close(run(tmp_path, x), weights(x), rtol=1e-5, atol=1e-5)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert [node.op_type for node in graph.node].count("MatMulNBits") == 3  # body.a twice, head
    found = BACKEND.verify(plan, task, tmp_path)
    assert found.agreement == 1
    assert [latency.name for latency in found.latencies] == ["plan", "float", "int8"]
    said = {layer.name: (layer.weight, layer.input, layer.runs) for layer in found.layers}
    assert said == {
        "stem": ("exact", "float", ""),
        "body.a": ("exact", "float", ""),
        "body.b.0": ("float", "float", ""),
        "head": ("exact", "float", "int8-g32/float"),
    }


@pytest.mark.backend
def test_an_embedding_and_the_decoder_that_shares_its_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (4, 8))
    _, _, simulated = planned(Decoder(), ids, "uint4-g16/float", tmp_path)
    torch.testing.assert_close(run(tmp_path, ids), simulated(ids), rtol=1e-5, atol=1e-5)
    found = nodes(tmp_path)
    assert {name: found[name].op_type for name in ("embedding", "decoder")} == {
        "embedding": "GatherBlockQuantized",
        "decoder": "MatMulNBits",
    }


@pytest.mark.backend
def test_bytes_on_disk_are_the_plans(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    _, _, _ = planned(model, torch.randn(4, 512), "int4-g32/float", tmp_path)
    expected = 2 * (512 * 512 / 2 + 512 * 16 * 4 + 512 * 4)
    assert expected < (tmp_path / "model.onnx").stat().st_size < expected + 4096


def test_layers_are_labelled_by_what_is_stored() -> None:
    fc, conv = Layer("fc", "linear", weight_shape=(16, 1024)), Layer("conv", "conv2d", weight_shape=(8, 4, 3, 3))
    said = {name: BACKEND.express(fc, Precision.parse(name)) for name in ("int4-g32", "int3-g32", "int2", "nf4")}
    assert {name: layer.weight for name, layer in said.items()} == {
        "int4-g32": "exact",
        "int3-g32": "contained",
        "int2": "contained",
        "nf4": "contained",
    }
    assert not said["int4-g32"].note
    assert "4 bits" in said["int3-g32"].note
    assert "scale" in said["int2"].note
    assert "float32" in said["nf4"].note
    assert BACKEND.express(conv, Precision.parse("int8")).weight == "exact"
    assert BACKEND.refuses(fc, Precision.parse("int4/uint8")) is not None
    assert BACKEND.refuses(fc, Precision.parse("int4-g32")) is None
