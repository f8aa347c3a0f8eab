"""What torchao carries is the plan's own weights, and what it cannot carry is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Decoder
from plans import ModelTask, make_plan
from torch import Tensor, nn

from hwmodels import Format
from search.backends import backend
from search.backends.outcome import ExportReport
from search.backends.realize import simulate
from search.errors import DataError, UnsupportedError
from search.plan import Plan
from search.tasks.digits import Digits

torchao = pytest.importorskip("torchao")

BACKEND = backend("torchao")
WEIGHTS = ["int8", "int4", "int3", "int2", "int5", "float", "int16"]


def exported(task: Any, policy: Any, path: Path) -> tuple[Plan, ExportReport]:
    plan = make_plan(task, policy)
    return plan, BACKEND.export(plan, task, path)


def loaded(plan: Plan, model: nn.Module, path: Path) -> nn.Module:
    from search.backends.torchao import load

    return load(plan, model, path)


WEIGHT_FORMATS = [
    *("int8", "int7", "int6", "int5", "int4", "int3", "int2", "int1", "int8-full", "int4-asym", "uint4", "uint8"),
    *("uint8-sym", "uint1", "int8-tensor", "int4-g4", "int2-asym-g8", "uint4-g16", "int3-g99"),
]


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_torchaos_weights_are_the_simulations(kind: str, format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = {
        "linear": (nn.Linear(16, 6), torch.randn(4, 16)),
        "conv2d": (nn.Conv2d(4, 6, 2), torch.randn(4, 4, 5, 5)),
        "embedding": (nn.Embedding(12, 16), torch.randint(0, 12, (4, 3))),
    }[kind]
    task = ModelTask(nn.Sequential(model), x)
    plan, report = exported(task, f"{format}/float", tmp_path)
    weight: Any = loaded(plan, task.model, tmp_path)[0].weight
    expected = plan.simulate(task.model).model[0].weight
    assert torch.equal(weight.dequantize(), expected)
    assert weight.qdata.dtype == torch.int8
    assert report.layers[0].weight == ("exact" if "8" in format.split("-")[0] else "contained")
    assert report.layers[0].compute == "fp32"


INPUTS = {
    **{static: "exact" for static in ("uint8", "int8-asym", "int8-full", "uint8-sym", "uint8-tensor")},
    **{dynamic: "exact" for dynamic in ("uint8-token", "int8-asym-token", "int8-full-token")},
    **{narrow: "altered" for narrow in ("int8", "uint6", "int4", "uint4-sym", "int8-token", "int8-dynamic", "int4-g8")},
}


@pytest.mark.parametrize("input_", INPUTS)
@pytest.mark.parametrize("weight", ["int8", "int4-full", "int1", "int8-tensor"])
def test_inputs_of_linear_layers_are_multiplied_as_int8(weight: str, input_: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ModelTask(nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(6, 3, 40))
    plan, report = exported(task, f"{weight}/{input_}", tmp_path)
    assert {layer.input for layer in report.layers} == {INPUTS[input_]}
    assert {layer.compute for layer in report.layers} == {"int8"}
    found = loaded(plan, task.model, tmp_path)(task.example_input)
    expected = simulate(plan, task, report.policy).model(task.example_input)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - task.model(task.example_input)).abs().max() > 1e-4  # it is quantized


@pytest.mark.parametrize("weight", ["int4-g8", "int4-asym", "uint8"])
def test_weights_in_groups_take_inputs_by_token(weight: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ModelTask(nn.Sequential(nn.Linear(40, 16), nn.Linear(16, 5)), torch.randn(6, 3, 40))
    plan, report = exported(task, {"0": f"{weight}/int8-asym-token", "1": f"{weight}/int8-token"}, tmp_path)
    assert [layer.input for layer in report.layers] == ["exact", "altered"]
    assert [layer.runs for layer in report.layers] == ["", f"{weight}/int8-asym-token"]
    assert {layer.compute for layer in report.layers} == {"fp32"}
    expected = simulate(plan, task, report.policy).model(task.example_input)
    found = loaded(plan, task.model, tmp_path)(task.example_input)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "note"),
    [
        ("int4-g8/uint8", "torchao takes no uint8 input beside an int4-g8 weight"),
        ("int8/uint16", "torchao takes no uint16 input"),
        ("int8/fp8_e4m3", "torchao takes no fp8_e4m3 input"),
        ("float/uint8", "torchao takes no uint8 input beside a float weight"),
    ],
)
def test_what_torchao_cannot_quantize_stays_in_float(precision: str, note: str, tmp_path: Path) -> None:
    task = ModelTask(nn.Sequential(nn.Linear(16, 3)), torch.randn(8, 16))
    plan, report = exported(task, precision, tmp_path)
    [layer] = report.layers
    assert (layer.input, layer.runs) == ("float", f"{precision.split('/')[0]}/float")
    assert note in layer.note
    weights_alone = make_plan(task, layer.runs).apply(task.model)(task.example_input)
    torch.testing.assert_close(loaded(plan, task.model, tmp_path)(task.example_input), weights_alone)


def test_convolutions_say_that_their_inputs_stay_in_float(tmp_path: Path) -> None:
    task = ModelTask(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)), torch.randn(8, 2, 4, 4))
    _, report = exported(task, "int8/uint8", tmp_path)
    assert [(layer.input, layer.compute) for layer in report.layers] == [("float", "fp32"), ("exact", "int8")]
    assert "linear layers only, not of conv2d" in report.layers[0].note


@pytest.mark.parametrize(
    ("shape", "format", "expected"),
    [
        ((8, 64), "int4", (1, 64)),
        ((8, 64), "int4-g32", (1, 32)),
        ((8, 27), "int4-g32", (1, 27)),
        ((8, 40), "int4-g32", None),
        ((8, 16, 3, 3), "int4-g36", (1, 4, 3, 3)),
        ((8, 16, 3, 3), "int4-g32", None),
        ((8, 16, 4, 4), "int4-g8", (1, 1, 2, 4)),
        ((8, 64, 1, 1), "int4-g32", (1, 32, 1, 1)),
    ],
)
def test_groups_are_blocks_of_the_weight(shape: Any, format: str, expected: Any) -> None:
    from search.backends.torchao_tensors import blocks

    assert blocks(shape, Format.parse(format)) == expected


class TestDigits:
    """A mixed plan for the digits task, its inputs in float, from end to end."""

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, ExportReport, Path]:
        path = tmp_path_factory.mktemp("digits")
        return *exported(Digits(), lambda position, _: WEIGHTS[position % len(WEIGHTS)], path), path

    def test_the_fresh_process_computes_what_the_simulation_computes(self, made: Any) -> None:
        plan, report, path = made
        found = BACKEND.verify(plan, Digits(), path)
        assert found.agreement == 1
        assert found.largest_difference < 1e-3
        assert found.quality == found.promised == plan.quality.value
        assert [latency.name for latency in found.latencies] == ["plan", "float", "int8"]
        assert found.bytes_on_disk == sum(file.stat().st_size for file in report.files)
        assert found.layers == report.layers

    def test_loading_gives_the_plans_weights(self, made: Any) -> None:
        plan, _, path = made
        model, simulated = loaded(plan, Digits().model, path), plan.apply(Digits().model)
        for (name, weight), expected in zip(model.named_parameters(), simulated.parameters(), strict=True):
            values: Tensor = weight.dequantize() if hasattr(weight, "dequantize") and weight.dim() > 1 else weight
            torch.testing.assert_close(values.detach(), expected.detach(), rtol=0, atol=0, msg=name)

    def test_every_weight_is_labelled(self, made: Any) -> None:
        plan, report, _ = made
        for layer, precision in zip(report.layers, plan.policy.values(), strict=True):
            weight = str(precision.weight)
            assert layer.weight == {"float": "float", "int8": "exact"}.get(weight, "contained")
            assert layer.input == "float"
            assert ("int8" in layer.note) == (weight in ("int2", "int3", "int4", "int5"))
            assert ("float32" in layer.note) == (weight == "int16")

    def test_the_configuration_is_one_torchao_reads(self, made: Any) -> None:
        from torchao.core.config import config_from_dict

        plan, _, path = made
        config = config_from_dict(json.loads((path / "torchao.json").read_text())["config"])
        parts = {name: part and part.weight_dtype for name, part in config.fqn_to_config.items()}
        widths = {name: getattr(torch, str(precision.weight), None) for name, precision in plan.policy.items()}
        assert parts == {name: None if width in (torch.float, torch.int16) else width for name, width in widths.items()}

    def test_another_plan_is_refused(self, made: Any) -> None:
        _, _, path = made
        with pytest.raises(DataError, match="export it again"):
            BACKEND.verify(make_plan(Digits(), "int8/uint8"), Digits(), path)


def test_weights_torchao_has_no_tensor_for_keep_their_values_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(24, 3))
    task = ModelTask(model, torch.randn(8, 2, 8))
    plan, report = exported(task, "int4/float", tmp_path)
    assert [layer.weight for layer in report.layers] == ["contained", "contained"]
    assert ["float32" in layer.note for layer in report.layers] == [True, False]
    expected = plan.apply(model)(task.example_input)
    torch.testing.assert_close(loaded(plan, model, tmp_path)(task.example_input), expected)


def test_an_embedding_and_the_decoder_that_shares_its_weight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ModelTask(Decoder(), torch.randint(0, 20, (4, 8)))
    plan, _ = exported(task, "int4/float", tmp_path)
    expected = plan.apply(task.model)(task.example_input)
    torch.testing.assert_close(loaded(plan, task.model, tmp_path)(task.example_input), expected)


def test_a_model_that_cannot_be_sent_to_a_fresh_process_is_refused(tmp_path: Path) -> None:
    class Local(nn.Linear):
        pass

    task = ModelTask(nn.Sequential(Local(4, 3)), torch.randn(8, 4))
    plan, _ = exported(task, "int8/float", tmp_path)
    with pytest.raises(UnsupportedError, match="define its classes in a module"):
        BACKEND.verify(plan, task, tmp_path)


def test_verify_before_export(tmp_path: Path) -> None:
    task = ModelTask(nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4))
    with pytest.raises(DataError, match="bitplan export"):
        BACKEND.verify(make_plan(task, "int8/float"), task, tmp_path)
