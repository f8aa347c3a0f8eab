import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hwmodels import Format, Layer, Precision
from search.backends.ggml_types import TYPES, type_of
from search.backends.gguf_names import ARCHITECTURES, architecture, check_names, tensor_names
from search.backends.llamacpp import LlamaCpp, check_type, read_types
from search.errors import DataError, UnsupportedError
from search.tasks.task import Task
from search.tasks.text import transformers_quietly
from tests.conformance import EmitterContract
from tests.plans import ModelTask, make_plan
from tests.tiny import TinyNet

IDS = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def decoder(kind: str = "llama", **changes: object) -> nn.Module:
    """A decoder of two small blocks, of any type that transformers knows."""
    with transformers_quietly() as transformers:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **SIZES | changes)
        config.use_cache = False
        return transformers.AutoModelForCausalLM.from_config(config).eval()


class LlamaTask(ModelTask):
    def outputs(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).logits


def llama_task(**changes: object) -> LlamaTask:
    return LlamaTask(decoder(**changes), IDS, "llama")


class TestLlamaCpp(EmitterContract):
    precision = "int4-g32"

    def make_task(self) -> Task:
        return llama_task()

    @pytest.fixture
    def backend(self) -> LlamaCpp:
        return LlamaCpp()


def test_one_anchored_line_for_every_tensor(tmp_path: Path) -> None:
    """Each regex, searched as llama-quantize does, matches its own tensor and no other."""
    task = llama_task()
    precisions = {"model.layers.0.mlp.down_proj": "int8", "model.layers.1.self_attn.q_proj": "bf16", "lm_head": "float"}
    plan = make_plan(task, lambda _, layer: precisions.get(layer.name, "int4"))
    report = LlamaCpp().export(plan, task, tmp_path / "out")
    lines = (tmp_path / "out" / "tensor-types.txt").read_text().splitlines()
    tensors = tensor_names(task.model, plan.policy)
    for module, tensor in tensors.items():
        matching = [line.rpartition("=") for line in lines if re.search(line.rpartition("=")[0], tensor)]
        assert [kind for _, _, kind in matching] == [type_of(plan.network[module], plan.policy[module].weight)]
    assert len(lines) == len(tensors) == 16
    assert r"^blk\.0\.ffn_down\.weight$=q8_0" in lines
    assert r"^blk\.1\.attn_q\.weight$=bf16" in lines
    assert r"^output\.weight$=f32" in lines
    assert {layer.name: layer.weight for layer in report.layers}["model.layers.1.self_attn.q_proj"] == "exact"


def test_layers_absent_from_the_plan_stay_in_float(tmp_path: Path) -> None:
    """llama-quantize would give them the type on its command line."""
    task = llama_task()
    plan = make_plan(task, "int4")
    kept = plan.model_copy(update={"layers": tuple(layer for layer in plan.layers if layer.name != "lm_head")})
    LlamaCpp().write(kept, task, tmp_path, False)
    assert read_types(tmp_path / "tensor-types.txt")["output.weight"] == "f32"
    assert "lm_head" not in LlamaCpp().read(tmp_path)


def test_a_tied_output_is_the_embedding(tmp_path: Path) -> None:
    task = llama_task(tie_word_embeddings=True)
    plan = make_plan(task, "int8")
    LlamaCpp().export(plan, task, tmp_path / "out")
    types = read_types(tmp_path / "out" / "tensor-types.txt")
    assert "output.weight" not in types
    assert types["token_embd.weight"] == "q8_0"
    said = LlamaCpp().read(tmp_path / "out")
    assert said["lm_head"] == said["model.embed_tokens"] == Precision.parse("int8-g32")
    apart = make_plan(task, lambda _, layer: "int4" if layer.name == "lm_head" else "int8")
    with pytest.raises(UnsupportedError, match="share a weight"):
        LlamaCpp().export(apart, task, tmp_path / "apart")


def test_repaired_weights_lie_beside_the_types(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    task = llama_task()
    name = "model.layers.0.mlp.up_proj.weight"
    altered = {name: task.model.get_parameter(name).detach() * 1.5}
    LlamaCpp().export(make_plan(task, "int4", altered), task, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "altered.safetensors")[name], altered[name])


@pytest.mark.parametrize(
    ("format", "row", "wanted"),
    [
        ("int4", 256, "q4_0"),
        ("uint4-g32", 32, "q4_1"),
        ("int3", 256, "q3_k"),
        ("int3", 64, "q4_0"),
        ("int6", 64, "q8_0"),
        ("int2", 512, "q2_k"),
        ("ternary", 512, "tq2_0"),
        ("uint2", 512, "q2_k"),
        ("int8", 48, "f16"),
        ("mxfp4", 96, "mxfp4"),
        ("fp16", 7, "f16"),
        ("float", 256, "f32"),
    ],
)
def test_rows_that_are_no_whole_blocks_get_a_wider_type(format: str, row: int, wanted: str) -> None:
    layer = Layer("fc", "linear", weight_shape=(8, row))
    assert type_of(layer, Format.parse(format)) == wanted
    found = LlamaCpp().express(layer, Precision.parse(format))
    assert TYPES[wanted].format == Precision.parse(found.runs or found.precision).weight


def test_larger_types_take_more_bits() -> None:
    order = ["q1_0", "tq2_0", "q2_k", "q3_k", "q4_0", "q4_1", "q5_1", "q6_k", "q8_0", "f16", "f32"]
    bits = [TYPES[name].bits for name in order]
    assert all(low < high for low, high in pairwise(bits))
    assert (TYPES["q4_0"].bits, TYPES["q8_0"].bits, TYPES["q6_k"].bits) == (4.5, 8.5, 6.5625)


