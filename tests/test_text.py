"""The text task: its sequences and scores, models of many architectures, and the shipped model quantized."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import TaskContract
from safetensors.torch import load_file, save_file
from torch import nn

from hwmodels import Precision
from search.config import build, compose
from search.errors import ConfigError, DataError, UnsupportedError
from search.policy import Policy
from search.quality.evaluate import sample_scores
from search.quantize.fold import fold_batch_norm
from search.quantize.simulate import QuantizedModel, exact_inference
from search.space import build_space
from search.tasks.task import SPLITS, Task
from search.tasks.text import BUNDLED, Text, encode, load_model, load_tokenizer
from search.tasks.text_training import TextRecipe, new_model, train_tokenizer
from search.ties import shared_input_ties
from search.trace import shared_parameters, trace

transformers = pytest.importorskip("transformers")

TINY = TextRecipe(vocabulary=281, hidden=16, intermediate=16, layers=1, heads=2, key_value_heads=1, positions=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of one layer with a tokenizer, in a folder of its own."""
    out = tmp_path_factory.mktemp("model") / "tiny"
    train_tokenizer("now is the time for all good men to come to the aid of the party " * 9, 280, out)
    torch.manual_seed(0)
    new_model(TINY).save_pretrained(out)
    return out


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text("".join(f"{i} is the number {i} of all the good men.\n" for i in range(80)), encoding="utf-8")
    return path


# Sequences and scores


@pytest.mark.parametrize("has_start", [False, True])
def test_sequences_are_the_tokens_of_the_text_in_order(
    folder: Path, story: Path, tmp_path: Path, has_start: bool
) -> None:
    if has_start:  # as the tokenizers of Llama and Gemma do
        from tokenizers.processors import TemplateProcessing

        tokenizer = load_tokenizer(str(folder))
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        folder = tmp_path / "started"
        tokenizer.save_pretrained(folder)
    task = Text(path=folder, text=story, context=10, batch_size=3, report_samples=7)
    tokenizer = load_tokenizer(str(folder))
    start = [tokenizer.bos_token_id] if has_start else []
    lines = story.read_text().splitlines(keepends=True)
    found = {split: torch.cat(list(task.batches(split))) for split in SPLITS}
    for split, sequences in found.items():
        assert sequences.dtype == torch.int64
        assert sequences[:, : len(start)].tolist() == [start] * len(sequences)
        text = tokenizer.decode(sequences[:, len(start) :].flatten())
        assert text in "".join(lines), f"{split} is a piece of the text"
    assert len(found["report"]) == 7, "as many as asked for"
    assert tokenizer.decode(found["calibration"][:, len(start) :].flatten()).startswith(lines[0])
    assert [len(batch) for batch in task.batches("report")] == [3, 3, 1]
    assert torch.equal(task.example_input, found["calibration"][:2])


def test_scores_against_a_loop_and_against_transformers(folder: Path, story: Path) -> None:
    task = Text(path=folder, text=story, context=12, batch_size=4)
    with torch.no_grad():
        for batch in task.batches("selection"):
            logits = task.outputs(task.model, batch)
            scores = task.score(logits, batch)
            assert scores.dtype == torch.float64
            logs = logits.double().log_softmax(-1)
            for i, sequence in enumerate(batch):
                expected = sum(-logs[i, t, sequence[t + 1]].item() for t in range(11)) / 11
                assert scores[i].item() == pytest.approx(expected, rel=1e-6)
                loss = task.model(sequence[None], labels=sequence[None]).loss.item()
                assert scores[i].item() == pytest.approx(loss, rel=1e-5)


def test_the_metric_is_the_perplexity_over_all_tokens(folder: Path, story: Path) -> None:
    task = Text(path=folder, text=story, context=12, batch_size=4)
    scores = sample_scores(task, task.model, "report")
    losses = []
    with torch.no_grad():
        for sequence in task.sequences("report"):
            logs = task.model(sequence[None]).logits[0].double().log_softmax(-1)
            losses += [-logs[t, sequence[t + 1]].item() for t in range(11)]
    assert task.reduce(scores) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert task.reduce(scores + 0.1) > task.reduce(scores), "larger scores are worse, as larger perplexities are"
    assert (task.metric, task.higher_is_better) == ("perplexity", False)


def test_a_task_reduces_scores_to_their_mean() -> None:
    assert Task.reduce(Text(), np.array([0.0, 1.0, 1.0, 1.0])) == 0.75


