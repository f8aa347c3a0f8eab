"""ModelOpt's quantizers, set from the files, give the plan's own values; what they cannot give stays in float."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conformance import SeparateBackendContract
from networks import Decoder, Recurrent, Tagger
from plans import ModelTask, make_plan
from safetensors.torch import load_file
from tiny import TinyNet
from torch import nn

from hwmodels import Format, Layer, Precision
from search.backends.modelopt import ModelOpt, apply, input_quantizer, load, weight_quantizer, write_artifact
from search.errors import UnsupportedError
from search.quantize.fold import fold_batch_norm
from search.quantize.simulate import QuantizedModel
from search.quiet import quietly
from search.tasks.digits import Digits
from search.trace import trace

BACKEND = ModelOpt()
LINEAR = Layer("fc", "linear", weight_shape=(16, 128))
CONV = Layer("conv", "conv2d", weight_shape=(8, 16, 3, 3), kernel=(3, 3), stride=(1, 1))
POINTWISE = Layer("conv", "conv2d", weight_shape=(8, 16, 1, 1), kernel=(1, 1), stride=(1, 1))

INTEGERS = ("int2", "int3", "int4", "int8", "int16", "int8-full", "int4-asym", "uint4", "uint8")
WEIGHTS = (*INTEGERS, "int4-tensor", "int4-g9", "int4-g72", "int4-asym-g9", "int2-g5000", "fp8_e4m3", "fp8_e4m3-tensor")
INPUTS = ("uint8", "uint4", "int8", "int8-full", "int8-asym", "uint8-sym", "int16", "fp8_e4m3")
DYNAMIC = ("int8-token", "int8-dynamic", "fp8_e4m3-token", "int4-token")


class TestContract(SeparateBackendContract):
    precision = "int3/uint6"
    agreement = 1.0

    @pytest.fixture
    def backend(self) -> ModelOpt:
        return BACKEND


class Mixed(nn.Module):
    """Layers of several kinds, one of which has a name that a pattern would not mean literally."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleDict({"a[0]*": nn.Conv2d(8, 8, 3, groups=2), "up": nn.ConvTranspose2d(8, 6, 2, groups=2)})
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convs["up"](torch.relu(self.convs["a[0]*"](x)))
        return self.fc(x.mean((2, 3)))


def simulated_of(model: nn.Module, inputs: Any) -> QuantizedModel:
    folded = fold_batch_norm(model.eval(), inputs).model
    simulated = QuantizedModel(folded, trace(folded, inputs))
    simulated.calibrate([inputs])
    return simulated


