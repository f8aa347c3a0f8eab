"""The coreml backend: which weight gets which compression, as `coremltools.optimize.coreml` reads it.

Two files of the schema of `OptimizationConfig.from_yaml` name every weight exactly, one for `linear_quantize_weights`
and one for `palettize_weights`, since each pass takes only its own kind of entry; weights left in float are named with
`null`. Names are those of the constants in the ML program that coremltools makes of `torch.export`'s program:
`p_block_qkv_weight_to_fp16` for the parameter `block.qkv.weight`, in float16, which is Core ML's own arithmetic.

The passes find scales and codebooks anew, from minimum and maximum or by k-means. `convert` therefore hands them the
simulation's values instead of float weights: what lies on a grid, and reaches its outermost code, leads back to the
same scale, and k-means to the same codebook; verifying says for how many weights that came true. (coremltools 9.0:
`optimize/coreml/_config.py`, `_quantization_passes.py`, `optimize/_utils.py`. Converting needs no macOS; running does.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from torch import nn

from hwmodels import FLOAT, Format, Layer, Precision
from search.backends.artifact import check_folder
from search.backends.base import Emitter
from search.backends.onnx_capture import call_arguments
from search.backends.outcome import Fidelity, LayerExport
from search.errors import DataError, UnsupportedError
from search.files import write_json, write_text
from search.plan import Plan
from search.quantize.simulate import QuantizedModel
from search.quiet import quietly
from search.tasks.task import Task
from search.trace import parameter_of, slow_attention

QUANTIZE, PALETTIZE, CONSTANTS = "quantize.yaml", "palettize.yaml", "constants.json"
SMALLEST = 10
"""Values below which coremltools compresses no weight (`backend/mil/load.py`, `should_use_weight_file`)."""
CODEBOOK_BITS = (1, 2, 3, 4, 6, 8)
DENSE = ("linear", "embedding")
FOUND = "Core ML finds scales and codebooks itself"
STEP = 2.0**-9
"""Largest difference, in parts of a weight's largest magnitude, that float16 scales and values account for."""


class Entry(BaseModel):
    """How one weight is compressed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight_threshold: Literal[0] = 0


class LinearEntry(Entry):
    """How one weight is quantized: fields of `OpLinearQuantizerConfig`."""

    mode: Literal["linear_symmetric", "linear"]
    dtype: Literal["int4", "uint4", "int8", "uint8"]
    granularity: Literal["per_tensor", "per_channel", "per_block"]
    block_size: tuple[int, ...] | None = None

    @property
    def format(self) -> Format:
        """The format that the entry stands for."""
        format = Format.parse(f"{self.dtype}-asym" if self.mode == "linear" and self.dtype[0] == "i" else self.dtype)
        if self.block_size:
            return replace(format, granularity="group", group=math.prod(self.block_size))
        return replace(format, granularity="tensor") if self.granularity == "per_tensor" else format


class PaletteEntry(Entry):
    """How one weight is palettized: fields of `OpPalettizerConfig`."""

    mode: Literal["kmeans"]
    nbits: Literal[1, 2, 3, 4, 6, 8]
    granularity: Literal["per_tensor", "per_grouped_channel"]
    group_size: Literal[1] | None = None
    channel_axis: int | None = None

    @property
    def format(self) -> Format:
        """The format that the entry stands for."""
        format = Format.parse(f"codebook{self.nbits}")
        return format if self.granularity == "per_tensor" else replace(format, granularity="channel")


class Configuration(BaseModel):
    """One file, as `OptimizationConfig.from_yaml` reads it; layers in float have no entry of their own but `null`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config_type: Literal["OpLinearQuantizerConfig", "OpPalettizerConfig"]
    op_name_configs: dict[str, LinearEntry | PaletteEntry | None]


FILES: dict[str, type[LinearEntry] | type[PaletteEntry]] = {QUANTIZE: LinearEntry, PALETTIZE: PaletteEntry}
KINDS: dict[str, Literal["OpLinearQuantizerConfig", "OpPalettizerConfig"]] = {
    QUANTIZE: "OpLinearQuantizerConfig",
    PALETTIZE: "OpPalettizerConfig",
}


