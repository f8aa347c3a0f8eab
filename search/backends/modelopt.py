"""The modelopt backend: a configuration of NVIDIA's Model Optimizer, and the plan's ranges as its quantizers keep them.

A quantizer of ModelOpt stores the largest magnitude `amax` of each scale, and puts a value `x` on
`round((x - bias) * s) / s + bias` with `s = (2**(bits - 1) - 1) / amax`, clipped to signed codes: without the most
negative one if `narrow_range` is set. A bias of whole steps is a zero point. So every integer with a static scale, and
float8 e4m3, comes out as planned but for float32 rounding. (nvidia-modelopt 0.47: `torch/quantization/tensor_quant.py`,
`config.py`, `nn/modules/tensor_quantizer.py`; quantizers are simulated, so nothing runs faster for them.)
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hwmodels import FLOAT, Format, Layer, Precision
from search.backends.artifact import check_folder
from search.backends.base import Backend
from search.backends.outcome import Fidelity, LayerExport, Verification
from search.backends.torch_apply import check_applied, exact_or_float, network_to_quantize
from search.errors import UnsupportedError
from search.kinds import MODULE_KINDS
from search.plan import Plan
from search.quantize.formats import Parameters
from search.quantize.simulate import QuantizedModel, exact_inference
from search.quiet import quietly
from search.tasks.task import Task, call

CONFIG, RANGES = "modelopt.yaml", "amax.safetensors"
KINDS = frozenset(MODULE_KINDS.values())
AFFINE_BITS = 8
"""Widest integer with a zero point: float32 subtracts the bias before it rounds, which costs as many bits."""
ANY_RANK = range(-5, 0)


class ModelOpt(Backend):
    """Writes `modelopt.yaml`, what `mtq.quantize` takes, and `amax.safetensors`, its quantizers' buffers."""

    name = "modelopt"
    proof = "executed"
    packages = ("nvidia-modelopt",)
    recalibrates = True
    usage = """
    import search; from pathlib import Path
    from search.backends.modelopt import load  # or: mtq.quantize(model, yaml.safe_load(open("modelopt.yaml")))
    model = load(search.Plan.load("plan.json"), float_model, Path("this folder"))  # with batch norm folded, ranges set
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Integers of 2 bits or more and float8 e4m3 keep their values; the rest stays in float."""
        return _exported_layer(layer, precision)

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes configuration and, unless ModelOpt is to find them, ranges."""
        write_artifact(plan.simulate(task.model), plan.policy, folder, recalibrate)
        layers = [_exported_layer(plan.network[name], precision) for name, precision in plan.policy.items()]
        return [_recalibrated(layer) for layer in layers] if recalibrate else layers

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification:
        """Has ModelOpt quantize the folded network in a fresh process, and runs it over the report split."""
        recalibrated = not (folder / RANGES).exists()
        return check_applied(
            self.name, f"{__name__}:quantized", plan, task, folder, layers, write_artifact, recalibrated
        )


def load(plan: Plan, model: nn.Module, path: Path, calibration: Iterable[Any] = ()) -> nn.Module:
    """Returns a copy of `model`, batch norm folded, with ModelOpt's quantizers as exported into the folder `path`.

    Args:
        plan: The plan that was exported.
        model: Its model, in float.
        path: The folder.
        calibration: Inputs, as the model takes them, for an export with ranges of ModelOpt's own.

    Raises:
        DataError: If the folder holds no export of this plan, or `model` is not the plan's.
        UnsupportedError: If ModelOpt has no quantizer for a layer.
    """
    layers = check_folder(path, plan, ModelOpt.name)
    weights = {layer.name: Precision.parse(layer.runs or layer.precision) for layer in layers}
    network = network_to_quantize(plan.simulate(model), weights if (path / RANGES).exists() else {})
    return apply(network, path, calibration)


def quantized(given: tuple[nn.Module, Path | None, Iterable[Any]]) -> nn.Module:
    """Returns a float network with the quantizers of an artifact, or as it is where there is no artifact."""
    model, folder, calibration = given
    return apply(model, folder, calibration) if folder else model


def apply(model: nn.Module, folder: Path, calibration: Iterable[Any] = ()) -> nn.Module:
    """Puts the quantizers of an artifact into a float network, in place, and returns it.

    Args:
        model: The plan's network, batch norm folded, in evaluation mode.
        folder: Holds the artifact.
        calibration: Inputs for an artifact without ranges.

    Raises:
        UnsupportedError: If ModelOpt has no quantizer for a layer.
    """
    with quietly("modelopt", "torch"):
        import modelopt.torch.quantization as mtq

        def forward(network: nn.Module) -> None:
            with exact_inference():
                for inputs in calibration:
                    call(network, inputs)

        config = yaml.safe_load((folder / CONFIG).read_text())
        mtq.quantize(model, config, forward if config["algorithm"] else None)
    quantizers = dict(model.named_modules(remove_duplicate=False))
    for entry in config["quant_cfg"][1:]:
        name = _unescaped(entry["quantizer_name"])
        if not getattr(quantizers.get(name), "is_enabled", False):
            layer = name.rpartition(".")[0]
            kind = type(quantizers[layer]).__name__ if layer in quantizers else "missing"
            raise UnsupportedError(f"modelopt has no quantizer {name}: {layer} is {kind}; leave it in float")
    for name, value in (load_file(folder / RANGES) if (folder / RANGES).exists() else {}).items():
        quantizer, _, buffer = name.rpartition(".")
        setattr(quantizers[quantizer], buffer.removeprefix("_"), value)
    return model


def write_artifact(
    simulated: QuantizedModel, policy: Mapping[str, Precision], folder: Path, recalibrate: bool = False
) -> None:
    """Writes the configuration and ranges of a policy."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    ranges: dict[str, Tensor] = {}
    for name, precision in policy.items():
        layer = simulated.network[name]
        module = "" if simulated.owner(name) is simulated.model else name
        if weight := weight_quantizer(layer, precision.weight):
            entries.append({"quantizer_name": _named(glob.escape(module), "weight_quantizer"), "cfg": weight})
            parameters, shape = simulated.weight_parameters(name, precision.weight), _scale_shape(layer, weight)
            ranges |= _buffers(_named(module, "weight_quantizer"), precision.weight, parameters, shape)
        if input_ := input_quantizer(layer, precision.input):
            entries.append({"quantizer_name": _named(glob.escape(module), "input_quantizer"), "cfg": input_})
            if precision.input.has_static_range:
                found = simulated.input_range(name, precision.input)
                placed = {"scale": torch.tensor(found.scale), "zero_point": torch.tensor(found.zero_point)}
                ranges |= _buffers(_named(module, "input_quantizer"), precision.input, placed, ())
    config = {"quant_cfg": entries, "algorithm": "max" if recalibrate else None}
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    if not recalibrate:
        save_file(ranges, folder / RANGES)


