"""Names of a Hugging Face decoder's layers in GGUF, llama.cpp's model file, written down for common architectures.

llama.cpp's converter renames modules by the tables of the gguf package (`gguf/tensor_mapping.py`, version 0.19); those
here are the part that linear and embedding layers need, and a test holds them against the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from search.errors import UnsupportedError, closest

TOKEN_EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MODEL = {"model.embed_tokens": "token_embd", "lm_head": "output"}


@dataclass(frozen=True)
class Architecture:
    """How one architecture's modules are called in GGUF.

    Attributes:
        name: The architecture's name in GGUF.
        blocks: Module that lists its blocks.
        inside: Modules of a block to tensors of a block, both without prefix and suffix.
        outside: Modules outside the blocks to tensors, likewise.
    """

    name: str
    blocks: str
    inside: Mapping[str, str]
    outside: Mapping[str, str]

    def tensor(self, module: str) -> str | None:
        """Returns the GGUF tensor of a module's weight, such as `blk.0.attn_q.weight`; None if it has none here."""
        if module in self.outside:
            return f"{self.outside[module]}.weight"
        found = re.fullmatch(rf"{re.escape(self.blocks)}\.(\d+)\.(.+)", module)
        if found is None or found[2] not in self.inside:
            return None
        return f"blk.{found[1]}.{self.inside[found[2]]}.weight"

    def module(self, tensor: str) -> str | None:
        """Returns the module whose weight a GGUF tensor is; the inverse of `tensor`."""
        found = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.weight", tensor)
        if found is None:
            return None
        names = self.outside if found[1] is None else self.inside
        module = next((module for module, name in names.items() if name == found[2]), None)
        return module if module is None or found[1] is None else f"{self.blocks}.{found[1]}.{module}"


def _llama(name: str) -> Architecture:
    return Architecture(name, "model.layers", LLAMA, MODEL)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": _llama("llama"),
    "mistral": _llama("llama"),
    "qwen2": _llama("qwen2"),
    "qwen3": _llama("qwen3"),
    "gemma": _llama("gemma"),
    "gemma2": _llama("gemma2"),
    "gemma3_text": _llama("gemma3"),
    "granite": _llama("granite"),
    "olmo2": _llama("olmo2"),
    "smollm3": _llama("smollm3"),
    "stablelm": _llama("stablelm"),
    "starcoder2": Architecture(
        "starcoder2",
        "model.layers",
        {name: LLAMA[name] for name in LLAMA if "self_attn" in name} | {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
        MODEL,
    ),
    "phi": Architecture(
        "phi2",
        "model.layers",
        {name: LLAMA[name] for name in LLAMA if name.endswith(("q_proj", "k_proj", "v_proj"))}
        | {"self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
        MODEL,
    ),
    "phi3": Architecture(
        "phi3",
        "model.layers",
        {
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        MODEL,
    ),
    "gpt2": Architecture(
        "gpt2",
        "transformer.h",
        {
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "lm_head": "output"},
    ),
    "gpt_neox": Architecture(
        "gptneox",
        "gpt_neox.layers",
        {
            "attention.query_key_value": "attn_qkv",
            "attention.dense": "attn_output",
            "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
        {"gpt_neox.embed_in": "token_embd", "lm_head": "output"},
    ),
}
"""By `config.model_type` of the Hugging Face model."""


def architecture(model: object) -> Architecture:
    """Returns the architecture of a Hugging Face decoder.

    Raises:
        UnsupportedError: If it is none, or one whose names are not known here.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in ARCHITECTURES:
        what = f"of type {kind!r}{closest(kind, ARCHITECTURES)}" if isinstance(kind, str) else "no Hugging Face decoder"
        raise UnsupportedError(
            f"llamacpp exports Hugging Face decoders of the types {', '.join(ARCHITECTURES)}; "
            f"{type(model).__name__} is {what}"
        )
    return ARCHITECTURES[kind]


def tensor_names(model: object, modules: Iterable[str]) -> dict[str, str]:
    """Returns the GGUF tensor of every module's weight.

    Raises:
        UnsupportedError: If the model, or one of the modules, has no name in GGUF.
    """
    known = architecture(model)
    names = {}
    for module in modules:
        tensor = known.tensor(module)
        if tensor is None:
            raise UnsupportedError(
                f"llamacpp has no tensor for layer {module}: a {known.name} has "
                f"{', '.join(known.outside)} and, in {known.blocks}.N, {', '.join(known.inside)}"
            )
        names[module] = tensor
    return names


def check_names(model: object, names: Mapping[str, str]) -> str:
    """Holds the tensors of modules against the gguf package's own tables, there and back.

    Raises:
        UnsupportedError: If they differ.
    """
    import gguf

    known = architecture(model)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == known.name)
    numbers = [int(found[1]) for tensor in names.values() if (found := re.match(r"blk\.(\d+)\.", tensor))]
    table = gguf.get_tensor_name_map(kind, max(numbers, default=0) + 1)
    for module, tensor in names.items():
        theirs = table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        is_tied = known.tensor(module) != tensor
        if theirs != tensor and not is_tied:
            raise UnsupportedError(f"gguf calls the weight of {module} {theirs}, and this export {tensor}")
        if known.module(tensor) != module and not is_tied:
            raise UnsupportedError(f"tensor {tensor} is not the weight of {module} alone")
    return f"gguf's table of architecture {known.name} gives all {len(names)} layers the names of this export"
