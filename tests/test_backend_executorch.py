"""What ExecuTorch is given computes the plan's values, and so does its runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import SeparateBackendContract
from networks import Attention, Decoder, Recurrent
from plans import ModelTask, make_plan
from torch import nn

from hwmodels import Layer, Precision
from search.backends.executorch import ExecuTorch
from search.backends.outcome import ExportReport
from search.backends.realize import simulate
from search.tasks.digits import Digits
from search.tasks.task import call

pytest.importorskip("torchao")
from search.backends.pt2e import load_module, load_program

pytestmark = pytest.mark.backend  # every test captures programs, which takes seconds

BACKEND = ExecuTorch()


class TestExecuTorch(SeparateBackendContract):
    @pytest.fixture
    def backend(self):
        return BACKEND


def check_reference(task: Any, policy: Any, path: Path) -> ExportReport:
    """Exports, and compares the program with the simulation of what runs."""
    plan = make_plan(task, policy)
    report = BACKEND.export(plan, task, path)
    expected = call(simulate(plan, task, report.policy).model, task.example_input)
    found = call(load_module(str(path / "model.pt2")), task.example_input)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    return report


@pytest.mark.parametrize("input_", ["uint8", "int8", "int8-full", "int8-asym", "uint8-sym", "uint6", "int4"])
@pytest.mark.parametrize("weight", ["int8", "int4", "int1", "int8-tensor", "int4-g4"])
def test_tensors(weight: str, input_: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    report = check_reference(ModelTask(model, torch.randn(8, 4, 6, 6)), f"{weight}/{input_}", tmp_path)
    for layer in report.layers:
        assert layer.weight == ("exact" if weight.startswith("int8") else "contained")
        assert layer.input == ("exact" if "8" in input_ else "contained")
        assert layer.compute == "fp32"
    quantizers = [n for n in load_program(tmp_path / "model.pt2").graph.nodes if "quantize_per_tensor" in n.name]
    assert all(node.args[-1] == torch.int8 for node in quantizers)


def test_a_layer_whose_relu_belongs_to_another_module_is_quantized(tmp_path: Path) -> None:
    check_reference(Digits(), "int4/uint8", tmp_path)
    program = load_program(tmp_path / "model.pt2")
    types = [value.dtype for value in program.state_dict.values() if value.dim() > 1]
    assert types == [torch.int8] * len(make_plan(Digits(), "int8").layers)


def test_awkward_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check_reference(ModelTask(Decoder(), torch.randint(0, 20, (4, 8))), "int4/uint8", tmp_path / "tied")
    check_reference(ModelTask(Attention(), torch.randn(4, 8, 16)), "int8/uint6", tmp_path / "attention")
    check_reference(ModelTask(Recurrent(), torch.randn(6, 4)), "int8/uint8", tmp_path / "recurrent")


def test_float_layers_stay_in_float(tmp_path: Path) -> None:
    policy = ["int4/uint8", "float/float", "int8/float", "float/uint8"]
    report = check_reference(Digits(), lambda position, _: policy[position % 4], tmp_path)
    assert not any(layer.faults for layer in report.layers)


def test_ranges_found_at_run_time_become_static() -> None:
    said = BACKEND.express(Layer("a", "linear", weight_shape=(4, 4)), Precision.parse("int8/int8-token"))
    assert (said.input, said.runs) == ("altered", "int8/uint8")


@pytest.mark.backend
@pytest.mark.parametrize("precision", ["int8/uint8", "int4/uint6", "int4/int8"])
def test_the_runtime_computes_the_same(precision: str, tmp_path: Path) -> None:
    from search.backends.executorch import load_lowered

    plan = make_plan(Digits(), precision)
    BACKEND.export(plan, Digits(), tmp_path)
    x = Digits().example_input[:20]
    [found] = load_lowered((str(tmp_path / "model.pt2"), str(tmp_path / "model.pte")))(x)
    expected = plan.apply(Digits().model)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