class CoreML(Emitter):
    """Writes `quantize.yaml` and `palettize.yaml`, and in `constants.json` what each weight is called there."""

    name = "coreml"
    proof = "validated"
    reason = "coremltools converts and compresses, and every weight is checked; models run on Apple's systems alone"
    ranges = "own"
    packages = ("coremltools",)
    usage = """
    import search; from pathlib import Path
    from search.backends.coreml import convert  # or OptimizationConfig.from_yaml("quantize.yaml") on a program of yours
    program = convert(search.Plan.load("plan.json"), float_model, example_input, Path("this folder"))
    program.save("model.mlpackage")
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Weights get 4 or 8 bits, or a codebook; inputs stay in float16."""
        return exported_layer(layer, precision)

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes both configurations and the names."""
        simulated = plan.simulate(task.model)
        simulated.apply({})
        names = constants(simulated, task.example_input)
        entries: dict[str, LinearEntry | PaletteEntry | None] = {}
        for layer, constant in names.items():
            found = entry(plan.network[layer], plan.policy[layer].weight)
            if entries.setdefault(constant, found) != found:
                raise UnsupportedError(
                    f"coreml stores the weight of layer {layer} once for all layers that share it, so they need the "
                    "same weight format; search with space.ties, or for export=coreml"
                )
        layers = [exported_layer(plan.network[name], precision) for name, precision in plan.policy.items()]
        if lost := next((layer.name for layer in layers if layer.weight != "float" and layer.name not in names), None):
            raise UnsupportedError(f"the exported program does not read the weight of layer {lost}; leave it in float")
        for file, kind in FILES.items():
            mine = {name: one if isinstance(one, kind) else None for name, one in entries.items()}
            config = Configuration(config_type=KINDS[file], op_name_configs=mine)
            write_text(folder / file, yaml.safe_dump(_plain(config), sort_keys=False, width=120))
        write_json(folder / CONSTANTS, names)
        return layers

    def read(self, folder: Path) -> Mapping[str, Precision]:
        """Reads the weight formats that the files give to layers."""
        entries = {name: one for file in FILES for name, one in _entries(folder / file).items() if one}
        names = _names(folder)
        return {layer: Precision(entries[name].format) for layer, name in names.items() if name in entries}

    def validate(self, plan: Plan, task: Task, folder: Path) -> tuple[str, tuple[str, ...]]:
        """Has coremltools convert the network, read the files and apply them; looks at every weight that comes out."""
        program = convert(plan, task.model, task.example_input, folder)
        said, names = self.read(folder), _names(folder)
        applied, planned, kept = compressed_weights(program), plan.simulate(task.model), 0
        planned.apply(said)
        for name, constant in names.items():
            layer, wanted = plan.network[name], said.get(name, Precision()).weight
            found, groups, values = applied.get(constant, (FLOAT, 1, np.zeros(0)))
            expected = 1 if wanted.is_float else wanted.groups(layer.weight_shape, layer.channel_axis)
            if (found, groups) != (wanted.base, expected):
                raise UnsupportedError(
                    f"coremltools stores the weight of {name} as {found} with {groups} scales, not as {wanted}"
                )
            if not wanted.is_float:
                weight = planned.weight(name).detach().cpu().numpy()
                kept += bool(np.abs(values - weight).max() <= STEP * np.abs(weight).max())
        return f"coremltools {self.versions()['coremltools']}", (
            f"its OptimizationConfig.from_yaml reads {' and '.join(FILES)}",
            f"in the ML program it makes of the network, all {len(names)} weights are stored as the files say, "
            f"{len(names) - len(said)} of them in float16",
            f"{kept} of the {len(said)} compressed weights hold the simulation's values, to float16 rounding",
        )


def exported_layer(layer: Layer, precision: Precision) -> LayerExport:
    """Says what becomes of a layer."""
    found = entry(layer, precision.weight)
    running = found.format if found else FLOAT
    weight: Fidelity = "float" if found is None else "altered"
    notes = []
    if found:
        notes.append(
            FOUND if running == precision.weight else f"Core ML makes {running} of {precision.weight}; {FOUND}"
        )
    elif not precision.weight.is_float:
        notes.append(f"Core ML compresses no {precision.weight} weight of {layer.kind} here: it is stored as float16")
    if not precision.input.is_float:
        notes.append("Core ML quantizes inputs only with calibration on macOS: the input stays in float16")
    runs = Precision(running)
    is_faulty = not (precision.weight.is_float and precision.input.is_float)
    return LayerExport(
        layer.name, str(precision), weight, "float", "fp16", "; ".join(notes), str(runs) if is_faulty else ""
    )


def entry(layer: Layer, format: Format) -> LinearEntry | PaletteEntry | None:
    """Returns the entry nearest to a weight's format; None where it stays in float."""
    is_module = layer.kind in DENSE or layer.kind.startswith("conv")
    if not is_module or layer.weight_count < SMALLEST or format.is_float:
        return None
    if format.grid == "codebook":
        bits = next(bits for bits in CODEBOOK_BITS if bits >= format.bits)
        by_channel = format.granularity == "channel"
        shared = {"granularity": "per_grouped_channel", "group_size": 1, "channel_axis": layer.channel_axis}
        return PaletteEntry.model_validate(
            {"mode": "kmeans", "nbits": bits} | (shared if by_channel else {"granularity": "per_tensor"})
        )
    if format.grid != "int" or format.scale != "fp32" or not 1 < format.bits <= 8:
        return None
    bits = 4 if format.bits <= 4 else 8
    block = _block(layer, format)
    has_own_sign = format.signed or not format.has_zero_point
    return LinearEntry.model_validate(
        {
            "mode": "linear" if format.has_zero_point else "linear_symmetric",
            "dtype": f"{'' if has_own_sign else 'u'}int{bits}",
            "granularity": "per_block" if block else "per_tensor" if format.granularity == "tensor" else "per_channel",
            "block_size": block,
        }
    )


