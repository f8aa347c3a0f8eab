"""What the Core ML backend writes is one entry for every weight, and what coremltools makes of it is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conformance import EmitterContract
from networks import Attention, Decoder, Recurrent, Tagger
from plans import ModelTask, make_plan
from torch import Tensor, nn

from hwmodels import Layer, Precision
from search.backends.coreml import CODEBOOK_BITS, CoreML, convert
from search.backends.outcome import ExportReport, Validation
from search.errors import DataError, UnsupportedError
from search.plan import Plan
from search.tasks.digits import Digits

LINEAR, CONV = Layer("a", "linear", weight_shape=(16, 128)), Layer("b", "conv2d", weight_shape=(8, 16, 3, 3))
UP = Layer("c", "conv_transpose2d", weight_shape=(8, 16, 2, 2), channel_axis=1)
SMALL = Layer("d", "linear", weight_shape=(3, 3))
FORMATS = ["int4", "int8", "uint4", "int4-asym", "uint8", "int8-tensor", "codebook3", "float", "codebook6-channel"]


class Every(nn.Module):
    """A layer of every kind that Core ML tells apart, two of them under names with dots."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.grouped = nn.Conv1d(3, 4, 3), nn.Conv2d(4, 8, 3, groups=4)
        self.up, self.volume = nn.ConvTranspose2d(8, 6, 2), nn.Conv3d(1, 2, 3, padding=1)
        self.heads = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(96, 16)]), "b_0": nn.Linear(16, 4, bias=False)})
        self.small = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.line(x).unsqueeze(2).repeat(1, 1, 5, 1)
        x = self.volume(self.up(self.grouped(x)).unsqueeze(1)).mean(1)
        return self.small(self.heads["b_0"](self.heads["a"][0](x.flatten(1))))


def every() -> ModelTask:
    torch.manual_seed(0)
    return ModelTask(Every(), torch.randn(4, 3, 7))


def exported(task: Any, policy: Any, path: Path) -> tuple[Plan, ExportReport]:
    plan = make_plan(task, policy)
    return plan, CoreML().export(plan, task, path)


def entries(path: Path, file: str = "quantize.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((path / file).read_text())["op_name_configs"]
    return found


class TestCoreML(EmitterContract):
    precision = "int4"

    @pytest.fixture
    def backend(self):
        return CoreML()


@pytest.mark.parametrize(
    ("layer", "planned", "runs"),
    [
        (LINEAR, "int4", "int4"),
        (LINEAR, "int4-g32", "int4-g32"),
        (LINEAR, "int4-asym-g32", "int4-asym-g32"),
        (LINEAR, "int4-g128", "int4"),
        (LINEAR, "int4-g48", "int4"),
        (CONV, "int4-g36", "int4-g36"),
        (CONV, "int4-g32", "int4"),
        (UP, "uint8-g8", "uint8-g8"),
        (LINEAR, "int3", "int4"),
        (LINEAR, "int8-full", "int8"),
        (CONV, "uint6-tensor", "uint8-tensor"),
        (CONV, "codebook3", "codebook3"),
        (CONV, "codebook5-channel", "codebook6-channel"),
        (CONV, "int1", "float"),
        (CONV, "ternary", "float"),
        (SMALL, "int8", "float"),
        (CONV, "mxfp4", "float"),
    ],
)
def test_the_nearest_that_core_ml_has(layer: Layer, planned: str, runs: str) -> None:
    said = CoreML().express(layer, Precision.parse(f"{planned}/uint8"))
    assert said.runs == f"{runs}/float"
    assert said.weight == ("float" if runs == "float" else "altered")
    assert "input stays" in said.note


@pytest.mark.parametrize("weight", ["int4-g32", "uint8", "int8-tensor", *(f"codebook{bits}" for bits in CODEBOOK_BITS)])
def test_a_search_keeps_what_core_ml_stores_under_scales_of_its_own(weight: str) -> None:
    assert CoreML().refuses(LINEAR, Precision.parse(weight)) is None
    assert "input" in str(CoreML().refuses(LINEAR, Precision.parse(f"{weight}/uint8")))
    assert "int4" in str(CoreML().refuses(LINEAR, Precision.parse("int3")))


def test_every_weight_has_one_entry_in_one_file_and_null_in_the_other(tmp_path: Path) -> None:
    plan, _ = exported(every(), lambda position, _: FORMATS[position], tmp_path)
    names = json.loads((tmp_path / "constants.json").read_text())
    assert list(names) == list(plan.policy)
    assert names["heads.a.0"] == "p_heads_a_0_weight_to_fp16"
    linear, palettes = entries(tmp_path), entries(tmp_path, "palettize.yaml")
    assert set(linear) == set(palettes) == set(names.values())
    for layer, precision in plan.policy.items():
        runs = CoreML().express(plan.network[layer], precision).runs
        where = [linear[names[layer]] is not None, palettes[names[layer]] is not None]
        assert where == [runs.startswith(("int", "uint")), runs.startswith("codebook")]


def test_layers_that_share_a_weight_share_its_constant(tmp_path: Path) -> None:
    task = ModelTask(Decoder(), torch.randint(0, 20, (4, 8)))
    policy = {name: "int4" for name in make_plan(task, "float").policy}
    exported(task, policy, tmp_path / "same")
    names = json.loads((tmp_path / "same" / "constants.json").read_text())
    assert names["embedding"] == names["decoder"]
    with pytest.raises(UnsupportedError, match="same weight format"):
        exported(task, policy | {"embedding": "int8"}, tmp_path / "other")


def test_a_layer_that_is_called_three_times_has_one_constant(tmp_path: Path) -> None:
    exported(ModelTask(Recurrent(), torch.randn(6, 4)), "int8", tmp_path)
    assert len(entries(tmp_path)) == 1


def test_weights_of_recurrent_modules_stay_in_float(tmp_path: Path) -> None:
    plan, report = exported(ModelTask(Tagger(), torch.randint(0, 10, (4, 6))), "int8", tmp_path)
    assert {layer.name for layer in report.layers if layer.weight == "altered"} == {"embedding", "head"}
    assert set(CoreML().read(tmp_path)) == {"embedding", "head"}
    assert len(plan.layers) == 10


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("quantize.yaml", "config_type: OpLinearQuantizerConfig\nglobal_config: {}\n", "global_config"),
        ("palettize.yaml", "config_type: [", "damaged"),
        ("constants.json", "[]", "damaged"),
    ],
)
def test_files_of_another_schema_are_refused(file: str, content: str, reason: str, tmp_path: Path) -> None:
    exported(every(), "int4", tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=reason):
        CoreML().read(tmp_path)


