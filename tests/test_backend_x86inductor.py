"""A quantized program computes the plan's values: as the reference, and as TorchInductor compiles it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import SeparateBackendContract
from networks import Attention, Decoder, Recurrent, TwoInputs
from plans import ModelTask, make_plan
from torch import nn

from hwmodels import Layer, Precision
from search.backends import backend
from search.backends.outcome import ExportReport
from search.backends.realize import simulate
from search.errors import UnsupportedError
from search.plan import Plan
from search.tasks.digits import Digits
from search.tasks.task import call

pytest.importorskip("torchao")
from search.backends.pt2e import load_module, load_program

pytestmark = pytest.mark.backend  # every test captures programs, which takes seconds

BACKEND = backend("x86inductor")


class TestX86Inductor(SeparateBackendContract):
    @pytest.fixture
    def backend(self):
        return BACKEND


class Answering(ModelTask):
    def outputs(self, model, batch):
        return call(model, batch).logits


def exported(task: Any, policy: Any, path: Path) -> tuple[Plan, ExportReport]:
    plan = make_plan(task, policy)
    return plan, BACKEND.export(plan, task, path)


def check_reference(task: Any, policy: Any, path: Path) -> ExportReport:
    """Exports, and compares the program with the simulation of what runs."""
    plan, report = exported(task, policy, path)
    expected = call(simulate(plan, task, report.policy).model, task.example_input)
    found = call(load_module(str(path / "model.pt2")), task.example_input)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    return report


INPUTS = {
    **{wide: "exact" for wide in ("uint8", "int8", "int8-full", "int8-asym", "uint8-sym", "uint8-tensor")},
    **{narrow: "contained" for narrow in ("uint6", "uint4", "int4", "int4-asym", "uint1", "int2")},
    **{dynamic: "altered" for dynamic in ("int8-token", "int8-dynamic", "uint4-g8")},
    **{other: "float" for other in ("uint16", "fp8_e4m3", "bf16", "int1", "mxfp8")},
}


@pytest.mark.parametrize("input_", INPUTS)
def test_inputs(input_: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = ModelTask(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(8, 16))
    report = check_reference(task, f"int8/{input_}", tmp_path)
    assert {layer.input for layer in report.layers} == {INPUTS[input_]}
    assert {layer.compute for layer in report.layers} == {"fp32" if INPUTS[input_] == "float" else "int8"}
    runs = {"altered": "int8/uint8", "float": "int8/float"}.get(INPUTS[input_], "")
    assert {layer.runs for layer in report.layers} == {runs}


@pytest.mark.parametrize(
    ("weight", "became", "compute"),
    [
        *((format, "exact", "int8") for format in ("int8", "int8-full", "int8-tensor")),
        *((format, "contained", "int8") for format in ("int7", "int4", "int4-full", "int2", "int1")),
        *((format, "contained", "fp32") for format in ("int4-g4", "int4-asym", "uint8", "nf4", "ternary", "fp8_e4m3")),
        ("float", "float", "fp32"),
    ],
)
def test_weights(weight: str, became: str, compute: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(24, 3))
    task = ModelTask(model, torch.randn(8, 4, 6, 6))
    report = check_reference(task, f"{weight}/uint8", tmp_path)
    assert {(layer.weight, layer.compute) for layer in report.layers} == {(became, compute)}
    program = load_program(tmp_path / "model.pt2")
    types = {name: value.dtype for name, value in program.state_dict.items() if value.dim() > 1}
    assert set(types.values()) == {torch.int8 if compute == "int8" else torch.float32}
    assert len(types) == 3, "no weight is stored twice"


def test_a_mixed_plan_keeps_float_layers_and_weight_only_layers(tmp_path: Path) -> None:
    policy = ["int4/uint8", "float/float", "int8/float", "float/uint8", "int3/uint4"]
    report = check_reference(Digits(), lambda position, _: policy[position % 5], tmp_path)
    assert [layer.compute for layer in report.layers[:5]] == ["int8", "fp32", "fp32", "fp32", "int8"]
    assert not any(layer.faults for layer in report.layers)


def test_readers_of_one_tensor_keep_their_own_ranges(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left(x) + self.right(x)

    task = ModelTask(Fork(), torch.randn(8, 8))
    check_reference(task, {"left": "int8/uint8", "right": "int8/uint4"}, tmp_path)
    check_reference(task, {"left": "int8/uint8", "right": "int8/int8-asym"}, tmp_path)


@pytest.mark.parametrize("policy", ["int8/uint8", "int4/uint6"])
def test_awkward_models(policy: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check_reference(ModelTask(Decoder(), torch.randint(0, 20, (4, 8))), policy, tmp_path / "tied")
    check_reference(ModelTask(Attention(), torch.randn(4, 8, 16)), policy, tmp_path / "attention")
    check_reference(ModelTask(Recurrent(), torch.randn(6, 4)), policy, tmp_path / "recurrent")
    inputs = {"image": torch.randn(4, 1, 5, 5), "ids": torch.randint(0, 10, (4,))}
    task = Answering(TwoInputs(), inputs)
    plan, _ = exported(task, policy, tmp_path / "two")
    found = call(load_module(str(tmp_path / "two" / "model.pt2")), inputs)
    torch.testing.assert_close(found[0], plan.apply(task.model)(**inputs).logits)


def test_the_batch_size_is_free(tmp_path: Path) -> None:
    task = ModelTask(nn.Sequential(nn.Linear(4, 3)), torch.randn(1, 4))
    plan, _ = exported(task, "int8/uint8", tmp_path)
    x = torch.randn(7, 4)
    torch.testing.assert_close(load_module(str(tmp_path / "model.pt2"))(x), plan.apply(task.model)(x))


def test_it_finds_ranges_of_its_own_if_asked_to(tmp_path: Path) -> None:
    plan = make_plan(Digits(), "int4/uint6")
    report = BACKEND.export(plan, Digits(), tmp_path, recalibrate=True)
    assert {(layer.weight, layer.input, layer.runs) for layer in report.layers} == {
        ("altered", "altered", "int4/uint6")
    }
    x = Digits().example_input
    found, planned = load_module(str(tmp_path / "model.pt2"))(x), plan.apply(Digits().model)(x)
    assert not torch.equal(found, planned)
    assert (found.argmax(-1) == planned.argmax(-1)).float().mean() > 0.8


def test_a_convolution_that_the_quantizer_does_not_know_is_refused(tmp_path: Path) -> None:
    task = ModelTask(nn.Sequential(nn.Conv2d(1, 2, 3, padding="same"), nn.Flatten()), torch.randn(8, 1, 4, 4))
    plan = make_plan(task, "int8/uint8")
    with pytest.raises(UnsupportedError, match="the quantizer refuses Sequential: conv2d is not an aten conv2d"):
        BACKEND.export(plan, task, tmp_path / "out")


def test_what_a_program_holds_of_the_machine_that_wrote_it(tmp_path: Path) -> None:
    exported(Digits(), "int8/uint8", tmp_path)
    content = (tmp_path / "model.pt2").read_bytes()
    assert str(Path(__file__).parent.parent).encode() not in content
    assert load_program(tmp_path / "model.pt2").example_inputs is None


def test_other_kinds_say_so() -> None:
    said = BACKEND.express(Layer("a", "conv1d", weight_shape=(4, 4, 3)), Precision.parse("int8/uint8"))
    assert (said.weight, said.input, said.runs) == ("contained", "float", "int8/float")
    assert "of conv1d" in said.note


@pytest.mark.backend
@pytest.mark.parametrize("precision", ["int8/uint8", "int4/uint6", "int8/int8"])
def test_compiled_integer_kernels_compute_the_same(precision: str, tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    from search.backends.x86inductor import has_compiler, load_compiled
    from search.quiet import quietly

    if not has_compiler():
        pytest.skip("TorchInductor finds no C++ compiler")
    plan, report = exported(Digits(), precision, tmp_path)
    x = Digits().example_input
    with quietly("torch"):
        counters.clear()
        found = load_compiled(str(tmp_path / "model.pt2"))(x)
    torch.testing.assert_close(found, plan.apply(Digits().model)(x), rtol=1e-4, atol=1e-4)
    fused = counters["inductor"]["qconv_unary_lower_count"] + counters["inductor"]["qlinear_unary_lower_count"]
    assert fused == sum(layer.compute == "int8" for layer in report.layers)
