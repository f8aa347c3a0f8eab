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
from search.backends.outcome import ExportReport, LayerExport
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


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 2)])
def test_a_tensor_holds_the_codes_and_scales_it_is_given(bits: int, shape: tuple[int, ...]) -> None:
    from search.backends.torchao import integer_tensor

    format = Format(bits)
    codes = torch.randint(format.lowest, format.highest + 1, shape).float()
    scale = torch.rand(3) + 0.1
    tensor: Any = integer_tensor(codes, scale, format)
    assert tensor.qdata.dtype == torch.int8
    assert torch.equal(tensor.dequantize(), codes * scale.view(3, *[1] * (len(shape) - 1)))


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
        widths = {name: part.weight_dtype for name, part in config.fqn_to_config.items()}
        expected = {n: str(p.weight) for n, p in plan.policy.items() if not p.weight.is_float and p.weight.bits <= 8}
        assert widths == {name: getattr(torch, width) for name, width in expected.items()}

    def test_another_plan_is_refused(self, made: Any) -> None:
        _, _, path = made
        with pytest.raises(DataError, match="export it again"):
            BACKEND.verify(make_plan(Digits(), "int8/uint8"), Digits(), path)


def test_inputs_stay_in_float_and_that_is_said(tmp_path: Path) -> None:
    task = ModelTask(nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4))
    plan, report = exported(task, "int8/uint4", tmp_path)
    [layer] = report.layers
    assert layer == LayerExport("0", "int8/uint4", "exact", "float", "fp32", layer.note, "int8/float")
    assert "uint4" in layer.note
    weights_alone = make_plan(task, "int8/float").apply(task.model)(task.example_input)
    torch.testing.assert_close(loaded(plan, task.model, tmp_path)(task.example_input), weights_alone)


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