def weight_quantizer(layer: Layer, format: Format) -> dict[str, Any] | None:
    """Returns ModelOpt's attributes of a weight's quantizer; None where it has none of these values."""
    number = _number(format)
    if number is None or layer.kind not in KINDS:
        return None
    rank = len(layer.weight_shape)
    if format.granularity == "tensor":
        return number | _bias(format, range(rank))
    if format.granularity == "group" and format.group < math.prod(layer.weight_shape) // layer.channels:
        blocks = _blocks(layer, format.group)
        # ModelOpt reshapes a weight of two dimensions to rows of one block, others to two dimensions per blocked axis.
        inner = [1] if rank == 2 else range(2, 2 * rank, 2)
        return None if blocks is None else number | {"block_sizes": blocks} | _bias(format, inner)
    others = [axis for axis in range(rank) if axis != layer.channel_axis]
    return number | {"axis": layer.channel_axis} | _bias(format, others)


def input_quantizer(layer: Layer, format: Format) -> dict[str, Any] | None:
    """Returns ModelOpt's attributes of an input's quantizer; None where it has none of these values."""
    number = _number(format)
    if number is None or layer.kind not in KINDS or not layer.quantizes_input:
        return None
    if format.has_static_range:
        return number | _bias(format, ANY_RANK)
    if format.has_zero_point or not format.signed or format.span or format.granularity == "group":
        return None  # ModelOpt's ranges found at run time reach as far up as down
    if format.granularity == "sample":
        return number | {"axis": 0, "type": "dynamic"}
    return number | {"block_sizes": {-1 if layer.kind == "linear" else 1: None, "type": "dynamic"}}


