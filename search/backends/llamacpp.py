"""The llamacpp backend: one ggml type per tensor, for `llama-quantize --tensor-type-file`.

Each line of `tensor-types.txt` is `regex=type`. llama-quantize lowers the regex's letters, searches it in the names of
the GGUF file's tensors (`tools/quantize/quantize.cpp`, `src/llama-quant.cpp`), and which of several matches wins has
changed between versions; so there is one anchored line per tensor. Overrides hold only where the type on the command
line is a quantized one, which every other matrix gets then; so matrices that the plan leaves alone are named as f32.

llama-quantize reads a float GGUF file and finds scales itself. Nothing carries the plan's own.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save_file
from torch import nn

from hwmodels import Layer, Precision
from search.backends import llamacpp_run
from search.backends.base import Emitter
from search.backends.ggml_types import TYPES, notes_on, type_of
from search.backends.gguf_names import OUTPUT, TOKEN_EMBEDDING, architecture, check_names, tensor_names
from search.backends.outcome import Fidelity, LayerExport
from search.backends.realize import simulate
from search.backends.verify import THREADS
from search.errors import DataError, UnsupportedError, one_line
from search.plan import Plan
from search.quantize.simulate import exact_inference
from search.tasks.task import Task

TYPES_FILE, LAYERS_FILE, ALTERED_FILE = "tensor-types.txt", "layers.json", "altered.safetensors"


class LlamaCpp(Emitter):
    """Writes `tensor-types.txt`, and `layers.json` with the module behind every tensor."""

    name = "llamacpp"
    proof = "validated"
    reason = "gguf knows all names, types and sizes; Llamas are quantized and run where llama-cpp-python is installed"
    packages = ("gguf",)
    ranges = "own"
    usage = f"""
    python convert_hf_to_gguf.py MODEL --outtype f32 --outfile model-f32.gguf  # MODEL: the Hugging Face folder, with
    #   the tensors of {ALTERED_FILE} in place of its own where that file is here
    llama-quantize --tensor-type-file {TYPES_FILE} model-f32.gguf model.gguf q8_0  # any quantized type for q8_0
    """

    def takes(self, model: nn.Module) -> None:
        """Takes decoders of Hugging Face whose tensors have names in llama.cpp."""
        architecture(model)

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Casts are kept; integers and small floats become the nearest ggml type, inputs stay in float."""
        name = type_of(layer, precision.weight)
        stored = TYPES[name]
        weight: Fidelity = "altered"
        if stored.format.is_float:
            weight = "float"
        elif stored.format == precision.weight and precision.weight.grid == "cast":
            weight = "exact"
        runs = Precision(stored.format)
        return LayerExport(
            layer.name,
            str(precision),
            weight,
            "float",
            note="; ".join(notes_on(layer, precision, name)),
            runs="" if weight != "altered" and runs == precision else str(runs),
        )

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes the files; parameters that a repair changed go beside them."""
        names = tensor_names(task.model, plan.policy)
        exported = [self.express(plan.network[name], precision) for name, precision in plan.policy.items()]
        types = {name: type_of(plan.network[name], precision.weight) for name, precision in plan.policy.items()}
        tied = _tied_output(task.model, names)
        if tied:
            names[tied[0]] = names[tied[1]]
        lines = unplanned(task.model, names)
        for name, tensor in names.items():
            if lines.setdefault(tensor, types[name]) != types[name]:
                raise UnsupportedError(
                    f"llamacpp stores {' and '.join(tied or names)} as one tensor, because they share a weight, and "
                    "this plan gives them two formats; tie them with space.ties"
                )
        text = "".join(f"^{re.escape(tensor)}$={kind}\n" for tensor, kind in lines.items())
        (folder / TYPES_FILE).write_text(text, encoding="utf-8")
        record = LayersFile(architecture=architecture(task.model).name, tensors=names)
        (folder / LAYERS_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if plan.altered:
            save_file({name: value.contiguous() for name, value in plan.altered.items()}, folder / ALTERED_FILE)
        return exported

    def read(self, folder: Path) -> Mapping[str, Precision]:
        """Reads both files; the precision of a layer is the bitplan format nearest to its tensor's type."""
        types, layers = read_types(folder / TYPES_FILE), read_layers(folder / LAYERS_FILE)
        for module, tensor in layers.tensors.items():
            if tensor not in types:
                raise DataError(f"{folder / TYPES_FILE} has no line for {tensor}, the weight of layer {module}")
        return {module: Precision(TYPES[types[tensor]].format) for module, tensor in layers.tensors.items()}

    def validate(self, plan: Plan, task: Task, folder: Path) -> tuple[str, tuple[str, ...]]:
        """Holds names, types and sizes against gguf; where llama.cpp is installed, has it quantize and run a Llama."""
        types, names = read_types(folder / TYPES_FILE), read_layers(folder / LAYERS_FILE).tensors
        named = check_names(task.model, names)
        weights = plan.simulate(task.model)
        arrays = {tensor: weights.float_weight(module).numpy() for module, tensor in names.items()}
        sizes = {tensor: check_type(types[tensor], weight) for tensor, weight in arrays.items()}
        quantized = sum(is_done for is_done, _ in sizes.values())
        bits = 8 * sum(size for _, size in sizes.values()) / sum(weight.size for weight in arrays.values())
        return f"gguf {version('gguf')}", (
            named,
            f"gguf knows the type of all {len(types)} tensors, and every row is a whole number of its blocks",
            f"gguf quantized {quantized} of {len(sizes)} tensors to the bytes counted here; "
            f"{bits:.2f} bits per weight over all layers, scales included",
            *self._run(plan, task, folder),
        )

    def _run(self, plan: Plan, task: Task, folder: Path) -> tuple[str, ...]:
        """What llama.cpp itself made of the files, in words; nothing where it cannot be asked."""
        if find_spec("llama_cpp") is None or not llamacpp_run.is_written(task.model):
            return ()
        types = read_types(folder / TYPES_FILE)
        lines = [(f"^{re.escape(tensor)}$", kind) for tensor, kind in types.items()]
        simulated = simulate(plan, task, self.read(folder))
        batch = next(iter(task.batches("report")))
        with exact_inference():
            expected = task.outputs(simulated.model, batch).cpu()
        with tempfile.TemporaryDirectory() as temporary:
            source, target = Path(temporary) / "f32.gguf", Path(temporary) / "model.gguf"
            llamacpp_run.write_gguf(simulated.apply({}), source)
            made = llamacpp_run.quantize(source, target, lines, THREADS)
            found = llamacpp_run.logits(target, task.inputs(batch), THREADS)
        for tensor, kind in types.items():
            if made[tensor] != kind:
                raise UnsupportedError(f"llama.cpp stored {tensor} as {made[tensor]}, not as {kind}")
        agreement = float((found.argmax(-1) == expected.argmax(-1)).double().mean())
        theirs, ours = (task.reduce(task.score(outputs, batch).double().numpy()) for outputs in (found, expected))
        by = f"llama.cpp (llama-cpp-python {version('llama_cpp_python')})"
        return (
            f"{by} gave all {len(types)} tensors their types",
            f"{by} reached {task.metric} {theirs:.4f} over {len(found)} samples of the report split, the simulation of "
            f"what runs {ours:.4f}; {agreement:.1%} of their predictions agree",
        )