def _block(layer: Layer, format: Format) -> tuple[int, ...] | None:
    """The shape of a group, where it is whole inputs of one channel, several of which make up the channel."""
    if format.granularity != "group":
        return None
    shape = list(layer.weight_shape)
    axis = 1 - layer.channel_axis
    kernel = math.prod(shape[2:])
    inputs, rest = divmod(format.group, kernel)
    if rest or not inputs or inputs >= shape[axis] or shape[axis] % inputs:
        return None
    shape[layer.channel_axis], shape[axis] = 1, inputs
    return tuple(shape)


def constants(simulated: QuantizedModel, example_input: Any) -> dict[str, str]:
    """Returns the name that each layer's weight has in the ML program, for layers whose weight is a constant there.

    Raises:
        UnsupportedError: If `torch.export` does not take the model.
    """
    program = exported_program(simulated.model, example_input)
    placeholders = {parameter: name for name, parameter in program.graph_signature.inputs_to_parameters.items()}
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    found = {}
    for layer in simulated.network:
        if layer.kind not in DENSE and not layer.kind.startswith("conv"):
            continue
        owner, parameter = parameter_of(simulated.model, layer.name)
        weight = owner.get_parameter(parameter)
        for name, value in simulated.model.named_parameters(remove_duplicate=False):
            if value is weight and placeholders.get(name) in used:
                found[layer.name] = f"{placeholders[name]}_to_fp16"
    return found


def exported_program(model: nn.Module, example_input: Any) -> Any:
    """Returns `torch.export`'s program of a model, in core operations.

    Raises:
        UnsupportedError: If it does not take the model.
    """
    args, kwargs = call_arguments(example_input)
    try:
        with quietly("torch"), torch.no_grad(), slow_attention():
            return torch.export.export(model.eval(), args, kwargs).run_decompositions({})
    except Exception as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise UnsupportedError(f"{type(model).__name__} cannot be exported for Core ML: {reason}") from error


