"""A Llama small enough to be exported in milliseconds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plans import ModelTask

from search.tasks.text import transformers_quietly

VOCABULARY = 64


def tiny_llama(tied: bool = False, seed: int = 0) -> Any:
    """One block of two heads, all widths multiples of 32, with random weights."""
    pytest.importorskip("transformers")
    torch.manual_seed(seed)
    with transformers_quietly() as transformers:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        return transformers.LlamaForCausalLM(config).eval()


def llama_task(tied: bool = False, seed: int = 0) -> ModelTask:
    """What the model predicts after random tokens; its labels are its own."""
    generator = torch.Generator().manual_seed(seed)
    return ModelTask(tiny_llama(tied, seed), torch.randint(VOCABULARY, (24, 12), generator=generator), "llama")
