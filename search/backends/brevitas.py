"""The brevitas backend: keywords of Brevitas' quantizers for every layer, and the plan's scales and zero points.

Brevitas makes a quantizer from a class and keywords. Here the scale is a constant (`scaling_impl_type="const"`) and the
integer threshold it would be divided by is 1, so that its integers are `round(x / scale + zero_point)`, clipped, and
its small floats those of OCP under the same scale: what the simulation computes, bit for bit but for inputs that lie
just between two codes. (brevitas 0.13: `core/quant/int_base.py`, `core/quant/float.py`, `core/zero_point.py`,
`graph/quantize.py`; layers are simulated in float32, so nothing runs faster for them.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hwmodels import FLOAT, Format, Layer, Precision
from search.backends.artifact import check_folder
from search.backends.base import Backend
from search.backends.outcome import LayerExport, Verification
from search.backends.torch_apply import check_applied, exact_or_float, network_to_quantize
from search.errors import UnsupportedError
from search.kinds import MODULE_KINDS, kind_of
from search.plan import Plan
from search.quantize.formats import Parameters
from search.quantize.simulate import QuantizedModel
from search.quiet import quietly
from search.tasks.task import Task

CONFIG, RANGES = "brevitas.json", "ranges.safetensors"
KINDS = frozenset(MODULE_KINDS.values())
SIDES = ("weight_quant", "input_quant")
AFFINE_BITS = 8
"""Widest integer with a zero point: float32 adds it before it rounds, which costs as many bits."""


class Brevitas(Backend):
    """Writes `brevitas.json`, keywords of every layer's quantizers, and `ranges.safetensors`, those of tensors."""

    name = "brevitas"
    proof = "executed"
    packages = ("brevitas",)
    usage = """
    import search; from pathlib import Path
    from search.backends.brevitas import load
    model = load(search.Plan.load("plan.json"), float_model, Path("this folder"))
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Integers of 2 bits or more, small floats and microscaled weights keep their values; others are in float."""
        weight = precision.weight if weight_keywords(layer, precision.weight) else FLOAT
        input_ = precision.input if input_keywords(layer, precision.input) else FLOAT
        return exact_or_float(self.name, layer, precision, Precision(weight, input_))

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes keywords and ranges."""
        write_artifact(plan.simulate(task.model), plan.policy, folder)
        return [self.express(plan.network[name], precision) for name, precision in plan.policy.items()]

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification:
        """Has Brevitas quantize the folded network in a fresh process, and runs it over the report split."""
        return check_applied(self.name, f"{__name__}:quantized", plan, task, folder, layers, write_artifact)


def load(plan: Plan, model: nn.Module, path: Path) -> nn.Module:
    """Returns a copy of `model`, batch norm folded, with Brevitas' layers as exported into the folder `path`.

    Raises:
        DataError: If the folder holds no export of this plan, or `model` is not the plan's.
        UnsupportedError: If Brevitas has no layer in place of one of the model's.
    """
    layers = check_folder(path, plan, Brevitas.name)
    runs = {layer.name: Precision.parse(layer.runs or layer.precision) for layer in layers}
    return apply(network_to_quantize(plan.simulate(model), runs), path)


def quantized(given: tuple[nn.Module, Path | None, Iterable[Any]]) -> nn.Module:
    """Returns a float network with the layers of an artifact, or as it is where there is no artifact."""
    model, folder, _ = given
    return apply(model, folder) if folder else model


def apply(model: nn.Module, folder: Path) -> nn.Module:
    """Puts Brevitas' layers in the place of a float network's, by `layerwise_quantize`, and returns the network.

    Args:
        model: The plan's network, batch norm folded, in evaluation mode; it is changed.
        folder: Holds the artifact.

    Raises:
        UnsupportedError: If Brevitas has no layer in place of one of the model's.
    """
    keywords, ranges = json.loads((folder / CONFIG).read_text())["layers"], load_file(folder / RANGES)
    root = nn.ModuleDict({"model": model}).eval()
    modules = dict(root.named_modules(remove_duplicate=False))
    places = {name: "model" if kind_of(model, MODULE_KINDS) else f"model.{name}" for name in keywords}
    held = {id(modules[path]): name for name, path in places.items() if path in modules}
    missing = next((name for name in keywords if name not in held.values()), None)
    if missing is not None:
        raise UnsupportedError(f"brevitas finds no layer {missing} in {type(model).__name__}; is it the plan's model?")
    paths = {path: held[id(module)] for path, module in modules.items() if id(module) in held}
    kinds = {type(modules[path]) for path in paths}
    blacklist = [path for path, module in modules.items() if type(module) in kinds and path not in paths]
    with quietly("brevitas", "torch"):
        from brevitas.graph.quantize import layerwise_quantize

        def quantizer(path: str, side: str) -> Any:
            name = paths[path]
            prefix = f"{name}/{side}/"
            tensors = {key.removeprefix(prefix): value for key, value in ranges.items() if key.startswith(prefix)}
            said = keywords[name].get(side)
            return _quantizer(side, said, tensors) if said else None

        layerwise_quantize(root, {kind: _replacement(kind, quantizer) for kind in kinds}, blacklist)
    for path, name in paths.items():  # a module that the network holds twice stays one
        parent, _, child = path.rpartition(".")
        setattr(root.get_submodule(parent), child, root.get_submodule(places[name]))
    proxies: list[Any] = [module for module in root.modules() if hasattr(module, "skip_create_quant_tensor")]
    for proxy in proxies:
        # Plain values from quantizers, as in Brevitas' own inference mode: the scales that it would derive for results,
        # which nobody asks for, are not to be had for transposed convolutions and some others. Grouped weights get
        # their own shape back only on the other way.
        proxy.skip_create_quant_tensor = not type(proxy).__name__.startswith("Groupwise")
    found: nn.Module = root["model"]
    return found


def _replacement(kind: type[nn.Module], quantizer: Any) -> tuple[type[nn.Module], dict[str, Any]]:
    """What stands for modules of a type: a class and its keywords, which must be lambdas to be asked by name."""
    import brevitas.nn

    base = next((base for base in MODULE_KINDS if issubclass(kind, base)), nn.Module)
    if kind.forward is not base.forward or not hasattr(brevitas.nn, f"Quant{base.__name__}"):
        raise UnsupportedError(f"brevitas has no layer in place of {kind.__name__}; leave its layers in float")
    keywords: dict[str, Any] = {"weight_quant": lambda module, name: quantizer(name, "weight_quant")}
    if base is not nn.Embedding:
        keywords |= {"input_quant": lambda module, name: quantizer(name, "input_quant")}
        keywords |= {"bias_quant": None, "return_quant_tensor": False}
    return getattr(brevitas.nn, f"Quant{base.__name__}"), keywords


def _quantizer(side: str, keywords: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Makes a quantizer of Brevitas' own classes."""
    from brevitas.core.utils import SingleArgStatelessBuffer
    from brevitas.core.zero_point import ParameterZeroPoint
    from brevitas.proxy.groupwise_float_parameter_quant import GroupwiseWeightFloatQuantProxyFromInjector
    from brevitas.proxy.groupwise_int_parameter_quant import GroupwiseWeightQuantProxyFromInjector
    from brevitas.quant.float_quant_ocp import FpOCPActPerTensorFloat, FpOCPWeightPerChannelFloat
    from brevitas.quant.scaled_int import Int8ActPerTensorFloat, Int8WeightPerChannelFloat

    is_weight, is_float = side == "weight_quant", "exponent_bit_width" in keywords
    given: dict[str, Any] = {**keywords, **tensors, "scaling_impl_type": "const", "scaling_min_val": None}
    if is_float:
        given["float_scaling_impl"] = None
    else:
        given["int_scaling_impl"] = SingleArgStatelessBuffer(1.0)
    if "zero_point_init" in tensors:
        shape = tuple(tensors["zero_point_init"].shape)
        given |= {"zero_point_impl": ParameterZeroPoint, "zero_point_shape": shape, "quantize_zero_point": True}
    if "group_size" in keywords:
        grouped = GroupwiseWeightFloatQuantProxyFromInjector if is_float else GroupwiseWeightQuantProxyFromInjector
        given["proxy_class"] = grouped
    classes = {
        (True, False): Int8WeightPerChannelFloat,
        (True, True): FpOCPWeightPerChannelFloat,
        (False, False): Int8ActPerTensorFloat,
        (False, True): FpOCPActPerTensorFloat,
    }
    return classes[is_weight, is_float].let(**given)


