"""Trains the built-in language model, a Llama small enough to be shipped, on the topics that are not held out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search.tasks.text import encode, load_model, transformers_quietly
from search.tasks.training import load_state, save_state


@dataclass(frozen=True)
class TextRecipe:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) under a cosine schedule with a linear start.

    The text is short, so weights decay, attention is dropped out, some of the tokens the model reads are replaced by
    random ones, and every epoch cuts the text elsewhere. All widths are multiples of 128, the size of weight groups.
    """

    epochs: int = 20
    batch_size: int = 16  # sequences
    context: int = 128  # tokens in a sequence
    peak_rate: float = 2e-3
    weight_decay: float = 0.1
    replaced: float = 0.1  # share of random tokens
    attention_dropout: float = 0.1
    vocabulary: int = 1024
    hidden: int = 256
    intermediate: int = 768
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2  # each shared by two query heads (Ainslie et al., arXiv 2305.13245)
    positions: int = 256


def train_text(
    texts: Mapping[str, str], recipe: TextRecipe, out: Path, seed: int = 0, log: Callable[[str], None] = print
) -> nn.Module:
    """Trains tokenizer and model on `texts["train"]` and writes them to the folder `out`, weights in float16.

    A killed run goes on from its last whole epoch. Every epoch's cut, shuffling, noise and dropout depend on the
    seed and the epoch alone, so an interrupted run ends with the same weights as an undisturbed one.

    Args:
        texts: The text to train on, and `calibration`, whose perplexity is logged after every epoch.
        recipe: Sizes and schedule.
        out: Folder of the checkpoint.
        seed: Seed of everything random.
        log: Called with one line per epoch.
    """
    tokenizer = train_tokenizer(texts["train"], recipe.vocabulary, out)
    tokens = encode(tokenizer, texts["train"])
    held_out = windows(encode(tokenizer, texts["calibration"]), recipe.context)
    torch.manual_seed(seed)
    model = new_model(recipe)
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in model.parameters() if parameter.dim() > 1]},
        {"params": [parameter for parameter in model.parameters() if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, recipe.peak_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)
    steps = max(1, len(tokens) // (recipe.context * recipe.batch_size))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps * recipe.epochs))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    state = out.with_suffix(".training.pt")
    if first := load_state(state, parts):
        log(f"resuming text after epoch {first}")
    for epoch in range(first, recipe.epochs):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed * 1_000 + epoch)
        torch.manual_seed(seed * 1_000 + epoch)  # of dropout
        model.train()
        cut = int(torch.randint(recipe.context, (), generator=generator))
        sequences = windows(tokens[cut:], recipe.context)
        for index in torch.randperm(len(sequences), generator=generator).tensor_split(steps):
            batch = sequences[index]
            loss = loss_of(model, replace_some(batch, recipe, generator), batch)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        save_state(state, parts, epoch + 1)
        log(
            f"text epoch {epoch + 1}/{recipe.epochs} loss {loss.item():.3f} calibration perplexity "
            f"{perplexity(model.eval(), held_out):.2f} {time.perf_counter() - started:.0f} s"
        )
    with transformers_quietly():
        model.half().save_pretrained(out)
    state.unlink(missing_ok=True)
    return load_model(str(out))  # type: ignore[no-any-return]


def train_tokenizer(text: str, vocabulary: int, out: Path) -> Any:
    """Learns byte-pair tokens (Sennrich et al., arXiv 1508.07909), writes them to the folder `out`, and returns them.

    All 256 bytes are tokens, so that any text can be encoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    with transformers_quietly() as transformers:
        finished = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        finished.save_pretrained(out)
    return finished


def new_model(recipe: TextRecipe) -> Any:
    """Returns a `LlamaForCausalLM` with fresh weights, drawn from torch's global random state."""
    with transformers_quietly() as transformers:
        config = transformers.LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.key_value_heads,
            max_position_embeddings=recipe.positions,
            attention_dropout=recipe.attention_dropout,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        return transformers.LlamaForCausalLM(config)


def cosine(steps: int) -> Callable[[int], float]:
    """Returns the schedule of the learning rate: up linearly over 5% of the steps, then half a cosine down to 0."""
    warmup = max(1, steps // 20)
    return lambda step: min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


def windows(tokens: Tensor, context: int) -> Tensor:
    """Cuts tokens into sequences, shape `(sequences, context)`; what is left over at the end is not used."""
    count = len(tokens) // context
    return tokens[: count * context].view(count, context)


def replace_some(batch: Tensor, recipe: TextRecipe, generator: torch.Generator) -> Tensor:
    """Replaces a share of the tokens by random ones."""
    replaced = torch.rand(batch.shape, generator=generator) < recipe.replaced
    return torch.where(replaced, torch.randint(recipe.vocabulary, batch.shape, generator=generator), batch)


def loss_of(model: nn.Module, read: Tensor, batch: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the next tokens of `batch` in nats where the model reads `read`."""
    return F.cross_entropy(model(read).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, sequences: Tensor) -> float:
    """Returns the perplexity of a model over sequences of token ids."""
    return math.exp(sum(float(loss_of(model, one, one)) for one in torch.split(sequences, 1)) / len(sequences))
