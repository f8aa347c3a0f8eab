"""The aimet backend: the plan's scales and zero points as AIMET encodings, schema 2.1.0.

An encoding has the fields of ONNX QuantizeLinear: the values are `(code - y_zero_point) * y_scale`, codes of
`output_dtype` with its most negative one; `axis` is that of the channels or, with `block_size`, of the blocks. Weights
are named as parameters are, `block.qkv.weight`, which is how AIMET names them in ONNX; the first input of a module is
`block.qkv.input`. AIMET's own export of what `load` returns writes the same encodings under the names of ONNX tensors,
for Qualcomm's converter, and adds those of biases in int32.

aimet_torch 2.42 writes this schema (`quantization/affine/encoding.py`, `to_qnn_encoding_dict`) and does not read it, so
`load` sets its quantizers (`aimet_torch.quantization.affine.QuantizeDequantize`) from the file, range by range. They
keep ends of a range, not the scale, whose last bit may therefore differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from hwmodels import FLOAT, Format, Layer, Precision
from search.backends.artifact import check_folder
from search.backends.base import Backend
from search.backends.outcome import ExportReport, Fidelity, LayerExport, Verification
from search.backends.realize import simulate
from search.backends.torch_apply import check_applied, network_to_quantize
from search.errors import DataError, UnsupportedError
from search.files import write_text
from search.kinds import MODULE_KINDS
from search.plan import Plan
from search.quantize.simulate import QuantizedModel
from search.quiet import quietly
from search.tasks.task import Task

FILE = "model.encodings"
DECLARED: list[Any] = []
"""Keeps declared operators alive."""
KINDS = frozenset(MODULE_KINDS.values())


class Encoding(BaseModel):
    """How one tensor is quantized; see the module's docstring."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    output_dtype: str = Field(pattern=r"^u?int([2-9]|1[0-6])$")
    y_scale: float | list[Any]
    y_zero_point: int | list[Any] | None = None
    axis: int | None = None
    block_size: int | None = None

    @property
    def codes(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        format = Format.parse(f"{self.output_dtype}-full" if self.output_dtype[0] == "i" else self.output_dtype)
        return format.lowest, format.highest


class Encodings(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal["2.1.0"]
    encodings: tuple[Encoding, ...]


class Aimet(Backend):
    """Writes `model.encodings`; integers of 2 to 16 bits under static scales keep their values."""

    name = "aimet"
    proof = "executed"
    packages = ("aimet-torch",)
    usage = """
    import aimet_torch, search; from pathlib import Path; from search.backends.aimet import load
    sim = aimet_torch.QuantizationSimModel(float_model, example_input)
    sim.model = load(search.Plan.load("plan.json"), float_model, Path("this folder"))
    sim.onnx.export((example_input,), "model.onnx", opset_version=21, dynamo=True, encoding_version="2.1.0")
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Static integers are exact, but for symmetric inputs, which gain a code; the rest stays in float."""
        return exported_layer(layer, precision)

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes the encodings."""
        layers = [exported_layer(plan.network[name], precision) for name, precision in plan.policy.items()]
        policy = ExportReport(self.name, (), tuple(layers)).policy
        write_encodings(simulate(plan, task, policy), policy, folder)
        return layers

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification:
        """Has AIMET quantize the folded network in a fresh process, and runs it over the report split."""
        return check_applied(self.name, f"{__name__}:quantized", plan, task, folder, layers, write_encodings)


def load(plan: Plan, model: nn.Module, path: Path) -> nn.Module:
    """Returns a copy of `model`, batch norm folded, with AIMET's quantizers as exported into the folder `path`.

    Raises:
        DataError: If the folder holds no export of this plan, or `model` is not the plan's.
        UnsupportedError: If AIMET has no quantized module for a layer.
    """
    layers = check_folder(path, plan, Aimet.name)
    policy = ExportReport(Aimet.name, (), layers).policy
    return apply(network_to_quantize(plan.simulate(model), policy), path)


def quantized(given: tuple[nn.Module, Path | None, Sequence[Any]]) -> nn.Module:
    """Returns a network with the quantizers of a folder, or as it is without one: what a fresh process does."""
    model, folder, _ = given
    return apply(model, folder) if folder else model


def apply(model: nn.Module, folder: Path) -> nn.Module:
    """Replaces modules of a float network by AIMET's, with quantizers as the file in `folder` has them; returns it.

    Raises:
        DataError: If the file is damaged.
        UnsupportedError: If AIMET has no quantized module for a layer.
    """
    _mend_torchvision()
    with torch.inference_mode(False), quietly("aimet", "Quant", "torch"):
        from aimet_torch.nn import QuantizationMixin
        from aimet_torch.nn.base import UnknownModuleError

        for encoding in read(folder):
            layer, _, side = encoding.name.rpartition(".")
            module = dict(model.named_modules(remove_duplicate=False)).get(layer)
            if module is None or not layer:
                raise DataError(f"{folder / FILE} names {encoding.name}, and the model has no part {layer!r}")
            if not isinstance(module, QuantizationMixin):
                try:
                    made = QuantizationMixin.from_module(module)
                except UnknownModuleError as error:
                    kind = type(module).__name__
                    raise UnsupportedError(f"aimet has no quantized {kind}: leave {layer} in float") from error
                _replace(model, module, made)
                module = made
            if side == "input":
                module.input_quantizers[0] = quantizer(encoding)
            else:
                module.param_quantizers[side] = quantizer(encoding, module.get_parameter(side))
    return model


def read(folder: Path) -> tuple[Encoding, ...]:
    """Reads the file in a folder.

    Raises:
        DataError: If it does not keep to the schema.
    """
    try:
        return Encodings.model_validate_json((folder / FILE).read_bytes()).encodings
    except (ValidationError, OSError) as error:
        raise DataError(f"{folder / FILE} is damaged: {error}") from error


def write_encodings(simulated: QuantizedModel, policy: Mapping[str, Precision], folder: Path) -> None:
    """Writes the encodings of what AIMET has of a policy."""
    found = []
    for name, precision in policy.items():
        layer = simulated.network[name]
        if is_weight_expressible(layer, precision.weight):
            found.append(_weight_encoding(layer, precision.weight, simulated.weight_parameters(name, precision.weight)))
        if input_format(layer, precision.input) == precision.input != FLOAT:
            range_ = simulated.input_range(name, precision.input)
            zero_point = range_.zero_point if precision.input.has_zero_point else None
            found.append(
                Encoding(
                    name=f"{name}.input",
                    output_dtype=_dtype(precision.input),
                    y_scale=range_.scale,
                    y_zero_point=zero_point,
                )
            )
    lines = ",\n".join(f"    {json.dumps(one.model_dump(exclude_none=True))}" for one in found)
    write_text(folder / FILE, f'{{\n  "version": "2.1.0",\n  "encodings": [\n{lines}\n  ]\n}}\n')


def exported_layer(layer: Layer, precision: Precision) -> LayerExport:
    """Says what becomes of a layer."""
    weight, input_, notes = precision.weight, precision.input, []
    is_exact, running = is_weight_expressible(layer, weight), input_format(layer, input_)
    if not (is_exact or weight.is_float):
        notes.append(f"aimet has no {weight} weight of {layer.kind} here: its values are stored as float32")
    if running.is_float and not input_.is_float:
        notes.append(f"aimet takes no {input_} input: it stays in float")
    elif running != input_:
        notes.append(f"aimet's {_dtype(running)} input has the code {running.lowest} too")
    became: Fidelity = "float" if weight.is_float else "exact" if is_exact else "contained"
    received: Fidelity = "float" if running.is_float else "exact" if running == input_ else "altered"
    runs = "" if running == input_ else str(Precision(weight, running))
    return LayerExport(layer.name, str(precision), became, received, "fp32", "; ".join(notes), runs)


def is_weight_expressible(layer: Layer, format: Format) -> bool:
    """True where AIMET has an encoding for a weight: static integers by tensor, channel or blocks of whole inputs."""
    is_integer = format.grid == "int" and format.scale == "fp32" and 2 <= format.bits <= 16
    return layer.kind in KINDS and is_integer and (not _is_grouped(layer, format) or _block(layer, format) is not None)


def input_format(layer: Layer, format: Format) -> Format:
    """Returns the format nearest to an input's that AIMET has; float where there is none."""
    if layer.kind not in KINDS or not format.is_static_integer or format.bits < 2:
        return FLOAT
    return replace(format, span="full") if format.signed and not format.span else format


def _is_grouped(layer: Layer, format: Format) -> bool:
    """Whether a weight's channels have several groups."""
    return format.groups(layer.weight_shape, layer.channel_axis) > layer.channels


def _block(layer: Layer, format: Format) -> int | None:
    """The inputs of a group; None where it is not a whole number of them that divides all."""
    inputs, rest = divmod(format.group, math.prod(layer.weight_shape[2:]))
    is_whole = not rest and inputs > 0 and layer.weight_shape[1 - layer.channel_axis] % inputs == 0
    return inputs if is_whole else None


def _weight_encoding(layer: Layer, format: Format, parameters: Mapping[str, Tensor]) -> Encoding:
    axis, block_size = layer.channel_axis, None
    if _is_grouped(layer, format):
        block_size = _block(layer, format)
        shape = [layer.channels, -1, *(1 for _ in layer.weight_shape[2:])]
        parameters = {key: value.view(shape).movedim(0, axis) for key, value in parameters.items()}
        axis = 1 - axis
    per_tensor = format.granularity == "tensor"
    placed = {key: value.squeeze() if per_tensor else value for key, value in parameters.items()}
    return Encoding(
        name=f"{layer.name}.weight",
        output_dtype=_dtype(format),
        y_scale=placed["scale"].tolist(),
        y_zero_point=placed["zero_point"].tolist() if "zero_point" in placed else None,
        axis=None if per_tensor else axis,
        block_size=block_size,
    )


def _dtype(format: Format) -> str:
    return f"{'' if format.signed else 'u'}int{format.bits}"


def quantizer(encoding: Encoding, weight: Tensor | None = None) -> nn.Module:
    """Returns AIMET's quantizer of a weight, or of an input, where `weight` is None."""
    from aimet_torch.quantization.affine import QuantizeDequantize

    scale = torch.tensor(encoding.y_scale, dtype=torch.float32)
    zero_point = torch.tensor(0 if encoding.y_zero_point is None else encoding.y_zero_point)
    block_size = None
    if weight is not None and encoding.block_size:
        block_size = tuple(encoding.block_size if axis == encoding.axis else -1 for axis in range(weight.dim()))
    elif weight is not None and encoding.axis is not None:
        shape = [-1 if axis == encoding.axis else 1 for axis in range(weight.dim())]
        scale, zero_point = scale.view(shape), zero_point.expand(scale.shape).reshape(shape)
    lowest, highest = encoding.codes
    is_symmetric = lowest < 0 and encoding.y_zero_point is None
    made: nn.Module = QuantizeDequantize(scale.shape, lowest, highest, is_symmetric, block_size=block_size)
    made.set_range((lowest - zero_point) * scale, (highest - zero_point) * scale)  # type: ignore[operator]
    return made.requires_grad_(False)


def _replace(model: nn.Module, module: nn.Module, made: nn.Module) -> None:
    """Puts a module in the place of another, wherever the model holds it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is module:
                parent._modules[name] = made


def _mend_torchvision() -> None:
    """Makes torchvision importable, as AIMET wants, where it was built for another torch, such as one with CUDA.

    It then lacks two operators that it describes all the same; AIMET needs neither for what is done here.
    """
    spec = find_spec("torchvision")
    operators: Any = torch.ops
    library: Any = torch.library
    if DECLARED or spec is None or spec.origin is None:
        return
    try:
        operators.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        DECLARED.append(library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            DECLARED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
