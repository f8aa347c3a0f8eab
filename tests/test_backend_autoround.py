"""AutoRound's `layer_config` has one entry per linear layer, and AutoRound resolves it to just that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import EmitterContract
from llamas import llama_task
from plans import ModelTask, make_plan
from torch import nn
from torch.utils.data import DataLoader

from hwmodels import Layer, Precision
from search.backends.autoround import FILE, AutoRound
from search.errors import DataError, UnsupportedError
from search.quiet import quietly
from search.tasks.task import Task
from search.tasks.text import BUNDLED, load_tokenizer

BACKEND = AutoRound()
LAYER = Layer("linear", "linear", weight_shape=(64, 128))
PRECISIONS = ["int4-g32", "int8/int8-token", "float", "uint4-g32", "int3", "int2-g16", "int5-g32"]


def mixed(position: int, layer: Layer) -> str:
    return PRECISIONS[position % len(PRECISIONS)]


@pytest.mark.parametrize(
    ("precision", "runs", "stays"),
    [
        ("int4-g32", "int4-g32/float", True),
        ("int8/int8-token", "int8/int8-token", True),
        ("uint4-g128", "uint4-g128/float", True),
        ("uint8-g32", "int8-g32/float", False),
        ("int4/int8-token", "int4/float", False),
        ("int4-g48", "float/float", False),
        ("int8/uint8", "int8/float", False),
        ("nf4", "float/float", False),
    ],
)
def test_what_runs_and_what_stays_in_a_search(precision: str, runs: str, stays: bool) -> None:
    said = BACKEND.express(LAYER, Precision.parse(precision))
    assert said.runs == runs
    assert said.note
    assert (BACKEND.refuses(LAYER, Precision.parse(precision)) is None) == stays


def test_sizes_that_32_does_not_divide_stay_in_float() -> None:
    assert BACKEND.express(Layer("a", "linear", weight_shape=(40, 64)), Precision.parse("int4")).runs == "float/float"


def test_every_linear_layer_has_an_entry(tmp_path: Path) -> None:
    task = llama_task()
    plan = make_plan(task, mixed)
    report = BACKEND.export(plan, task, tmp_path / "out")
    file = json.loads((tmp_path / "out" / FILE).read_text())
    assert set(file) == set(plan.policy) - {"model.embed_tokens"}
    quantized = {name: precision for name, precision in report.policy.items() if not precision.weight.is_float}
    assert BACKEND.read(tmp_path / "out") == quantized
    skipped = [entry for name, entry in file.items() if name not in quantized]
    assert skipped
    assert all(entry["bits"] == entry["act_bits"] == 16 for entry in skipped)


@pytest.mark.parametrize("change", [{"bits": "4"}, {"bits": 1}, {"surprise": 1}, {"data_type": "nf"}])
def test_a_file_of_another_schema_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    task = llama_task()
    BACKEND.export(make_plan(task, "int4-g32"), task, tmp_path)
    file = tmp_path / FILE
    raw = json.loads(file.read_text())
    raw["lm_head"] |= change
    file.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="lm_head"):
        BACKEND.read(tmp_path)


def test_models_that_autoround_cannot_take_are_refused(tmp_path: Path) -> None:
    tied = llama_task(tied=True)
    with pytest.raises(UnsupportedError, match=r"space\.pins\.lm_head=float"):
        BACKEND.export(make_plan(tied, "int4-g32"), tied, tmp_path / "tied")
    task = ModelTask(nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4))
    with pytest.raises(UnsupportedError, match="takes Hugging Face models"):
        BACKEND.export(make_plan(task, "int8"), task, tmp_path / "other")


class TestAutoRound(EmitterContract):
    precision = "int4-g32"

    @pytest.fixture
    def backend(self) -> AutoRound:
        return AutoRound()

    def make_task(self) -> Task:
        return llama_task()


@pytest.mark.backend
def test_autoround_resolves_every_layer_to_its_own_entry(tmp_path: Path) -> None:
    task = llama_task()
    plan = make_plan(task, mixed)
    BACKEND.export(plan, task, tmp_path)
    by, checks = BACKEND.validate(plan, task, tmp_path)
    assert by.startswith("auto-round ")
    assert len(checks) == 2


@pytest.mark.backend
@pytest.mark.parametrize("change", [{"head": {"bits": 4}}, {"lm_head": {"bits": 8, "sym": False, "data_type": "int"}}])
def test_autoround_refuses_what_it_cannot_keep(change: dict[str, Any], tmp_path: Path) -> None:
    task = llama_task()
    plan = make_plan(task, "int4-g32")
    BACKEND.export(plan, task, tmp_path)
    file = tmp_path / FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UnsupportedError):
        BACKEND.validate(plan, task, tmp_path)


@pytest.mark.backend
def test_autoround_quantizes_every_layer_as_its_entry_says(tmp_path: Path) -> None:
    """One step of its own tuning, on the CPU: the scales it finds have one column per group."""
    with quietly("autoround", "torch"):
        from auto_round import AutoRound as Quantizer

        task = llama_task()
        report = BACKEND.export(make_plan(task, lambda p, layer: PRECISIONS[p % 7].partition("/")[0]), task, tmp_path)
        quantizer = Quantizer(
            task.model,
            tokenizer=load_tokenizer(str(BUNDLED)),
            layer_config=json.loads((tmp_path / FILE).read_text()),
            dataset=DataLoader([{"input_ids": row[None]} for row in task.example_input], batch_size=None),
            **{"iters": 1, "nsamples": 4, "seqlen": 12, "batch_size": 2, "device_map": "cpu"},
        )
        model, _ = quantizer.quantize()
    for name, precision in report.policy.items():
        module = model.get_submodule(name)
        if precision.weight.is_float:
            assert not hasattr(module, "scale")
            continue
        rows, columns = module.weight.shape
        groups = precision.weight.groups((rows, columns)) // rows
        assert module.bits == precision.weight.bits
        assert module.scale.shape == (rows, groups)
        codes = (module.weight.reshape(rows, groups, -1) / module.scale.reshape(rows, groups, 1)).detach()
        assert (codes.amax(-1) - codes.amin(-1)).max() < 2**precision.weight.bits - 0.5