def _number(format: Format) -> dict[str, Any] | None:
    """The attributes that say which values a quantizer has; None where ModelOpt has none such that run anywhere."""
    if format.base == Format.parse("fp8_e4m3"):
        return {"num_bits": [4, 3]}
    if format.grid != "int" or format.scale != "fp32" or format.bits < 2:
        return None
    if _is_affine(format) and format.bits > AFFINE_BITS:
        return None
    return {"num_bits": format.bits, "narrow_range": format.lowest == -format.highest}


def _is_affine(format: Format) -> bool:
    """Whether codes are not around zero. ModelOpt's own unsigned codes refuse negative values, a bias clips them."""
    return format.grid == "int" and (format.has_zero_point or not format.signed)


def _bias(format: Format, axes: Iterable[int]) -> dict[str, Any]:
    """The attribute of a zero point; `axes` are those that share it, for calibration."""
    return (
        {"bias": {axis: None for axis in axes} | {"type": "static", "method": "max_min"}} if _is_affine(format) else {}
    )


def _blocks(layer: Layer, group: int) -> dict[int, int] | None:
    """The block sizes of groups of consecutive values of one output channel; None where blocks cannot be those."""
    if len(layer.weight_shape) == 2:
        return {-1: group}
    shape, kernel = layer.weight_shape, math.prod(layer.weight_shape[2:])
    if layer.channel_axis != 0 or group % kernel or shape[1] % (group // kernel):
        return None
    return {1: group // kernel} | {axis: size for axis, size in enumerate(shape) if axis > 1}


def _scale_shape(layer: Layer, quantizer: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of `amax` that broadcasts against the weight as ModelOpt lays it out."""
    rank = len(layer.weight_shape)
    if "block_sizes" in quantizer:
        return (-1, 1) if rank == 2 else (layer.channels, -1, *[1] * (2 * rank - 3))
    if "axis" in quantizer:
        return tuple(-1 if axis == layer.channel_axis else 1 for axis in range(rank))
    return ()


def _buffers(quantizer: str, format: Format, parameters: Parameters, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The buffers of a quantizer under given scales and zero points, by their names in the network's state.

    The bias is computed as the quantizer computes its values, so that zero stays zero.
    """
    top = float((1 << (format.bits - 1)) - 1) if format.grid == "int" else format.largest
    amax = (parameters["scale"].float() * top).reshape(shape)
    buffers = {f"{quantizer}._amax": amax.contiguous()}
    if _is_affine(format):
        zero_point = parameters.get("zero_point", torch.zeros(())).expand(parameters["scale"].shape)
        steps = format.lowest + (1 << (format.bits - 1)) - zero_point
        buffers[f"{quantizer}._bias_value"] = (steps.reshape(shape) / (torch.tensor(top) / amax)).contiguous()
    return buffers


def _named(module: str, quantizer: str) -> str:
    """The name of a module's quantizer; a network that is itself the layer has no name."""
    return f"{module}.{quantizer}" if module else quantizer


def _unescaped(name: str) -> str:
    """The name that `glob.escape` was given."""
    for character in "*?[":
        name = name.replace(f"[{character}]", character)
    return name


def _exported_layer(layer: Layer, precision: Precision) -> LayerExport:
    weight = precision.weight if weight_quantizer(layer, precision.weight) else FLOAT
    input_ = precision.input if input_quantizer(layer, precision.input) else FLOAT
    needs_cuda = any(format.scale in ("e8m0", "e4m3") for format in (precision.weight, precision.input))
    reason = " without CUDA kernels" if needs_cuda else ""
    return exact_or_float(ModelOpt.name, layer, precision, Precision(weight, input_), reason)


def _recalibrated(layer: LayerExport) -> LayerExport:
    """What becomes of a layer whose ranges ModelOpt finds."""
    weight: Fidelity = "float" if layer.weight == "float" else "altered"
    input_: Fidelity = "float" if layer.input == "float" else "altered"
    if "altered" not in (weight, input_):
        return layer
    note = "; ".join(filter(None, [layer.note, "ModelOpt finds the ranges by its max calibration, not the plan"]))
    return replace(layer, weight=weight, input=input_, note=note, runs=layer.runs or layer.precision)