def written(policy: dict[str, str], path: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    simulated = simulated_of(Mixed(), torch.randn(4, 8, 6, 6))
    write_artifact(simulated, {name: Precision.parse(text) for name, text in policy.items()}, path)
    config = yaml.safe_load((path / "modelopt.yaml").read_text())
    assert config["algorithm"] is None
    return config["quant_cfg"], load_file(path / "amax.safetensors")


def test_one_entry_per_quantizer_behind_one_that_turns_all_off(tmp_path: Path) -> None:
    policy = {"convs.a[0]*": "int4/uint8", "convs.up": "int8/float", "fc": "nf4/int8-token"}
    entries, ranges = written(policy, tmp_path)
    assert entries == [
        {"quantizer_name": "*", "enable": False},
        {
            "quantizer_name": "convs.a[[]0][*].weight_quantizer",
            "cfg": {"num_bits": 4, "narrow_range": True, "axis": 0},
        },
        {
            "quantizer_name": "convs.a[[]0][*].input_quantizer",
            "cfg": {
                "num_bits": 8,
                "narrow_range": False,
                "bias": {-5: None, -4: None, -3: None, -2: None, -1: None, "type": "static", "method": "max_min"},
            },
        },
        {"quantizer_name": "convs.up.weight_quantizer", "cfg": {"num_bits": 8, "narrow_range": True, "axis": 1}},
        {
            "quantizer_name": "fc.input_quantizer",
            "cfg": {"num_bits": 8, "narrow_range": True, "block_sizes": {-1: None, "type": "dynamic"}},
        },
    ]
    assert {name: tuple(value.shape) for name, value in ranges.items()} == {
        "convs.a[0]*.weight_quantizer._amax": (8, 1, 1, 1),
        "convs.a[0]*.input_quantizer._amax": (),
        "convs.a[0]*.input_quantizer._bias_value": (),
        "convs.up.weight_quantizer._amax": (1, 3, 1, 1),
    }


def test_float_layers_have_no_entry(tmp_path: Path) -> None:
    entries, ranges = written({name: "float/float" for name in ("convs.a[0]*", "convs.up", "fc")}, tmp_path)
    assert entries == [{"quantizer_name": "*", "enable": False}]
    assert not ranges


@pytest.mark.parametrize(
    "name", ["int1", "binary", "ternary", "nf4", "codebook4", "fp16", "fp8_e5m2", "mxfp4", "nvfp4"]
)
def test_what_modelopt_has_no_quantizer_for_stays_in_float(name: str) -> None:
    said = BACKEND.express(LINEAR, Precision(Format.parse(name), Format.parse("uint8")))
    assert (said.weight, said.input, said.runs) == ("float", "exact", "float/uint8")
    assert name in said.note
    assert ("CUDA" in said.note) == (name in ("mxfp4", "nvfp4"))


def test_groups_that_are_no_blocks_stay_in_float() -> None:
    g32 = Format.parse("int4-g32")
    assert weight_quantizer(CONV, g32) is None
    assert weight_quantizer(CONV, Format.parse("int4-g36"))["block_sizes"] == {1: 4, 2: 3, 3: 3}
    assert weight_quantizer(POINTWISE, Format.parse("int4-g8"))["block_sizes"] == {1: 8, 2: 1, 3: 1}
    assert weight_quantizer(POINTWISE, g32) == {"num_bits": 4, "narrow_range": True, "axis": 0}
    assert weight_quantizer(LINEAR, g32)["block_sizes"] == {-1: 32}
    embedding = Layer("ids", "embedding", weight_shape=(50, 64), quantizes_input=False)
    assert weight_quantizer(embedding, g32)["block_sizes"] == {-1: 32}


@pytest.mark.parametrize("name", ["uint8-token", "int8-asym-token", "int8-g32", "uint8-sym-token", "uint16", "mxfp8"])
def test_inputs_that_modelopt_cannot_reproduce_stay_in_float(name: str) -> None:
    assert input_quantizer(LINEAR, Format.parse(name)) is None


def test_ranges_of_its_own_are_altered_and_said(tmp_path: Path) -> None:
    task = ModelTask(nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4))
    report = BACKEND.export(make_plan(task, "int4/uint8"), task, tmp_path / "out", recalibrate=True)
    [layer] = report.layers
    assert (layer.weight, layer.input, layer.runs) == ("altered", "altered", "int4/uint8")
    assert "max" in layer.note
    assert not (tmp_path / "out" / "amax.safetensors").exists()
    assert yaml.safe_load((tmp_path / "out" / "modelopt.yaml").read_text())["algorithm"] == "max"