def convert(plan: Plan, model: nn.Module, example_input: Any, path: Path) -> Any:
    """Returns the plan's network as a compressed ML program, a `coremltools.models.MLModel` for iOS 18, macOS 15.

    Args:
        plan: The plan that was exported.
        model: Its model, in float.
        example_input: What the model takes; its shapes are the program's.
        path: The folder that an export wrote.

    Raises:
        DataError: If the folder holds no export of this plan, or `model` is not the plan's.
        UnsupportedError: If coremltools does not convert the model, or a constant that the files name is not there.
    """
    check_folder(path, plan, CoreML.name)
    simulated = plan.simulate(model)
    simulated.apply(CoreML().read(path))
    program = exported_program(simulated.model, example_input)
    with quietly("coremltools"):
        import coremltools
        from coremltools.optimize import coreml

        try:
            found = coremltools.convert(
                program,
                minimum_deployment_target=coremltools.target.iOS18,
                compute_precision=coremltools.precision.FLOAT16,
                skip_model_load=True,
            )
        except Exception as error:
            raise UnsupportedError(f"coremltools does not convert {type(model).__name__}: {error}") from error
        shapes = {name: one.val.shape for name, one in coreml.get_weights_metadata(found, weight_threshold=0).items()}
        for layer, constant in _names(path).items():
            shape = plan.network[layer].weight_shape
            if math.prod(shape) >= SMALLEST and shapes.get(constant) != shape:
                raise UnsupportedError(f"the ML program has no constant {constant} of shape {shape} for layer {layer}")
        for file, compress in ((QUANTIZE, coreml.linear_quantize_weights), (PALETTIZE, coreml.palettize_weights)):
            if any(_entries(path / file).values()):
                found = compress(found, coreml.OptimizationConfig.from_yaml(str(path / file)))
        return found


def compressed_weights(program: Any) -> dict[str, tuple[Format, int, np.ndarray[Any, Any]]]:
    """Returns what an ML program's compressed constants are, by name: the format, the number of scales, the values."""
    found = {}
    for operation in program._mil_program.functions["main"].operations:
        inputs = operation.inputs
        if operation.op_type == "constexpr_blockwise_shift_scale":
            number, is_shifted = inputs["data"].dtype, inputs.get("offset") is not None
            is_signed = not number.is_unsigned()
            span: Literal["asym", ""] = "asym" if is_shifted and is_signed else ""
            format = Format(number.get_bitwidth(), signed=is_signed, span=span)
            groups, ending = math.prod(inputs["scale"].shape), "_quantized"
        elif operation.op_type == "constexpr_lut_to_dense":
            *tables, entries, _ = inputs["lut"].shape
            format, groups, ending = Format(int(math.log2(entries)), grid="codebook"), math.prod(tables), "_palettized"
        else:
            continue
        values = np.asarray(operation.materialized_val_inference(), np.float32)
        found[operation.name.removesuffix(ending)] = format, groups, values
    return found


def _plain(config: Configuration) -> dict[str, Any]:
    """The file's content; `null` for weights that stay in float is kept."""
    entries = {
        name: one and one.model_dump(mode="json", exclude_none=True) for name, one in config.op_name_configs.items()
    }
    return {"config_type": config.config_type, "op_name_configs": entries}


def _names(folder: Path) -> dict[str, str]:
    try:
        return TypeAdapter(dict[str, str]).validate_json((folder / CONSTANTS).read_bytes())
    except (ValidationError, OSError) as error:
        raise DataError(f"{folder / CONSTANTS} is damaged: {error}") from error


def _entries(file: Path) -> dict[str, LinearEntry | PaletteEntry | None]:
    try:
        return Configuration.model_validate(yaml.safe_load(file.read_text())).op_name_configs
    except (ValidationError, yaml.YAMLError, OSError) as error:
        raise DataError(f"{file} is damaged: {error}") from error
