"""Brevitas' quantizers, made from the files, give the plan's own values; what they cannot give stays in float."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import SeparateBackendContract
from networks import Decoder, Recurrent, Tagger
from plans import ModelTask, make_plan
from safetensors.torch import load_file
from torch import nn

from hwmodels import Format, Layer, Precision
from search.backends.brevitas import Brevitas, apply, input_keywords, load, weight_keywords, write_artifact
from search.errors import UnsupportedError
from search.quantize.fold import fold_batch_norm
from search.quantize.simulate import QuantizedModel
from search.tasks.digits import Digits
from search.trace import trace

BACKEND = Brevitas()
LINEAR = Layer("fc", "linear", weight_shape=(16, 128))
CONV = Layer("conv", "conv2d", weight_shape=(8, 16, 3, 3), kernel=(3, 3), stride=(1, 1))

INTEGERS = ("int2", "int3", "int4", "int8", "int16", "int8-full", "int4-asym", "uint4", "uint8", "int4-tensor")
FLOATS = ("fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1", "fp8_e4m3-tensor")
GROUPS = ("int4-g9", "int4-g45", "int4-asym-g9", "int2-g5000", "fp8_e4m3-g9")
BLOCKS = ("mxfp4", "mxfp8_e4m3", "mxint8", "nvfp4")
INPUTS = ("uint8", "uint4", "int8", "int8-full", "int8-asym", "uint8-sym", "int16", "fp8_e4m3", "fp4_e2m1")


class TestContract(SeparateBackendContract):
    precision = "int3/uint6"
    agreement = 1.0

    @pytest.fixture
    def backend(self) -> Brevitas:
        return BACKEND


class Shared(nn.Module):
    """Layers of several kinds, one of them under two names in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleDict({"a[0]*": nn.Conv2d(8, 8, 3, groups=2), "up": nn.ConvTranspose2d(8, 6, 2, groups=2)})
        self.fc = nn.Linear(6, 6)
        self.again = nn.ModuleList([self.fc, nn.Linear(6, 6)])
        self.fc_too = self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.convs["up"](torch.relu(self.convs["a[0]*"](x))).mean((2, 3))
        return self.again[1](self.again[0](self.fc_too(self.fc(x))))


def simulated_of(model: nn.Module, inputs: Any) -> QuantizedModel:
    folded = fold_batch_norm(model.eval(), inputs).model
    simulated = QuantizedModel(folded, trace(folded, inputs))
    simulated.calibrate([inputs])
    return simulated


def test_one_entry_per_quantized_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    simulated = simulated_of(Shared(), torch.randn(4, 8, 6, 6))
    policy = {"convs.a[0]*": "int4/uint8", "convs.up": "int8/float", "fc": "nf4/int8", "again.1": "float/float"}
    write_artifact(simulated, {name: Precision.parse(text) for name, text in policy.items()}, tmp_path)
    channel, tensor = {"scaling_per_output_type": "channel"}, {"scaling_per_output_type": "tensor"}
    assert json.loads((tmp_path / "brevitas.json").read_text())["layers"] == {
        "convs.a[0]*": {
            "weight_quant": {"bit_width": 4, "signed": True, "narrow_range": True} | channel,
            "input_quant": {"bit_width": 8, "signed": False, "narrow_range": False} | tensor,
        },
        "convs.up": {"weight_quant": {"bit_width": 8, "signed": True, "narrow_range": True} | channel},
        "fc": {"input_quant": {"bit_width": 8, "signed": True, "narrow_range": True} | tensor},
    }
    assert {name: tuple(value.shape) for name, value in load_file(tmp_path / "ranges.safetensors").items()} == {
        "convs.a[0]*/weight_quant/scaling_init": (8, 1, 1, 1),
        "convs.a[0]*/input_quant/scaling_init": (),
        "convs.a[0]*/input_quant/zero_point_init": (),
        "convs.up/weight_quant/scaling_init": (1, 3, 1, 1),
        "fc/input_quant/scaling_init": (),
    }


@pytest.mark.parametrize("name", ["int1", "binary", "ternary", "nf4", "codebook4", "fp16", "uint16"])
def test_what_brevitas_has_no_quantizer_for_stays_in_float(name: str) -> None:
    said = BACKEND.express(LINEAR, Precision(Format.parse(name), Format.parse("uint8")))
    assert (said.weight, said.input, said.runs) == ("float", "exact", "float/uint8")
    assert name in said.note


def test_groups_are_of_whole_kernels() -> None:
    assert weight_keywords(CONV, Format.parse("int4-g32")) is None
    assert weight_keywords(CONV, Format.parse("int4-g36"))["group_size"] == 4
    assert weight_keywords(CONV, Format.parse("int4-g144"))["scaling_per_output_type"] == "channel"
    assert weight_keywords(LINEAR, Format.parse("mxfp4"))["group_size"] == 32


@pytest.mark.parametrize("name", ["int8-token", "int8-dynamic", "int8-g32", "mxfp8", "uint16"])
def test_ranges_found_at_run_time_stay_in_float(name: str) -> None:
    assert input_keywords(LINEAR, Format.parse(name)) is None