@pytest.mark.backend
class TestValues:
    """Every tensor that a quantizer of ModelOpt returns is the simulation's."""

    @pytest.mark.parametrize("name", WEIGHTS)
    @pytest.mark.parametrize("shape", [(6, 27), (6, 8, 3, 3)])
    def test_weights(self, name: str, shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        module = nn.Linear(27, 6) if len(shape) == 2 else nn.Conv2d(8, 6, 3)
        simulated = simulated_of(nn.Sequential(module), torch.randn(2, *((27,) if len(shape) == 2 else (8, 5, 5))))
        format = Format.parse(name)
        quantizer = self.quantizer(
            weight_quantizer(simulated.network["0"], format), simulated, f"{name}/float", "weight"
        )
        expected = simulated.quantized_weight("0", format)
        close = 1e-6 * expected.abs().max().item()
        for given in (expected, simulated.float_weight("0")):
            torch.testing.assert_close(quantizer(given), expected, rtol=0, atol=close)
        assert not quantizer(torch.zeros(shape)).any(), "zero must stay zero"

    @pytest.mark.parametrize("name", [*INPUTS, *DYNAMIC])
    @pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (3, 8, 5, 5)])
    def test_inputs(self, name: str, shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        x = torch.randn(shape) + 0.3
        module = nn.Conv2d(8, 6, 3) if len(shape) == 4 else nn.Linear(8, 6)
        simulated = simulated_of(nn.Sequential(module), x)
        format = Format.parse(name)
        quantizer = self.quantizer(input_quantizer(simulated.network["0"], format), simulated, f"float/{name}", "input")
        for given in (x, 3 * x[:1]):  # another batch size, and values beyond the range
            expected = simulated.input_quantizer("0", format)(given)
            torch.testing.assert_close(quantizer(given), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
        assert not quantizer(torch.zeros_like(x)).any(), "zero must stay zero"

    def quantizer(self, config: Any, simulated: QuantizedModel, precision: str, side: str) -> Any:
        with quietly("modelopt", "torch"):
            from modelopt.torch.quantization.config import QuantizerAttributeConfig
            from modelopt.torch.quantization.nn import TensorQuantizer
        quantizer = TensorQuantizer(QuantizerAttributeConfig(**config))
        with tempfile.TemporaryDirectory() as folder:
            write_artifact(simulated, {"0": Precision.parse(precision)}, Path(folder))
            for name, value in load_file(Path(folder) / "amax.safetensors").items():
                assert name.startswith(f"0.{side}_quantizer._")
                setattr(quantizer, name.rpartition(".")[2].removeprefix("_"), value)
        return quantizer


@pytest.mark.backend
class TestNetworks:
    @pytest.mark.parametrize(
        ("model", "inputs", "policy"),
        [
            (
                Mixed,
                lambda: torch.randn(8, 8, 6, 6),
                {"convs.a[0]*": "int4/uint8", "convs.up": "int3/int8", "fc": "int8"},
            ),
            (Decoder, lambda: torch.randint(0, 20, (4, 8)), "int4/uint8"),
            (lambda: nn.Linear(4, 3), lambda: torch.randn(6, 4), "int4/uint8"),
            (Recurrent, lambda: torch.randn(6, 4), "int4-asym/uint4"),
            (Tagger, lambda: torch.randint(0, 10, (4, 7)), "int8/uint8"),
        ],
    )
    def test_computes_what_the_simulation_computes(self, model: Any, inputs: Any, policy: Any, tmp_path: Path) -> None:
        torch.manual_seed(0)
        task = ModelTask(model(), inputs())
        plan = make_plan(task, policy)
        report = BACKEND.export(plan, task, tmp_path / "out")
        found = BACKEND.verify(plan, task, tmp_path / "out")
        assert found.agreement == 1
        assert found.largest_difference < 1e-4
        assert [layer.name for layer in report.layers if layer.faults] == [
            layer.name for layer in plan.layers if layer.kind == "lstm"
        ]

    def test_digits_in_mixed_precision(self, tmp_path: Path) -> None:
        precisions = ["int2/uint4", "int4/uint8", "int8/int8", "float/uint8", "int3/float", "fp8_e4m3/fp8_e4m3"]
        plan = make_plan(Digits(), lambda position, _: precisions[position % len(precisions)])
        BACKEND.export(plan, Digits(), tmp_path / "out", strict=True)
        found = BACKEND.verify(plan, Digits(), tmp_path / "out")
        assert (found.agreement, found.quality) == (1, found.promised)
        assert found.verdict == "delivered"
        model = load(plan, Digits().model, tmp_path / "out")
        assert model.get_submodule(plan.layers[0].name).weight_quantizer.num_bits == 2

    def test_calibrates_itself_where_asked_to(self, tmp_path: Path) -> None:
        plan = make_plan(Digits(), "int8/uint8")
        BACKEND.export(plan, Digits(), tmp_path / "out", recalibrate=True)
        found = BACKEND.verify(plan, Digits(), tmp_path / "out")
        assert found.agreement > 0.98
        assert found.quality > 0.95

    def test_a_layer_that_modelopt_does_not_know_is_refused(self, tmp_path: Path) -> None:
        task = ModelTask(TinyNet(), torch.randn(4, 1, 6, 6))
        plan = make_plan(task, "int8/uint8")
        BACKEND.export(plan, task, tmp_path / "out")
        config = tmp_path / "out" / "modelopt.yaml"
        config.write_text(config.read_text().replace("left.", "lost."))
        with pytest.raises(UnsupportedError, match=r"no quantizer lost\.weight_quantizer: lost is missing"):
            apply(fold_batch_norm(task.model, task.example_input).model, tmp_path / "out")
