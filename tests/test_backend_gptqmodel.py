"""GPTQModel's file has one exact entry per layer, and GPTQModel gives every module its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import EmitterContract
from hypothesis import given
from hypothesis import strategies as st
from llamas import llama_task
from plans import ModelTask, make_plan
from torch import nn

from hwmodels import Layer, Precision
from search.backends.gptqmodel import FILE, GPTQModel, pattern, unescape
from search.errors import DataError, UnsupportedError
from search.tasks.task import Task

BACKEND = GPTQModel()
LAYER = Layer("linear", "linear", weight_shape=(64, 128))
FORMATS = ["int4-g32", "int8-g64", "float", "uint4-g32", "int3", "int2-g16", "int5-g32", "uint8"]


def mixed(position: int, layer: Layer) -> str:
    return FORMATS[position % len(FORMATS)]


@given(st.text("abc._0-[]+*$^\\ ", min_size=1))
def test_a_pattern_matches_its_name_and_no_other(name: str) -> None:
    entry = pattern(name, "+")
    assert unescape(entry[2:]) == name
    assert re.match(entry[2:], name)
    for other in (name + "x", "x" + name, name.replace(".", "x") if "." in name else name + "."):
        assert not re.match(entry[2:], other)


@pytest.mark.parametrize(
    ("precision", "runs", "stays"),
    [
        ("int4-g32", "int4-g32/float", True),
        ("int8", "int8/float", True),
        ("uint4-g128", "uint4-g128/float", True),
        ("int4-asym-g32", "uint4-g32/float", False),
        ("int4-g48", "float/float", False),
        ("int4-g256", "int4/float", False),
        ("int16", "float/float", False),
        ("nf4", "float/float", False),
        ("int4-g32/uint8", "int4-g32/float", False),
    ],
)
def test_what_runs_and_what_stays_in_a_search(precision: str, runs: str, stays: bool) -> None:
    said = BACKEND.express(LAYER, Precision.parse(precision))
    assert said.runs == runs
    assert said.note
    assert (BACKEND.refuses(LAYER, Precision.parse(precision)) is None) == stays


def test_every_layer_has_an_entry_of_its_own(tmp_path: Path) -> None:
    task = llama_task()
    plan = make_plan(task, mixed)
    report = BACKEND.export(plan, task, tmp_path / "out")
    file = json.loads((tmp_path / "out" / FILE).read_text())
    assert file["format"] == "gptq_p", "5 bits exist in the planar layout alone"
    assert file["lm_head"] is not report.policy["lm_head"].weight.is_float
    assert sorted(unescape(entry[2:]) for entry in file["dynamic"]) == sorted(plan.policy)
    quantized = {name: precision for name, precision in report.policy.items() if not precision.weight.is_float}
    assert BACKEND.read(tmp_path / "out") == quantized


@pytest.mark.parametrize(
    "change",
    [
        {"bits": "4"},
        {"surprise": 1},
        {"dynamic": {"+:.*": {"bits": 4, "group_size": 32, "sym": True}}},
        {"dynamic": {"-:^a$": {"bits": 4, "group_size": 32, "sym": True}}},
        {"dynamic": {"+:^a$": {}}},
        {"dynamic": {"+:^a$": {"bits": 9, "group_size": 32, "sym": True}}},
    ],
)
def test_a_file_of_another_schema_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    task = llama_task()
    BACKEND.export(make_plan(task, "int4-g32"), task, tmp_path)
    file = tmp_path / FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=FILE):
        BACKEND.read(tmp_path)


def test_models_that_gptqmodel_cannot_take_are_refused(tmp_path: Path) -> None:
    tied = llama_task(tied=True)
    with pytest.raises(UnsupportedError, match=r"space\.pins\.lm_head=float"):
        BACKEND.export(make_plan(tied, "int4-g32"), tied, tmp_path / "tied")
    task = ModelTask(nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4))
    with pytest.raises(UnsupportedError, match="takes Hugging Face models"):
        BACKEND.export(make_plan(task, "int8"), task, tmp_path / "other")


class TestGPTQModel(EmitterContract):
    precision = "int4-g32"

    @pytest.fixture
    def backend(self) -> GPTQModel:
        return GPTQModel()

    def make_task(self) -> Task:
        return llama_task()


@pytest.mark.backend
def test_gptqmodel_gives_every_module_its_own_settings(tmp_path: Path) -> None:
    task = llama_task()
    plan = make_plan(task, mixed)
    BACKEND.export(plan, task, tmp_path)
    by, checks = BACKEND.validate(plan, task, tmp_path)
    assert by.startswith("gptqmodel ")
    assert len(checks) == 3


@pytest.mark.backend
def test_a_layer_that_gptqmodel_never_quantizes_is_found(tmp_path: Path) -> None:
    task = llama_task()
    plan = make_plan(task, "int4-g32")
    BACKEND.export(plan, task, tmp_path)
    file = tmp_path / FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lm_head": False}))
    with pytest.raises(UnsupportedError, match="never quantizes lm_head"):
        BACKEND.validate(plan, task, tmp_path)


@pytest.mark.backend
def test_an_entry_is_for_one_name_alone() -> None:
    from gptqmodel.quantization.config import dynamic_get

    name = "model.layers.1.mlp.up_proj"
    entries = {pattern(name, "+"): {"bits": 8}, pattern("lm_head", "-"): {}}
    assert dynamic_get(entries, name, "bits") == 8
    assert dynamic_get(entries, "lm_head") is False
    for other in ("model.layers.10.mlp.up_proj", "model.layers.1.mlp.up_proj.x", "x.lm_head", "modelxlayers"):
        assert dynamic_get(entries, other) is None
