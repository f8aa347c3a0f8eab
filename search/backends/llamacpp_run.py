"""Runs a plan's types through llama.cpp itself, where its Python bindings are installed and the model is a Llama.

llama-quantize is a thin command around `llama_model_quantize` (`tools/quantize/quantize.cpp`), whose parameter
`tt_overrides` takes the lines of `--tensor-type-file` as they are; the bindings of llama-cpp-python 0.3.36 reach it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search.backends.gguf_names import architecture
from search.errors import UnsupportedError

Q8_0 = 7  # LLAMA_FTYPE_MOSTLY_Q8_0: what tensors get that no line names


def is_written(model: Any) -> bool:
    """True for the models that `write_gguf` can write: Llamas with the default rotary embedding and no biases."""
    config = model.config
    return bool(
        config.model_type == "llama"
        and config.rope_parameters["rope_type"] == "default"
        and not (config.attention_bias or config.mlp_bias)
    )


def write_gguf(model: Any, file: Path) -> None:
    """Writes a Hugging Face Llama as a GGUF file of float32 tensors, without a tokenizer.

    Args:
        model: One for which `is_written`.
        file: Where to.
    """
    import gguf

    config, known = model.config, architecture(model)
    writer = gguf.GGUFWriter(file, known.name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # a tied output comes once, as the embedding
        tensor = table.get_name(name, try_suffixes=(".weight", ".bias"))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        found = parameter.detach().float()
        count = heads.get(name.split(".")[-2])
        writer.add_tensor(tensor, (_interleaved(found, count) if count else found).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order of llama.cpp, which rotates neighbouring values where transformers rotates halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def quantize(source: Path, target: Path, lines: Sequence[tuple[str, str]], threads: int) -> dict[str, str]:
    """Quantizes a GGUF file as `llama-quantize --tensor-type-file LINES SOURCE TARGET q8_0` does.

    Args:
        source: A GGUF file in float.
        target: What to write.
        lines: Regex and type of every line.
        threads: To use.

    Returns:
        The type that every tensor of the new file has.

    Raises:
        UnsupportedError: If llama.cpp refuses.
    """
    import gguf
    import llama_cpp

    keep_log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(keep_log, ctypes.c_void_p(0))
    overrides = (llama_cpp.llama_cpp.llama_model_tensor_override * (len(lines) + 1))()
    for override, (pattern, kind) in zip(overrides, lines, strict=False):
        override.pattern, override.type = pattern.encode(), gguf.GGMLQuantizationType[kind.upper()].value
    overrides[len(lines)].type = len(gguf.GGMLQuantizationType)  # without a pattern, it ends the list
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.tt_overrides = Q8_0, threads, overrides
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters):
        raise UnsupportedError("llama.cpp does not quantize the model with these types")
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(target).tensors}


def logits(file: Path, sequences: Tensor, threads: int) -> Tensor:
    """Runs a GGUF file over sequences of token ids, on the CPU.

    Args:
        file: The model.
        sequences: Token ids, shape `(sequences, tokens)`.
        threads: To use.

    Returns:
        Logits, shape `(sequences, tokens, vocabulary)`.

    Raises:
        UnsupportedError: If llama.cpp cannot load or run it.
    """
    import llama_cpp

    keep_log = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(keep_log, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise UnsupportedError(f"llama.cpp does not load {file}")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = sequences.shape[1]
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, settings)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(sequences.shape[1], 0, 1)
    found = []
    for sequence in sequences.tolist():
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = len(sequence)
        for i, token in enumerate(sequence):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
        if llama_cpp.llama_decode(context, batch):
            raise UnsupportedError(f"llama.cpp does not run {file}")
        rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(sequence), vocabulary))
        found.append(torch.from_numpy(rows.copy()))
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return torch.stack(found)
