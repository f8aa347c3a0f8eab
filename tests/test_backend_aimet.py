"""What the AIMET backend writes are the plan's own scales, and AIMET computes the simulation's values from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import SeparateBackendContract
from networks import Decoder, Recurrent, Tagger
from plans import ModelTask, make_plan
from torch import Tensor, nn

from hwmodels import Layer, Precision
from search.backends.aimet import FILE, Aimet, load, read
from search.backends.outcome import ExportReport, Verification
from search.errors import DataError
from search.plan import Plan
from search.quiet import quietly
from search.tasks.digits import Digits

LINEAR, CONV = Layer("a", "linear", weight_shape=(16, 128)), Layer("b", "conv2d", weight_shape=(8, 16, 3, 3))
WEIGHTS = ["int4", "int3-asym", "uint5", "int8-tensor", "int16", "int2", "uint8-tensor", "float", "int4-g8"]
INPUTS = ["uint8", "int8-full", "int6-asym", "uint8-sym", "uint16", "float"]


class Every(nn.Module):
    """A layer of every kind, one of them called twice under two names, and names with dots."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.grouped = nn.Conv1d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=4)
        self.up, self.volume = nn.ConvTranspose2d(8, 6, 2), nn.Conv3d(1, 2, 3, padding=1)
        self.heads = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(96, 16)]), "b_0": nn.Linear(16, 16, bias=False)})
        self.again, self.small = self.heads["b_0"], nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.line(x).unsqueeze(2).repeat(1, 1, 5, 1)
        x = self.volume(self.up(self.grouped(x)).unsqueeze(1)).mean(1)
        return self.small(self.again(torch.relu(self.heads["b_0"](self.heads["a"][0](x.flatten(1))))))


def every() -> ModelTask:
    torch.manual_seed(0)
    return ModelTask(Every(), torch.randn(4, 3, 7))


def mixed(position: int, _: Layer) -> str:
    return f"{WEIGHTS[position % len(WEIGHTS)]}/{INPUTS[position % len(INPUTS)]}"


def exported(task: Any, policy: Any, path: Path) -> tuple[Plan, ExportReport]:
    plan = make_plan(task, policy)
    return plan, Aimet().export(plan, task, path)


class TestAimet(SeparateBackendContract):
    @pytest.fixture
    def backend(self):
        return Aimet()


@pytest.mark.parametrize(
    ("layer", "planned", "weight", "input_", "runs"),
    [
        (LINEAR, "int4/uint8", "exact", "exact", ""),
        (LINEAR, "int16-asym/uint16", "exact", "exact", ""),
        (LINEAR, "int4-g32/float", "exact", "float", ""),
        (LINEAR, "int4-g128/float", "exact", "float", ""),
        (LINEAR, "int4-g48/float", "contained", "float", ""),
        (CONV, "int4-g36/float", "exact", "float", ""),
        (CONV, "int4-g32/float", "contained", "float", ""),
        (CONV, "int1/uint8", "contained", "exact", ""),
        (CONV, "codebook4/int8-full", "contained", "exact", ""),
        (CONV, "int8/int8", "exact", "altered", "int8/int8-full"),
        (LINEAR, "int8/int8-token", "exact", "float", "int8/float"),
        (LINEAR, "float/fp8_e4m3", "float", "float", "float/float"),
    ],
)
def test_what_becomes_of_a_layer(layer: Layer, planned: str, weight: str, input_: str, runs: str) -> None:
    said = Aimet().express(layer, Precision.parse(planned))
    assert (said.weight, said.input, said.runs) == (weight, input_, runs)


def test_the_file_holds_the_plans_ranges_under_the_models_names(tmp_path: Path) -> None:
    plan, _ = exported(every(), mixed, tmp_path)
    found = {encoding.name: encoding for encoding in read(tmp_path)}
    parameters = dict(plan.apply(every().model).named_parameters(remove_duplicate=False))
    for layer, precision in plan.policy.items():
        if precision.weight.is_float:
            assert f"{layer}.weight" not in found
        else:
            encoding, scale = found[f"{layer}.weight"], plan.ranges.weights[layer, precision.weight]["scale"]
            assert encoding.name in parameters
            assert encoding.output_dtype == str(precision.weight.base).split("-")[0]
            assert torch.equal(
                torch.tensor(encoding.y_scale).movedim(0, 0).flatten().sort()[0], scale.flatten().sort()[0]
            )
            assert (encoding.y_zero_point is None) != precision.weight.has_zero_point
        assert (f"{layer}.input" in found) != precision.input.is_float
        if not precision.input.is_float:
            range_ = plan.ranges.inputs[layer, precision.input]
            encoding = found[f"{layer}.input"]
            assert (encoding.y_scale, encoding.y_zero_point or 0) == (range_.scale, range_.zero_point)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"version": "1.0.0", "encodings": []}', "2.1.0"),
        ('{"version": "2.1.0", "encodings": [{"name": "a", "output_dtype": "int1", "y_scale": 1}]}', "output_dtype"),
        ('{"version": "2.1.0", "encodings": [{"name": "a", "output_dtype": "int4", "y_scale": 1, "bw": 4}]}', "bw"),
        ("{", "damaged"),
    ],
)
def test_a_file_of_another_schema_is_refused(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DataError, match=reason):
        read(tmp_path)