def test_position_embeddings_are_left_alone() -> None:
    task = LlamaTask(decoder("gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=32), IDS)
    layer = Layer("transformer.wpe", "embedding", weight_shape=(32, 64), quantizes_input=False)
    assert tensor_names(task.model, [layer.name]) == {"transformer.wpe": "position_embd.weight"}
    found = LlamaCpp().express(layer, Precision.parse("int8"))
    assert (found.weight, found.runs) == ("float", "float/float")
    assert "position embeddings" in found.note


def test_only_known_decoders_are_exported(tmp_path: Path) -> None:
    task = ModelTask(TinyNet(), torch.randn(2, 1, 6, 6))
    with pytest.raises(UnsupportedError, match="Hugging Face decoders of the types llama"):
        LlamaCpp().export(make_plan(task, "int8"), task, tmp_path / "out")
    with pytest.raises(UnsupportedError, match=r"no tensor for layer model\.layers\.0\.adapter"):
        tensor_names(decoder(), ["model.layers.0.adapter"])


@pytest.mark.parametrize(
    "line", ["blk.0.attn_q.weight=q4_0", r"^output\.weight$=q9_9", r"^output\.weight$", "^blk.*$=q4_0"]
)
def test_lines_of_another_form_are_refused(line: str, tmp_path: Path) -> None:
    file = tmp_path / "tensor-types.txt"
    file.write_text(f"^token_embd\\.weight$=q8_0\n{line}\n")
    with pytest.raises(DataError, match="allowed is one"):
        read_types(file)
    file.write_text("^output\\.weight$=q8_0\n^output\\.weight$=q4_0\n")
    with pytest.raises(DataError, match="allowed is one"):
        read_types(file)


def test_names_go_there_and_back() -> None:
    for kind, known in ARCHITECTURES.items():
        for module in [*known.outside, *(f"{known.blocks}.11.{name}" for name in known.inside)]:
            tensor = known.tensor(module)
            assert tensor is not None, f"{kind}: {module}"
            assert known.module(tensor) == module


@pytest.mark.backend
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gguf_gives_the_layers_of_every_architecture_the_same_names(kind: str) -> None:
    """Of a real model of that architecture, all linear and embedding layers."""
    model = decoder(kind)
    kinds = (nn.Linear, nn.Embedding)
    modules = [
        name for name, module in model.named_modules() if isinstance(module, kinds) or type(module).__name__ == "Conv1D"
    ]
    if model.lm_head.weight is model.get_input_embeddings().weight:
        modules.remove("lm_head")  # which GGUF does not hold then
    names = tensor_names(model, modules)
    assert len(set(names.values())) == len(names) >= 7
    assert architecture(model).name in check_names(model, names)


@pytest.mark.backend
@pytest.mark.parametrize("name", TYPES)
def test_gguf_makes_as_many_bytes_as_counted(name: str) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    is_done, size = check_type(name, weight)
    assert 8 * size / weight.size == TYPES[name].bits
    assert is_done or "_k" in name or name in ("iq4_nl", "q1_0")


@pytest.mark.backend
@pytest.mark.parametrize("name", ["f16", "bf16", "mxfp4", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_what_runs_is_close_to_what_ggml_stores(name: str) -> None:
    """Casts are the same bit for bit; mxfp4 but for ties; the rest errs as the bitplan format does, or less."""
    import gguf

    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    kind = gguf.GGMLQuantizationType[name.upper()]
    stored = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind).reshape(8, 512))
    ours = simulated(weight, TYPES[name].format)
    if name in ("f16", "bf16", "mxfp4"):
        assert torch.equal(stored, ours)
        return
    ratio = float((stored - weight).square().mean() / (ours - weight).square().mean())
    assert 0.3 < ratio < 2.0, ratio


def simulated(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """The values of a weight in a bitplan format."""
    from search.quantize.simulate import QuantizedModel
    from search.trace import trace

    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False)).eval()
    model[0].weight.data = weight.clone()
    network = trace(model, torch.randn(2, weight.shape[1]))
    return QuantizedModel(model, network).quantized_weight(network.names[0], format)


@pytest.mark.backend
def test_llama_cpp_computes_what_the_float_model_does(tmp_path: Path) -> None:
    """Keys and values are cached in half precision there."""
    pytest.importorskip("llama_cpp")
    from search.backends.llamacpp_run import logits, write_gguf

    task = llama_task()
    write_gguf(task.model, tmp_path / "model.gguf")
    with torch.inference_mode():
        expected = task.model(IDS).logits
    assert torch.allclose(logits(tmp_path / "model.gguf", IDS, 1), expected, atol=2e-3)


@pytest.mark.backend
@pytest.mark.parametrize("tied", [False, True])
def test_llama_cpp_gives_every_tensor_its_type_and_runs_it(tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    task = llama_task(tie_word_embeddings=tied)
    precisions = ["int8", "int4", "float", "uint4", "bf16", "int5", "mxfp4", "nf4"]
    shared = {"model.embed_tokens", "lm_head"}
    plan = make_plan(task, lambda i, layer: "int8" if layer.name in shared else precisions[i % 8])
    LlamaCpp().export(plan, task, tmp_path / "out")
    found = LlamaCpp().verify(plan, task, tmp_path / "out")
    assert any(f"gave all {15 + (not tied)} tensors their types" in said for said in found.checks)
    assert any("of their predictions agree" in said for said in found.checks)
