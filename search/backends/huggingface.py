"""What the backends for language models share: Hugging Face models, their checkpoints, and the names in them.

A checkpoint is a folder with `config.json`, `model.safetensors` and the tokenizer's files, as
`transformers.AutoModelForCausalLM.from_pretrained` reads it. A layer's name is its module's, and its tensors' names
begin with it: `model.layers.0.mlp.up_proj` and `model.layers.0.mlp.up_proj.weight`.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from hwmodels import FLOAT, Format, Layer, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.backends.outcome import Fidelity, LayerExport
from search.errors import UnsupportedError
from search.files import write_json
from search.tasks.text import transformers_quietly

HEAD = "lm_head"  # transformers' name of the layer that turns features into logits
CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"
MODULES = (nn.Linear, nn.Embedding)  # whose weights quantized checkpoints hold


def language_model(model: nn.Module, layers: Collection[str], backend: str) -> Any:
    """Returns `model`, which transformers must be able to build again from its configuration.

    Args:
        model: A task's.
        layers: Those that are to be quantized.
        backend: Who asks.

    Raises:
        UnsupportedError: If it is no Hugging Face model, or its layers are not those its configuration describes.
    """
    require_hugging_face(model, backend)
    with transformers_quietly(), torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    described = {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if described.get(name) != tuple(tensor.shape):
            raise UnsupportedError(
                f"{backend} cannot write {type(model).__name__}: its configuration describes {name} with shape "
                f"{described.get(name)}, the model has {tuple(tensor.shape)}"
            )
    for name in layers:
        kind = type(fresh.get_submodule(name))
        if not issubclass(kind, MODULES):
            raise UnsupportedError(
                f"{backend} cannot write {type(model).__name__}: {name} is a {kind.__name__} in transformers, and only "
                "Linear and Embedding hold quantized weights"
            )
    return model


def require_hugging_face(model: nn.Module, backend: str) -> None:
    """Raises UnsupportedError unless `model` is a Hugging Face model; transformers need not be installed for that."""
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(model).__mro__}
    if "transformers.PreTrainedModel" not in kinds:
        raise UnsupportedError(
            f"{backend} takes Hugging Face models (transformers.PreTrainedModel), not {type(model).__name__}; "
            "export to onnxruntime or torchao instead"
        )


def own_integers(layer: Layer, format: Format, groups: Collection[int]) -> Format:
    """Returns the integers that a quantizer of linear layers gives a weight where it finds the ranges itself.

    `uintN` where there is a zero point, else `intN`; one scale per row, or per group of one of the sizes `groups` that
    divides the row. `float` where there is none like it.
    """
    is_integer = format.grid == "int" and format.scale == "fp32" and 2 <= format.bits <= 8
    if layer.kind != "linear" or len(layer.weight_shape) != 2 or not is_integer:
        return FLOAT
    found = Format(format.bits, signed=not format.has_zero_point)
    if format.granularity != "group" or format.group > layer.weight_shape[1]:
        return found
    is_kept = format.group in groups and layer.weight_shape[1] % format.group == 0
    return replace(found, granularity="group", group=format.group) if is_kept else FLOAT


def own_ranges(layer: Layer, precision: Precision, runs: Precision, who: str, why: str = "") -> LayerExport:
    """Says what becomes of a layer where the backend finds all ranges itself.

    Args:
        layer: The layer.
        precision: As planned.
        runs: What runs.
        who: The backend, as its users write it.
        why: It does not run as planned; by default, that there is no such format.
    """
    weight: Fidelity = "float" if runs.weight.is_float else "altered"
    input_: Fidelity = "float" if runs.input.is_float else "altered"
    notes = []
    if not runs.weight.is_float or not runs.input.is_float:
        notes.append(f"{who} finds the ranges itself")
    if runs != precision:
        notes.append(why or f"{who} has no {precision} for this {layer.kind} layer: it runs as {runs}")
    running = "" if precision == FLOAT_PRECISION else str(runs)
    return LayerExport(layer.name, str(precision), weight, input_, "", "; ".join(notes), running)


def save_checkpoint(
    model: Any,
    state: Mapping[str, Tensor],
    layers: Mapping[str, Mapping[str, Tensor]],
    quantization: Mapping[str, Any],
    folder: Path,
) -> None:
    """Writes a checkpoint that transformers loads without anything else, the same bytes every time.

    Where an embedding and an output layer share a weight and it is quantized, each gets its own copy of the codes, and
    the configuration says that nothing is shared: readers of packed weights share none.

    Args:
        model: What `language_model` returned; gives configuration, tokenizer and the settings for generating text.
        state: Parameters and buffers in float, by name.
        layers: Tensors that replace the weights of quantized layers, by layer, then by name within it.
        quantization: Becomes the configuration's `quantization_config`; nothing if empty.
        folder: Where to.
    """
    replaced = {f"{layer}.weight" for layer in layers}
    ties = bool(model.config.tie_word_embeddings) and not replaced & set(_shared(state))
    config = model.config.to_diff_dict() | {
        "architectures": [type(model).__name__],
        "dtype": "float32",  # of the scales too: transformers gives all tensors the model's type
        "tie_word_embeddings": ties,
        "use_cache": True,
    }
    left_out = _copies(state) if ties else set()
    tensors = {name: value for name, value in state.items() if name not in replaced | left_out}
    tensors |= {f"{layer}.{name}": value for layer, named in layers.items() for name, value in named.items()}
    stored = {name: value.detach().cpu().clone().contiguous() for name, value in sorted(tensors.items())}
    (folder / WEIGHTS).write_bytes(save(stored, {"format": "pt"}))
    write_json(folder / CONFIG, config | ({"quantization_config": dict(quantization)} if quantization else {}))
    with transformers_quietly():
        if getattr(model, "generation_config", None) is not None:
            generation = {
                key: value for key, value in model.generation_config.to_diff_dict().items() if value is not None
            }
            write_json(folder / GENERATION, generation | {"use_cache": True})
    save_tokenizer(model, folder)


def save_tokenizer(model: Any, folder: Path) -> None:
    """Writes the tokenizer that lies where `model` was read from; nothing where there is none."""
    with transformers_quietly() as transformers:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)
        except (OSError, ValueError, TypeError):  # a model that was never saved has no place
            return
        tokenizer.save_pretrained(folder)


def load_checkpoint(folder: str | Path) -> Callable[..., Any]:
    """Returns the model in a checkpoint, in evaluation mode, for recorded calls: it keeps no keys and values.

    Raises:
        UnsupportedError: If tensors are missing or left over.
    """
    with transformers_quietly() as transformers:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = getattr(transformers, config.architectures[0])
        model, loading = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[problem]:
            raise UnsupportedError(f"{folder} has {problem.replace('_', ' ')}: {sorted(loading[problem])[0]}")
    model.config.use_cache = False
    return model.eval()  # type: ignore[no-any-return]


def _shared(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Names of tensors that lie in the same memory as another."""
    places = {name: value.data_ptr() for name, value in state.items()}
    counts = Counter(places.values())
    return {name: place for name, place in places.items() if place and counts[place] > 1}


def _copies(state: Mapping[str, Tensor]) -> set[str]:
    """Of names that share memory, all but the first."""
    first: dict[int, str] = {}
    return {name for name, place in _shared(state).items() if first.setdefault(place, name) != name}