@pytest.mark.backend
class TestWithCoremltools:
    """coremltools converts the network and applies the files; every weight is looked at."""

    @pytest.mark.parametrize("shift", range(len(FORMATS)))
    def test_every_format_of_every_kind_of_layer(self, shift: int, tmp_path: Path) -> None:
        task = every()
        plan, _ = exported(task, lambda position, _: FORMATS[(position + shift) % len(FORMATS)], tmp_path)
        found = CoreML().verify(plan, task, tmp_path)
        assert isinstance(found, Validation)
        compressed = len(CoreML().read(tmp_path))
        assert f"{compressed} of the {compressed} compressed weights hold the simulation's values" in found.checks[-1]

    @pytest.mark.parametrize("weight", ["int4-g8", "uint4-g4", "int8"])
    def test_a_transformer_and_tied_weights(self, weight: str, tmp_path: Path) -> None:
        for task in (ModelTask(Decoder(), torch.randint(0, 20, (4, 8))), ModelTask(Attention(), torch.randn(2, 5, 16))):
            plan, _ = exported(task, weight, tmp_path)
            assert isinstance(CoreML().verify(plan, task, tmp_path), Validation)

    def test_digits(self, tmp_path: Path) -> None:
        plan, _ = exported(Digits(), lambda position, _: FORMATS[position % len(FORMATS)], tmp_path)
        found = CoreML().verify(plan, Digits(), tmp_path)
        assert isinstance(found, Validation)
        assert found.by.startswith("coremltools 9")

    def test_the_program_can_be_saved(self, tmp_path: Path) -> None:
        task = every()
        plan, _ = exported(task, "int4", tmp_path / "out")
        program = convert(plan, task.model, task.example_input, tmp_path / "out")
        program.save(str(tmp_path / "model.mlpackage"))
        assert (tmp_path / "model.mlpackage" / "Manifest.json").is_file()

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # its own temporary folder
    def test_a_model_that_coremltools_cannot_convert_is_named(self, tmp_path: Path) -> None:
        task = ModelTask(Tagger(), torch.randint(0, 10, (4, 6)))
        plan, _ = exported(task, "int8", tmp_path)
        with pytest.raises(UnsupportedError, match="Tagger"):
            CoreML().verify(plan, task, tmp_path)
