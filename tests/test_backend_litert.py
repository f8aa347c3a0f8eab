import itertools
import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from hwmodels import Format, Layer, Precision
from search.backends.litert import LiteRT
from search.backends.litert_storage import input_ends, op_config, operation_of, stored_as, weight_ends
from search.errors import UnsupportedError
from tests.conformance import EXPORTED, EXPORTED_PRECISIONS, BackendContract
from tests.networks import Attention, Decoder, Recurrent, Tagger, TwoInputs
from tests.plans import ModelTask, make_plan
from tests.tiny import TinyTask

LINEAR = EXPORTED[0]


@pytest.mark.backend
class TestLiteRT(BackendContract):
    precision = "int4"

    @pytest.fixture
    def backend(self) -> LiteRT:
        return LiteRT()


@pytest.mark.backend
class TestLiteRTOnIntegers(TestLiteRT):
    precision = "int8/uint8"
    agreement: ClassVar[float] = 0.95


@pytest.mark.backend
class TestLiteRTFindingScalesItself(TestLiteRT):
    precision = "int4/int8-token"
    agreement: ClassVar[float] = 0.95


class TestLiteRTBeforehand:
    @pytest.fixture
    def backend(self) -> LiteRT:
        return LiteRT()

    test_says_what_becomes_of_every_format = BackendContract.test_says_what_becomes_of_every_format


def test_operations_follow_from_kind_and_shape() -> None:
    one_channel = Layer("stem", "conv2d", weight_shape=(4, 1, 3, 3))
    grouped = Layer("conv", "conv2d", weight_shape=(8, 4, 3, 3), groups=2)
    names = {layer.name: operation_of(layer) for layer in (*EXPORTED, one_channel, grouped)}
    assert names["linear"] == "FULLY_CONNECTED"
    assert names["embedding"] == "EMBEDDING_LOOKUP"
    assert names["depthwise"] == names["stem"] == "DEPTHWISE_CONV_2D"
    assert names["lstm.weight_hh_l0"] == names["conv"] == ""


def test_what_litert_has_no_type_for_is_stored_as_float_values() -> None:
    found = LiteRT().express(LINEAR, Precision.parse("nf4"))
    assert (found.weight, found.runs) == ("contained", "")
    assert "stored as float32" in found.note
    found = LiteRT().express(LINEAR, Precision.parse("int4-g32"))
    assert found.weight == "contained"
    found = LiteRT().express(LINEAR, Precision.parse("int4-g32/int8-token"))
    assert (found.weight, found.runs) == ("altered", "int4-g32/int8-asym-token")


def test_searches_for_it_keep_integer_inputs_of_8_and_16_bits_only() -> None:
    backend = LiteRT()
    for name in ("int8/uint8", "int4/uint8", "int8/int16", "int4", "fp16"):
        assert backend.refuses(LINEAR, Precision.parse(name)) is None, name
    for name in ("int4/uint6", "int8/uint16", "int8/fp8_e4m3", "int3", "nf4"):
        assert backend.refuses(LINEAR, Precision.parse(name)), name
    assert backend.refuses(LINEAR, Precision.parse("int3"), "contained") is None


@pytest.mark.parametrize(
    "name", ["int8", "int4", "int3", "int4-full", "int1", "uint4", "uint3", "int8-asym", "uint8-sym"]
)
def test_scales_come_out_of_the_quantizers_arithmetic_as_they_went_in(name: str) -> None:
    """The bound over the largest code, or the span over the number of steps, in float64."""
    format = Format.parse(name)
    stored = stored_as(LINEAR, Precision(format))
    rng = np.random.default_rng(0)
    scale = rng.uniform(1e-4, 2, 100).astype(np.float32)
    zero = rng.integers(format.lowest, format.highest + 1, 100) if format.has_zero_point else np.zeros(100)
    low, high = weight_ends(stored, format, scale.astype(np.float64), zero.astype(np.float64))
    if format.signed and not format.has_zero_point:
        found, first = np.maximum(-low, high) / (2 ** (stored.bits - 1) - 1), None
    else:
        found = (np.maximum(high, 0) - np.minimum(low, 0)) / (2**stored.bits - 1)
        first = np.rint(-np.minimum(low, 0) / found)
    assert np.array_equal(found.astype(np.float32), scale)
    if first is not None:
        codes = np.array([format.lowest, format.highest])[:, None]
        values = ((codes - zero) * scale).astype(np.float32)
        lowest = format.lowest if format.has_zero_point else 0
        assert np.array_equal(values, ((codes - lowest - first) * scale).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "zero", "ends"),
    [
        ("uint8", 3, (-1.5, 126.0)),
        ("int8", 0, (-63.5, 63.5)),
        ("int8-full", 0, (-63.5, 63.5)),
        ("uint6", 63, (-31.5, 0.0)),
        ("int16", 0, (-16383.5, 16383.5)),
        ("uint16", 5, (-32765.0, 32765.0)),
    ],
)
def test_ranges_of_inputs_span_the_plans_codes(name: str, zero: int, ends: tuple[float, float]) -> None:
    format = Format.parse(name)
    stored = stored_as(LINEAR, Precision(Format.parse("int8"), format))
    assert stored.mode == "static"
    assert input_ends(stored, format, 0.5, zero) == ends