def test_guessing_evenly_is_as_perplexing_as_the_vocabulary_is_large() -> None:
    task, batch = Text(), torch.randint(50, (6, 9))
    assert task.reduce(task.score(torch.zeros(6, 9, 50), batch).numpy()) == pytest.approx(50)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_in_half_precision_are_close(folder: Path, story: Path, dtype: str) -> None:
    exact, rounded = (Text(path=folder, text=story, context=12, dtype=name) for name in ("float32", dtype))
    assert {value.dtype for value in rounded.model.parameters()} == {getattr(torch, dtype)}
    scores = [sample_scores(task, task.model, "report") for task in (exact, rounded)]
    assert np.abs(scores[0] - scores[1]).max() < 0.02


# Settings and files


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 1}, r"task\.context=1 must be at least 2"),
        ({"batch_size": 0}, r"task\.batch_size=0 must be at least 1"),
        ({"report_samples": 0}, r"task\.report_samples=0 must be at least 1"),
        ({"dtype": "bfloat"}, r"task\.dtype=bfloat is unknown.*did you mean 'bfloat16'.*allowed: float32, "),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Text(**settings)


def test_context_beyond_the_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.context=33 is more than .*tiny has positions for; .* at most 32"):
        _ = Text(path=folder, context=33).model


def test_text_shorter_than_a_sequence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("all good men\n" * 4)
    task = Text(path=folder, text=tmp_path / "short.txt", context=30)
    with pytest.raises(DataError, match=r"the selection split holds \d+ tokens, too few .*task\.context=30"):
        task.batches("selection")


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"task\.path=.*none holds no causal language model .*config\.json.*hf download"
    ):
        _ = Text(path=tmp_path / "none").model
    with pytest.raises(DataError, match="holds no causal language model"):
        Text(path=tmp_path).sequences("report")


def test_damaged_and_incomplete_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if "up_proj" not in n}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(DataError, match=r"lacks 1 weights of LlamaForCausalLM, such as model\.layers\.0\.mlp\.up_proj"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(DataError, match="holds no causal language model that can be read"):
        load_model(str(tmp_path))


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UnsupportedError, match=r"task=text needs transformers; .*pip install 'bitplan\[transformers\]'"
    ):
        _ = Text().model


def test_loading_leaves_the_progress_bar_as_it_was(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    load_model(str(folder))
    assert logging.is_progress_bar_enabled() == before
    assert capfd.readouterr() == ("", "")


def test_configuration(folder: Path, story: Path) -> None:
    task = build(compose(["task=text"]).task, Task, "task")
    assert (task.name, task.path, task.context) == ("text", str(BUNDLED), 128)
    overrides = [f"task.path={folder}", f"task.text={story}", "task.context=16", "task.dtype=bfloat16"]
    task = build(compose(["task=text", *overrides]).task, Task, "task")
    assert task.name == "text_tiny"
    assert task.example_input.shape == (2, 16)
    assert task.outputs(task.model, task.example_input).dtype == torch.bfloat16


# Any causal language model

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = SMALL | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
QKV, GATE_UP = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]

ARCHITECTURES = [  # layers, ties of one block, whether the embedding is the decoder
    ("LlamaConfig", GATED, 16, [QKV, GATE_UP], False),
    ("LlamaConfig", GATED | {"attn_implementation": "eager"}, 16, [QKV, GATE_UP], False),
    ("LlamaConfig", GATED | {"tie_word_embeddings": True}, 16, [QKV, GATE_UP], True),
    ("Qwen3Config", GATED | {"head_dim": 8}, 16, [QKV, GATE_UP], False),
    ("GemmaConfig", GATED | {"head_dim": 8}, 16, [QKV, GATE_UP], True),
    ("OPTConfig", OPT, 15, [QKV], True),
    ("GPT2Config", GPT2 | {"bos_token_id": 0, "eos_token_id": 0}, 11, [], True),
]


@pytest.mark.parametrize(("config", "options", "layers", "ties", "is_tied"), ARCHITECTURES)
def test_networks_of_causal_language_models(
    tmp_path: Path, config: str, options: dict[str, Any], layers: int, ties: list[list[str]], is_tied: bool
) -> None:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**options)).eval()
    made.save_pretrained(tmp_path)
    model, ids = load_model(str(tmp_path)), torch.randint(1, 64, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, made(ids).logits)
    folded = fold_batch_norm(model, ids)
    network = trace(folded.model, ids)
    assert folded.folds == ()
    assert len(network) == layers
    kinds = (nn.Linear, nn.Embedding)
    assert set(network.names) == {name for name, module in model.named_modules() if isinstance(module, kinds)}
    gains = sum(value.numel() for value in model.parameters() if value.dim() == 1)
    assert network.other_parameters + sum(layer.bias_count for layer in network) >= gains
    found = [[layer.rpartition(".")[2] for layer in tie] for tie in shared_input_ties(network)]
    assert found == ties * 2
    assert bool(shared_parameters(folded.model, network)) == is_tied


# The shipped model


@pytest.fixture(scope="module")
def shipped() -> Text:
    return Text(calibration_samples=8, selection_samples=12, report_samples=12)