def test_a_layer_that_is_called_three_times_has_one_encoding_a_side(tmp_path: Path) -> None:
    exported(ModelTask(Recurrent(), torch.randn(6, 4)), "int8/uint8", tmp_path)
    assert [encoding.name for encoding in read(tmp_path)] == ["first.weight", "first.input"]


def test_weights_of_recurrent_modules_have_none(tmp_path: Path) -> None:
    _, report = exported(ModelTask(Tagger(), torch.randint(0, 10, (4, 6))), "int8/uint8", tmp_path)
    assert {encoding.name for encoding in read(tmp_path)} == {"embedding.weight", "head.weight", "head.input"}
    assert {layer.weight for layer in report.layers if layer.name.startswith("lstm")} == {"contained"}


@pytest.mark.backend
@pytest.mark.filterwarnings("ignore:.*_allow_overwrite is deprecated")  # AIMET's own use of it
class TestWithAimet:
    """AIMET's own quantizers, set from the file."""

    @pytest.mark.parametrize("shift", range(len(WEIGHTS)))
    def test_weights_and_outputs_are_the_simulations(self, shift: int, tmp_path: Path) -> None:
        task = every()
        plan, _ = exported(task, lambda position, layer: mixed(position + shift, layer), tmp_path)
        loaded, simulated = load(plan, task.model, tmp_path), plan.apply(task.model)
        expected = dict(simulated.named_parameters(remove_duplicate=False))
        for name, module in loaded.named_modules(remove_duplicate=False):
            for parameter, quantizer in getattr(module, "param_quantizers", {}).items():
                if quantizer is not None:
                    values = quantizer(module.get_parameter(parameter)).as_subclass(Tensor)
                    torch.testing.assert_close(values, expected[f"{name}.{parameter}"], rtol=1e-6, atol=0)
        with torch.inference_mode():
            torch.testing.assert_close(loaded(task.example_input), simulated(task.example_input), rtol=1e-4, atol=1e-4)

    def test_tied_weights_under_formats_of_their_own(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        task = ModelTask(Decoder(), torch.randint(0, 20, (4, 8)))
        plan, _ = exported(task, "int4-g8/uint8", tmp_path)
        with torch.inference_mode():
            found, expected = (
                made(task.example_input) for made in (load(plan, task.model, tmp_path), plan.apply(task.model))
            )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_digits_in_a_fresh_process(self, tmp_path: Path) -> None:
        plan, _ = exported(Digits(), mixed, tmp_path)
        found = Aimet().verify(plan, Digits(), tmp_path)
        assert isinstance(found, Verification)
        assert found.agreement >= 0.995
        assert abs(found.quality - plan.quality.value) <= 2 / found.samples

    def test_aimet_exports_the_very_encodings(self, tmp_path: Path) -> None:
        task = every()
        plan, _ = exported(task, "int4/uint8", tmp_path / "out")
        model = load(plan, task.model, tmp_path / "out")
        with quietly("aimet", "Quant", "torch"):
            import aimet_torch

            sim = aimet_torch.QuantizationSimModel(task.model, task.example_input)
            sim.model = model
            where = str(tmp_path / "model.onnx")
            sim.onnx.export(
                (task.example_input,), where, opset_version=21, dynamo=True, verbose=False, encoding_version="2.1.0"
            )
        theirs = {one["name"]: one for one in json.loads((tmp_path / "model.encodings").read_text())["encodings"]}
        seen = 0
        for ours in read(tmp_path / "out"):
            if ours.name in theirs:
                seen += 1
                assert theirs[ours.name]["output_dtype"] == ours.output_dtype
                assert theirs[ours.name]["axis"] == ours.axis
                torch.testing.assert_close(torch.tensor(theirs[ours.name]["y_scale"]), torch.tensor(ours.y_scale))
        assert seen >= len(plan.layers) - 1  # a module under two names has one of them in ONNX