class LayersFile(BaseModel):
    """`layers.json`: what the tensors are.

    Attributes:
        architecture: GGUF's name of it.
        tensors: The tensor of every layer of the plan.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    tensors: dict[str, str]


def _tied_output(model: nn.Module, names: Mapping[str, str]) -> tuple[str, str] | None:
    """The output layer and the embedding, where they share a weight: GGUF holds it once, as the embedding."""
    modules = {tensor: module for module, tensor in names.items()}
    if OUTPUT not in modules or TOKEN_EMBEDDING not in modules:
        return None
    output, embedding = modules[OUTPUT], modules[TOKEN_EMBEDDING]
    is_shared = model.get_submodule(output).weight is model.get_submodule(embedding).weight
    return (output, embedding) if is_shared else None


def unplanned(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Returns `f32` for the tensors of linear and embedding modules that the plan does not name."""
    known = architecture(model)
    weights = {id(model.get_submodule(name).weight) for name in names}
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    tensors = [known.tensor(name) for name, module in modules.items() if id(module.weight) not in weights]
    return {tensor: "f32" for tensor in tensors if tensor}


def read_types(file: Path) -> dict[str, str]:
    """Reads a file of tensor types as llama-quantize does, but one anchored line per tensor only.

    Returns:
        The type of every tensor.

    Raises:
        DataError: If a line is not of that form, names an unknown type, or a tensor twice.
    """
    types: dict[str, str] = {}
    for line in _text(file).split():
        found = re.fullmatch(r"\^((?:[a-z0-9_]|\\\.)+)\$=([a-z0-9_]+)", line)
        tensor = found[1].replace("\\.", ".") if found else ""
        if found is None or found[2] not in TYPES or tensor in types:
            raise DataError(
                f"{file} says {line!r}; allowed is one ^tensor$=type per tensor, its dots escaped, "
                f"with a type of {', '.join(TYPES)}"
            )
        types[tensor] = found[2]
    return types


def read_layers(file: Path) -> LayersFile:
    """Reads which tensor each layer's weight is.

    Raises:
        DataError: If the file is not of that form.
    """
    try:
        return LayersFile.model_validate_json(_text(file))
    except ValidationError as error:
        raise DataError(f"{file} is no list of layers and tensors: {one_line(error)}") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {one_line(error)}") from error


def check_type(name: str, weight: np.ndarray) -> tuple[bool, int]:
    """Quantizes a weight with the gguf package.

    Args:
        name: Type by llama-quantize's name.
        weight: A float32 array.

    Returns:
        Whether the package can quantize to the type (the larger blocks it only reads), and the bytes it takes.

    Raises:
        UnsupportedError: If the package does not know the type or counts other bytes.
    """
    import gguf

    kind = gguf.GGMLQuantizationType.__members__.get(name.upper())
    if kind is None:
        raise UnsupportedError(f"gguf {version('gguf')} has no type {name}")
    ours = TYPES[name]
    if gguf.GGML_QUANT_SIZES[kind] != (ours.block, ours.bytes) or weight.shape[-1] % ours.block:
        raise UnsupportedError(f"gguf cannot store rows of {weight.shape[-1]} values as {name}")
    size = weight.size // ours.block * ours.bytes
    try:
        found = gguf.quants.quantize(weight, kind).nbytes
    except NotImplementedError:
        return False, size
    if found != size:
        raise UnsupportedError(f"gguf makes {found} bytes of what is counted as {size}")
    return True, size