class TestText(TaskContract):
    @pytest.fixture
    def task(self, shipped: Text) -> Text:
        return shipped


def test_the_shipped_folder() -> None:
    sizes = {path.name: path.stat().st_size for path in BUNDLED.iterdir()}
    assert sizes["model.safetensors"] <= 7.9e6
    assert sum(sizes.values()) < 8e6
    weights = load_file(BUNDLED / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    matrices = {name: weight for name, weight in weights.items() if weight.dim() == 2}
    assert all(weight.shape[1] % 128 == 0 for weight in matrices.values()), "whole groups of 128 inputs"
    assert json.loads((BUNDLED / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_shipped_model_knows_more_than_pairs_of_tokens() -> None:
    from search.tasks.topics import topic_texts

    task, tokenizer = Text(), load_tokenizer(str(BUNDLED))
    tokens = {split: encode(tokenizer, text).tolist() for split, text in topic_texts().items()}
    perplexity = task.reduce(sample_scores(task, task.model, "report"))
    assert perplexity < 0.6 * bigram_perplexity(tokens["train"], tokens["report"], len(tokenizer))
    if sys.version_info[:2] == (3, 11):
        assert perplexity == pytest.approx(PERPLEXITY, rel=0.02)


PERPLEXITY = 31.28  # of the shipped model on the report split of Python 3.11.7


def bigram_perplexity(train: list[int], held_out: list[int], vocabulary: int) -> float:
    """Perplexity of token pairs counted in `train`, smoothed by interpolation (Witten and Bell, 1991)."""
    single: Counter[int] = Counter(train)
    pairs: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for one, other in pairwise(train):
        pairs[one][other] += 1
    total = 0.0
    for one, other in pairwise(held_out):
        alone = (single[other] + len(single) / vocabulary) / (len(train) + len(single))
        after = pairs[one]
        kinds, count = max(len(after), 1), after.total()
        total -= math.log((after[other] + kinds * alone) / (count + kinds))
    return math.exp(total / (len(held_out) - 1))


@pytest.fixture(scope="module")
def simulated(shipped: Text) -> QuantizedModel:
    folded = fold_batch_norm(shipped.model, shipped.example_input)
    network = trace(folded.model, shipped.example_input)
    simulated = QuantizedModel(folded.model, network)
    simulated.calibrate(shipped.inputs(batch) for batch in shipped.batches("calibration"))
    return simulated


def test_the_shipped_network(simulated: QuantizedModel) -> None:
    network = simulated.network
    block = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    blocks = [f"model.layers.{i}.{name}" for i in range(4) for name in block]
    assert list(network.names) == ["model.embed_tokens", *blocks, "lm_head"]
    assert shared_input_ties(network) == [
        [f"model.layers.{i}.{name}" for name in names] for i in range(4) for names in (block[:3], block[4:6])
    ]
    assert network["model.embed_tokens"].reads == ("input",)
    assert network.outputs == ("lm_head",)
    assert network.weight_count + network.other_parameters == sum(p.numel() for p in simulated.model.parameters())
    assert network["lm_head"].macs == 128 * 256 * 1024
    assert shared_parameters(simulated.model, network) == ()


def test_projections_share_the_format_of_what_they_read(simulated: QuantizedModel) -> None:
    network = simulated.network
    space = build_space(network, ["int4", "int8"], ["uint8", "int8"])
    inputs = {decision.layers for decision in space.decisions if decision.side == "input" and len(decision.layers) > 1}
    assert inputs == set(map(tuple, shared_input_ties(network)))
    assert len(space.units) == 30
    tied = build_space(network, ["int4", "int8"], ["uint8"], ties=shared_input_ties(network))
    assert len(tied.units) == 30 - 4 * 3
    assert "model.embed_tokens" in space.weight_only


@pytest.mark.parametrize("inputs", ["int8", "uint8"])
def test_the_shipped_model_quantized(shipped: Text, simulated: QuantizedModel, inputs: str) -> None:
    network = simulated.network
    perplexities = {}
    for name in ("float", f"int8/{inputs}", f"int4/{inputs}", f"int2/{inputs}"):
        model = simulated.apply(Policy.uniform(network, Precision.parse(name)))
        perplexities[name] = shipped.reduce(sample_scores(shipped, model, "selection"))
    assert perplexities[f"int8/{inputs}"] == pytest.approx(perplexities["float"], rel=0.02)
    assert 1.005 * perplexities["float"] < perplexities[f"int4/{inputs}"] < 0.8 * perplexities[f"int2/{inputs}"]
    with exact_inference():
        again = shipped.outputs(simulated.apply({}), shipped.example_input)
        assert torch.equal(again, shipped.outputs(shipped.model, shipped.example_input)), "float comes back exactly"