def write_artifact(simulated: QuantizedModel, policy: Mapping[str, Precision], folder: Path) -> None:
    """Writes the keywords and ranges of a policy; a layer in float has no entry."""
    layers: dict[str, dict[str, Any]] = {}
    ranges: dict[str, Tensor] = {}
    for name, precision in policy.items():
        layer = simulated.network[name]
        entry: dict[str, Any] = {}
        if said := weight_keywords(layer, precision.weight):
            entry["weight_quant"] = said
            parameters = simulated.weight_parameters(name, precision.weight)
            shape = _scale_shape(layer, precision.weight, said)
            ranges |= _tensors(f"{name}/weight_quant", precision.weight, parameters, shape)
        if said := input_keywords(layer, precision.input):
            entry["input_quant"] = said
            found = simulated.input_range(name, precision.input)
            placed = {"scale": torch.tensor(found.scale), "zero_point": torch.tensor(found.zero_point)}
            ranges |= _tensors(f"{name}/input_quant", precision.input, placed, ())
        if entry:
            layers[name] = entry
    (folder / CONFIG).write_text(json.dumps({"layers": layers}, indent=2) + "\n")
    save_file(ranges, folder / RANGES)


def weight_keywords(layer: Layer, format: Format) -> dict[str, Any] | None:
    """Returns the keywords of a weight's quantizer; None where Brevitas has none of these values."""
    number = _number(format)
    if number is None or layer.kind not in KINDS:
        return None
    if format.granularity == "tensor":
        return number | {"scaling_per_output_type": "tensor"}
    if format.granularity == "group" and format.group < math.prod(layer.weight_shape) // layer.channels:
        # Brevitas' groups are along the inputs, with a scale for every kernel position: those of a group are the same.
        kernel = math.prod(layer.weight_shape[2:])
        if layer.kind == "embedding" or layer.channel_axis != 0 or format.group % kernel:
            return None
        return number | {"scaling_per_output_type": "group", "group_size": format.group // kernel}
    return number | {"scaling_per_output_type": "channel"}


def input_keywords(layer: Layer, format: Format) -> dict[str, Any] | None:
    """Returns the keywords of an input's quantizer; None where Brevitas has none of these values."""
    number = _number(format)
    if number is None or layer.kind not in KINDS or not layer.quantizes_input or not format.has_static_range:
        return None
    return number | {"scaling_per_output_type": "tensor"}


def _number(format: Format) -> dict[str, Any] | None:
    """The keywords that say which values a quantizer has; None where Brevitas has none such."""
    if format.grid == "minifloat":
        widths = {"exponent_bit_width": format.exponent_bits, "mantissa_bit_width": format.mantissa_bits}
        return {"bit_width": format.bits, **widths}
    if format.grid != "int" or format.bits < 2 or (format.has_zero_point and format.bits > AFFINE_BITS):
        return None
    is_narrow = format.lowest == -format.highest
    return {"bit_width": format.bits, "signed": format.signed, "narrow_range": is_narrow}


def _scale_shape(layer: Layer, format: Format, keywords: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of scales that broadcasts against the weight as Brevitas lays it out."""
    rank = len(layer.weight_shape)
    if "group_size" in keywords:
        return (layer.channels, -1, *[1] * (rank - 1))
    if format.granularity == "tensor":
        return ()
    return tuple(-1 if axis == layer.channel_axis else 1 for axis in range(rank))


def _tensors(side: str, format: Format, parameters: Parameters, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The keywords that are tensors; a zero point is given as its distance from the lowest code, times the scale."""
    step = parameters["scale"].float() * parameters.get("tensor_scale", torch.ones(()))
    found = {f"{side}/scaling_init": step.reshape(shape).contiguous()}
    if format.has_zero_point:
        steps = (parameters["zero_point"] - format.lowest).float()
        found[f"{side}/zero_point_init"] = (steps * step).reshape(shape).contiguous()
    return found