@pytest.mark.backend
def test_the_quantizer_supports_every_operation_that_is_promised() -> None:
    """By its own table, for every kind of layer and every precision."""
    from ai_edge_quantizer import algorithm_manager, qtyping

    supported = 0
    for layer, name in itertools.product(EXPORTED, EXPORTED_PRECISIONS):
        precision = Precision.parse(name if layer.quantizes_input else name.partition("/")[0])
        stored = stored_as(layer, precision)
        if stored.mode == "float":
            continue
        algorithm = "float_casting" if stored.mode == "cast" else "min_max_uniform_quantize"
        config = qtyping.OpQuantizationConfig.from_dict(op_config(stored, precision))
        operation = qtyping.TFLOperationName(stored.operation)
        algorithm_manager.check_op_quantization_config(algorithm, operation, config)
        supported += 1
    assert supported > 60


@pytest.mark.backend
@pytest.mark.parametrize("precision", ["int8", "int4", "uint4", "int3", "int1", "fp16", "int8-tensor", "int4/uint8"])
def test_weights_in_the_file_are_the_plans_bit_for_bit(precision: str, tmp_path: Path) -> None:
    from search.backends.litert_model import LAYOUT

    task = TinyTask()
    plan = make_plan(task, precision)
    LiteRT().export(plan, task, tmp_path / "out")
    constants = dequantized((tmp_path / "out" / "model.tflite").read_bytes())
    simulated = plan.simulate(task.model)
    simulated.apply(plan.policy)
    for name in plan.network.names:
        values = simulated.weight(name).detach()
        layout = LAYOUT.get(operation_of(plan.network[name]), tuple(range(values.dim())))
        assert any(np.array_equal(values.permute(layout).numpy(), found) for found in constants), name


def dequantized(content: bytes) -> list[np.ndarray]:
    """Every constant of a .tflite model: codes, less the zero point, times the scale, all in float32."""
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils as flatbuffer

    model = flatbuffer.read_model(memoryview(content))
    found = []
    for tensor in model.subgraphs[0].tensors:
        data = model.buffers[tensor.buffer].data
        kind = {0: "<f4", 1: "<f2", 9: "i1", 17: "int4"}.get(tensor.type)
        if data is None or kind is None:
            continue
        raw = np.frombuffer(bytes(data), "u1" if kind == "int4" else kind)
        if kind == "int4":
            raw = (np.stack([raw & 15, raw >> 4], -1).astype(np.int8) ^ 8).flatten() - 8
            raw = raw[: int(np.prod(tensor.shape))]
        values = raw.reshape(tensor.shape).astype(np.float32)
        if tensor.quantization is not None and tensor.quantization.scale is not None:
            shape = [1] * values.ndim
            shape[tensor.quantization.quantizedDimension] = -1
            scale = np.asarray(tensor.quantization.scale, np.float32).reshape(shape)
            zero = np.asarray(tensor.quantization.zeroPoint, np.float32).reshape(shape)
            values = (values - zero) * scale
        found.append(values)
    return found


class Dotted(nn.Module):
    """Layers one and ten of a list, whose names differ in what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(11))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(10, shape, generator=torch.Generator().manual_seed(0))


def task_of(model: type[nn.Module], inputs: object) -> ModelTask:
    torch.manual_seed(0)
    return ModelTask(model(), inputs)


@pytest.mark.backend
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Dotted, images(6, 8)),
        (Recurrent, images(6, 4)),
        (Attention, images(6, 5, 16)),
        (Decoder, ids(6, 8)),
        (Tagger, ids(6, 7)),
    ],
)
def test_models_of_awkward_kinds_compute_the_simulations_outputs(
    model: type[nn.Module], inputs: torch.Tensor, tmp_path: Path
) -> None:
    """Names with dots, shared modules, tied weights, weights of LSTMs, and every other layer left in float."""
    task = task_of(model, inputs)
    precisions = itertools.cycle(["int8", "float", "int4"])
    plan = make_plan(task, lambda _, layer: "int8" if model is Decoder else next(precisions))
    LiteRT().export(plan, task, tmp_path / "out")
    found = LiteRT().verify(plan, task, tmp_path / "out")
    assert found.agreement == 1.0
    assert found.largest_difference < 1e-4
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert all(entry["regex"][0] == "^" and entry["regex"][-1] == "$" for entry in recipe)
    assert len({entry["regex"] for entry in recipe}) == len(recipe)
    assert "*" not in {entry["operation"] for entry in recipe}


@pytest.mark.backend
def test_layers_absent_from_the_plan_stay_in_float(tmp_path: Path) -> None:
    task = task_of(Dotted, images(6, 8))
    plan = make_plan(task, "int8")
    kept = plan.model_copy(update={"layers": plan.layers[:1]})
    LiteRT().write(kept, task, tmp_path, False)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert [entry["algorithm_key"] for entry in recipe] == ["min_max_uniform_quantize"]


class TwoInputsOneResult(TwoInputs):
    def forward(self, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(image, ids).logits


@pytest.mark.backend
def test_models_of_several_inputs_are_called_by_keyword(tmp_path: Path) -> None:
    task = task_of(TwoInputsOneResult, {"image": images(6, 1, 5, 5), "ids": ids(6)})
    plan = make_plan(task, "int8")
    LiteRT().export(plan, task, tmp_path / "out")
    found = LiteRT().verify(plan, task, tmp_path / "out")
    assert found.largest_difference < 1e-4


@pytest.mark.backend
def test_results_that_hold_no_tensor_are_refused(tmp_path: Path) -> None:
    """As those of a class that torch does not know how to open."""
    task = task_of(TwoInputs, {"image": images(6, 1, 5, 5), "ids": ids(6)})
    task.outputs = lambda model, batch: model(**batch).logits
    with pytest.raises(UnsupportedError, match="returns no tensor that torch"):
        LiteRT().export(make_plan(task, "int8"), task, tmp_path / "out")