@pytest.mark.backend
class TestValues:
    """Every tensor that a quantizer of Brevitas returns is the simulation's, bit for bit."""

    @pytest.mark.parametrize("name", [*INTEGERS, *FLOATS, *GROUPS])
    @pytest.mark.parametrize("shape", [(27,), (8, 5, 5)])
    def test_weights(self, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
        self.check_weights(name, nn.Linear(27, 6) if len(shape) == 1 else nn.Conv2d(8, 6, 3), shape, tmp_path)

    @pytest.mark.parametrize("name", [*BLOCKS, "int4-g10"])
    def test_blocks_of_which_the_last_is_shorter(self, name: str, tmp_path: Path) -> None:
        self.check_weights(name, nn.Linear(72, 6), (72,), tmp_path)

    def check_weights(self, name: str, module: nn.Module, shape: tuple[int, ...], path: Path) -> None:
        torch.manual_seed(0)
        simulated = simulated_of(nn.Sequential(module), torch.randn(2, *shape))
        precision = Precision.parse(f"{name}/float")
        write_artifact(simulated, {"0": precision}, path)
        model = apply(simulated.fork().model, path)
        assert torch.equal(self.values(model[0].quant_weight()), simulated.quantized_weight("0", precision.weight))
        x = torch.randn(2, *shape)
        torch.testing.assert_close(model(x), simulated.apply({"0": precision})(x))

    @pytest.mark.parametrize("name", INPUTS)
    @pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (3, 8, 5, 5)])
    def test_inputs(self, name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
        torch.manual_seed(0)
        x = torch.randn(shape) + 0.3
        simulated = simulated_of(nn.Sequential(nn.Conv2d(8, 6, 3) if len(shape) == 4 else nn.Linear(8, 6)), x)
        precision = Precision.parse(f"float/{name}")
        write_artifact(simulated, {"0": precision}, tmp_path)
        quantizer = apply(simulated.fork().model, tmp_path)[0].input_quant
        for given in (x, 3 * x[:1], torch.zeros_like(x)):
            assert torch.equal(self.values(quantizer(given)), simulated.input_quantizer("0", precision.input)(given))

    def values(self, found: Any) -> torch.Tensor:
        values: torch.Tensor = found if type(found) is torch.Tensor else found.value
        return values.detach()


@pytest.mark.backend
class TestNetworks:
    @pytest.mark.parametrize(
        ("model", "inputs", "policy"),
        [
            (Decoder, lambda: torch.randint(0, 20, (4, 8)), "int4/uint8"),
            (lambda: nn.Linear(4, 3), lambda: torch.randn(6, 4), "int4/uint8"),
            (Recurrent, lambda: torch.randn(6, 4), "int4-asym/uint4"),
            (Tagger, lambda: torch.randint(0, 10, (4, 7)), "int8/uint8"),
            (
                Shared,
                lambda: torch.randn(8, 8, 6, 6),
                {"convs.a[0]*": "int4/uint8", "convs.up": "int3/int8", "fc": "int4/uint4", "again.1": "float"},
            ),
        ],
    )
    def test_computes_what_the_simulation_computes(self, model: Any, inputs: Any, policy: Any, tmp_path: Path) -> None:
        torch.manual_seed(0)
        task = ModelTask(model(), inputs())
        plan = make_plan(task, policy)
        report = BACKEND.export(plan, task, tmp_path)
        found = load(plan, task.model, tmp_path)
        in_float = [layer.name for layer in report.layers if layer.runs]
        assert in_float == [layer.name for layer in plan.layers if layer.kind == "lstm"]
        runs = make_plan(task, {name: str(precision) for name, precision in report.policy.items()})
        with torch.inference_mode():
            torch.testing.assert_close(found(task.example_input), runs.apply(task.model)(task.example_input))

    def test_a_module_with_two_names_is_replaced_once(self, tmp_path: Path) -> None:
        task = ModelTask(Shared(), torch.randn(8, 8, 6, 6))
        plan = make_plan(task, lambda _, layer: "float" if layer.name == "again.1" else "int4/uint8")
        BACKEND.export(plan, task, tmp_path)
        model: Any = load(plan, task.model, tmp_path)
        assert model.fc is model.fc_too is model.again[0]
        assert type(model.fc).__name__ == "QuantLinear"
        assert type(model.again[1]) is nn.Linear

    def test_every_layer_has_its_bits(self, tmp_path: Path) -> None:
        precisions = ["int2/uint4", "int4/uint8", "int8/int8", "float/uint8", "int3/float"]
        plan = make_plan(Digits(), lambda position, _: precisions[position % len(precisions)])
        BACKEND.export(plan, Digits(), tmp_path, strict=True)
        model = load(plan, Digits().model, tmp_path)
        for name, precision in plan.policy.items():
            layer: Any = model.get_submodule(name)
            for proxy, format in ((layer.weight_quant, precision.weight), (layer.input_quant, precision.input)):
                assert proxy.is_quant_enabled != format.is_float
                assert format.is_float or proxy.quant_injector.bit_width == format.bits
        found = BACKEND.verify(plan, Digits(), tmp_path)
        assert (found.agreement, found.quality, found.verdict) == (1, found.promised, "delivered")
        assert found.largest_difference < 1e-5

    def test_a_layer_with_a_forward_of_its_own_is_refused(self, tmp_path: Path) -> None:
        class Twice(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)

        task = ModelTask(nn.Sequential(Twice(4, 3)), torch.randn(8, 4))
        plan = make_plan(task, "int8/uint8")
        BACKEND.export(plan, task, tmp_path)
        with pytest.raises(UnsupportedError, match="no layer in place of Twice"):
            load(plan, task.model, tmp_path)
        with pytest.raises(UnsupportedError, match="finds no layer 0"):
            apply(nn.ReLU(), tmp_path)
