"""What vLLM runs as one is tied, what its kernels do not take is known beforehand, and checkpoints keep to that."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conformance import SeparateBackendContract, contents
from llamas import llama_task, tiny_llama
from plans import make_plan

from hwmodels import Layer, Network, Precision
from search.backends.compressed_tensors import read_config
from search.backends.vllm import VLLM, check_rules, fused
from search.errors import UnsupportedError
from search.tasks.task import Task
from search.trace import trace

BACKEND = VLLM()
LAYER = Layer("model.layers.0.mlp.down_proj", "linear", weight_shape=(64, 256), input_shape=(2, 8, 256))
BLOCK = "model.layers.0."


def test_layers_of_one_kernel_are_tied() -> None:
    task = llama_task()
    network: Network = trace(tiny_llama(), task.example_input)
    assert BACKEND.ties(network) == [
        [f"{BLOCK}self_attn.{name}_proj" for name in "qkv"],
        [f"{BLOCK}mlp.gate_proj", f"{BLOCK}mlp.up_proj"],
    ]
    assert fused(["a.w1", "a.w2", "b.w3", "q_proj", "k_proj", "c.q_proj"]) == [["q_proj", "k_proj"]]


@pytest.mark.parametrize(
    ("precision", "weight", "input_", "runs", "compute"),
    [
        ("int4-g32/float", "exact", "float", "", "fp16"),
        ("int8-g128/float", "exact", "float", "", "fp16"),
        ("int4/float", "exact", "float", "", "fp16"),
        ("uint4-g64/float", "exact", "float", "", "fp16"),
        ("int3-g64/float", "contained", "float", "", "fp16"),
        ("uint8-g64/float", "contained", "float", "", "fp16"),
        ("int4-g16/float", "contained", "float", "", "fp16"),
        ("int8/int8-token", "exact", "exact", "", "int8"),
        ("int8-tensor/int8-full", "exact", "exact", "", "int8"),
        ("int4/int8-token", "contained", "exact", "", "int8"),
        ("int8/uint8", "exact", "altered", "int8/int8-token", "int8"),
        ("int4-g32/int8-token", "exact", "float", "int4-g32/float", "fp16"),
        ("uint8/uint8", "contained", "float", "uint8/float", "fp16"),
        ("fp8_e4m3/fp8_e4m3-token", "exact", "exact", "", "fp8"),
        ("fp8_e4m3/fp8_e4m3", "exact", "exact", "", "fp8"),
        ("fp8_e4m3/float", "exact", "float", "", "fp16"),
        ("fp8_e4m3/int8-token", "exact", "float", "fp8_e4m3/float", "fp16"),
    ],
)
def test_kernels(precision: str, weight: str, input_: str, runs: str, compute: str) -> None:
    said = BACKEND.express(LAYER, Precision.parse(precision))
    assert (said.weight, said.input, said.runs, said.compute) == (weight, input_, runs, compute)
    is_dropped = weight != "exact" or bool(runs)
    assert (BACKEND.refuses(LAYER, Precision.parse(precision)) is not None) == is_dropped
    scheme = BACKEND.scheme(LAYER, Precision.parse(runs or precision))
    if scheme:
        check_rules({"config_groups": {"group_0": scheme.group(["down_proj"])}})


def test_an_embedding_keeps_its_values_in_float() -> None:
    said = BACKEND.express(
        Layer("e", "embedding", weight_shape=(64, 64), quantizes_input=False), Precision.parse("int4")
    )
    assert (said.weight, said.compute) == ("contained", "fp16")


def test_different_precisions_within_one_kernel_are_refused(tmp_path: Path) -> None:
    task = llama_task()
    plan = make_plan(task, lambda position, layer: "int8-g32" if layer.name.endswith("k_proj") else "int4-g32")
    with pytest.raises(UnsupportedError, match="search with export=vllm"):
        BACKEND.export(plan, task, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    path = tmp_path_factory.mktemp("vllm") / "out"
    task = llama_task()
    BACKEND.export(make_plan(task, "int4-g32"), task, path)
    return read_config(path)


def test_the_embedding_is_ignored_by_name(config: Mapping[str, Any]) -> None:
    check_rules(config)
    assert config["ignore"] == ["model.embed_tokens"]
    assert config["format"] == "pack-quantized"


@pytest.mark.parametrize(
    "change",
    [
        {"num_bits": 3},
        {"num_bits": 8, "symmetric": False},
        {"strategy": "tensor"},
        {"group_size": 16},
        {"type": "float", "num_bits": 8},
    ],
)
def test_what_has_no_kernel_is_found_in_a_checkpoint(config: Mapping[str, Any], change: dict[str, Any]) -> None:
    changed = copy.deepcopy(dict(config))
    changed["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(UnsupportedError, match="no kernel for group_0"):
        check_rules(changed)


def test_shards_of_one_kernel_in_different_groups_are_found(config: Mapping[str, Any]) -> None:
    changed = copy.deepcopy(dict(config))
    changed["config_groups"]["group_0"]["targets"].remove(f"{BLOCK}self_attn.k_proj")
    changed["ignore"].append(f"{BLOCK}self_attn.k_proj")
    with pytest.raises(UnsupportedError, match="stored differently"):
        check_rules(changed)


class TestVLLM(SeparateBackendContract):
    precision = "int4-g32"

    @pytest.fixture
    def backend(self) -> VLLM:
        return VLLM()

    def make_task(self) -> Task:
        return llama_task()


@pytest.mark.backend
def test_a_checkpoint_whose_config_is_not_vllms_is_refused(tmp_path: Path) -> None:
    task = llama_task()
    plan = make_plan(task, "int4-g32")
    report = BACKEND.export(plan, task, tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    raw["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 5
    file.write_text(json.dumps(raw))
    with pytest.raises(UnsupportedError, match="no kernel"):
        BACKEND.check(plan, task, tmp_path, report.layers)
    assert "config.json" in contents(tmp_path)
