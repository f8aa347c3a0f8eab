"""The compressed-tensors backend: a Hugging Face checkpoint of integer codes under the plan's own scales.

`config.json` has one `config_group` for every way of storing and computing that the plan needs, whose `targets` are the
exact names of its layers; every other layer is named in `ignore`. transformers loads such a folder with the package
compressed-tensors, which computes in float with the values of the codes, and puts inputs through its own quantizers.

Read from compressed-tensors 0.20.0: codes of N bits lie in `[-2**(N-1), 2**(N-1) - 1]`, with and without zero points
(`quantization/utils/helpers.py`, `calculate_range`), so plans' codes keep their values; dynamic ranges without a zero
point divide the largest magnitude by `(2**N - 1) / 2` (`calculate_qparams`), where plans divide by the largest code.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwmodels import FLOAT, Format, Layer, Precision
from search.backends.base import Backend, Proof
from search.backends.huggingface import (
    CONFIG,
    MODULES,
    WEIGHTS,
    language_model,
    load_checkpoint,
    require_hugging_face,
    save_checkpoint,
)
from search.backends.outcome import ExportReport, Fidelity, LayerExport, Validation, Verification
from search.backends.realize import simulate
from search.backends.torch_process import run_in_fresh_process
from search.backends.verify import compare, record, replay, uniform_int8
from search.plan import Plan
from search.quantize.affine import Range
from search.quantize.formats import Parameters, encode
from search.quantize.grouping import to_groups
from search.quantize.simulate import QuantizedModel
from search.tasks.task import Task

KINDS = ("linear", "embedding")
PACKED, BYTES, FLOATS, PLAIN = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"

WORD = 32  # bits

Arguments = dict[str, Any]  # one of compressed-tensors' `QuantizationArgs`


@dataclass(frozen=True)
class Scheme:
    """How a layer is stored and computed.

    Attributes:
        weights: Arguments of its weight.
        inputs: Arguments of its input; None where it stays in float.
        format: How the codes are laid out.
    """

    weights: Arguments
    inputs: Arguments | None
    format: str

    @property
    def bits(self) -> int:
        """Bits that a code takes."""
        bits: int = self.weights["num_bits"]
        return bits if self.format == PACKED else 8 * math.ceil(bits / 8)

    def group(self, targets: Sequence[str]) -> dict[str, Any]:
        """Returns the `config_group` of layers stored in this way."""
        return {
            "targets": list(targets),
            "weights": self.weights,
            "input_activations": self.inputs,
            "output_activations": None,
            "format": self.format,
        }


class CompressedTensors(Backend):
    """Writes a checkpoint that transformers loads; reading it back takes the package compressed-tensors."""

    name = "compressed-tensors"
    proof: ClassVar[Proof] = "executed"
    packages = ("compressed-tensors", "transformers")
    usage = """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # and `pip install compressed-tensors`
    model = AutoModelForCausalLM.from_pretrained("this folder")  # float32, as it was searched; others round the scales
    tokenizer = AutoTokenizer.from_pretrained("this folder")
    """

    def takes(self, model: nn.Module) -> None:
        """Takes Hugging Face models alone."""
        require_hugging_face(model, self.name)

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Integers and fp8 keep their codes in Linear and Embedding; inputs run through the package's own quantizer."""
        running = self.running_input(layer, precision)
        scheme = self.scheme(layer, Precision(precision.weight, running))
        weight = _weight_fidelity(precision.weight, scheme)
        input_: Fidelity = "float" if running.is_float else "exact" if running == precision.input else "altered"
        notes = []
        if not precision.weight.is_float and scheme is None:
            notes.append(self.weight_note(layer, precision))
        elif weight == "contained" and scheme:
            notes.append(f"{precision.weight} codes are stored in {scheme.bits} bits each")
        if running != precision.input:
            notes.append(self.input_note(precision, running))
        runs = str(Precision(precision.weight, running)) if running != precision.input else ""
        return LayerExport(layer.name, str(precision), weight, input_, "fp32", "; ".join(notes), runs)

    def weight_arguments(self, layer: Layer, precision: Precision) -> Arguments | None:
        """Returns how the codes of a weight are stored; None where only its values can be."""
        return weight_arguments(layer, precision.weight)

    def running_input(self, layer: Layer, precision: Precision) -> Format:
        """Returns the format that an input runs in; `float` beside a weight that is not stored as codes."""
        is_linear = layer.kind == "linear" and weight_arguments(layer, precision.weight) is not None
        has_tokens = not layer.input_shape or len(layer.input_shape) == 3  # told apart along the first two axes
        if not is_linear or (precision.input.is_dynamic and not has_tokens):
            return FLOAT
        return running_input(layer, precision.input)

    def weight_note(self, layer: Layer, precision: Precision) -> str:
        """Says why a weight is not stored as codes."""
        return f"{self.name} has no {precision.weight} weight of {layer.kind}: its values are stored as float32"

    def input_note(self, precision: Precision, running: Format) -> str:
        """Says why an input does not run as planned."""
        if running.is_float:
            return f"compressed-tensors quantizes no {precision.input} input here: it stays in float"
        if precision.input.granularity == "sample":
            return f"compressed-tensors finds no range for a sample: the input runs as {running}"
        if precision.input.is_dynamic:
            return f"compressed-tensors finds another scale for {precision.input}: the input runs as {running}"
        return f"compressed-tensors clips {precision.input} one code later: the input runs as {running}"

    def scheme(self, layer: Layer, precision: Precision) -> Scheme | None:
        """Returns how a layer is stored, and computed if the precision is one that runs; None where it is in float."""
        weights = self.weight_arguments(layer, precision)
        if weights is None:
            return None
        inputs = input_arguments(precision.input)
        return Scheme(weights, inputs, self.layout(layer, weights, inputs))

    def layout(self, layer: Layer, weights: Arguments, inputs: Arguments | None) -> str:
        """Returns how codes are laid out.

        Codes are packed only where transformers 5.23 can load it: it initializes an Embedding by its `weight`, and
        expects zero points that are not packed (compressed-tensors 0.20, `compressors/pack_quantized/base.py`, the
        branch for tensors without memory).
        """
        if weights["type"] == "float":
            return FLOATS
        if weights["num_bits"] <= 8 and layer.kind == "linear" and weights["symmetric"]:
            return BYTES if inputs and weights["num_bits"] == 8 else PACKED
        return BYTES if inputs else PLAIN

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes `config.json`, `model.safetensors`, the tokenizer and the settings for generating text.

        Raises:
            UnsupportedError: If the model is no Hugging Face model that its configuration describes.
        """
        report = ExportReport(self.name, (), tuple(self.express(plan.network[n], p) for n, p in plan.policy.items()))
        self.save(simulate(plan, task, report.policy), task, report.policy, folder)
        return report.layers

    def save(self, simulated: QuantizedModel, task: Task, policy: Mapping[str, Precision], folder: Path) -> None:
        """Writes the checkpoint of a policy that runs."""
        quantized = {name: precision for name, precision in policy.items() if not precision.weight.is_float}
        named = [name for name in quantized if simulated.network[name].kind in KINDS]
        model = language_model(task.model, named, self.name)
        schemes, stored = {}, {}
        for name, precision in quantized.items():
            layer = simulated.network[name]
            if (scheme := self.scheme(layer, precision)) is None:
                continue
            schemes[name] = scheme
            parameters = simulated.weight_parameters(name, precision.weight)
            stored[name] = stored_weight(simulated.float_weight(name), precision.weight, parameters, scheme)
            if precision.input.has_static_range:
                stored[name] |= stored_range(simulated.input_range(name, precision.input), precision.input)
        simulated.apply(policy)
        state = {name: value for name, value in simulated.model.state_dict().items() if isinstance(value, Tensor)}
        save_checkpoint(model, state, stored, quantization_config(schemes, _quantizable(model)), folder)

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification | Validation:
        """Runs the checkpoint over the report split, beside the float network and the one of 8 bits."""
        report = ExportReport(self.name, (), layers)
        simulated = simulate(plan, task, report.policy)
        recording = record(task, simulated.model)
        int8 = uniform_int8(plan, task, simulated)
        with tempfile.TemporaryDirectory() as temporary:
            models = {"plan": folder, "float": Path(temporary) / "float", "int8": Path(temporary) / "int8"}
            for name, policy in (("float", {}), ("int8", int8)):
                models[name].mkdir()
                self.save(simulated, task, policy, models[name])
            paths = {name: str(path.resolve()) for name, path in models.items()}
            load = f"{load_checkpoint.__module__}:{load_checkpoint.__name__}"
            returned, seconds = run_in_fresh_process(load, paths, recording.calls, Path(temporary))
        outputs = replay(task, recording, returned)
        found = compare(plan, task, recording, outputs, folder, seconds, layers, self.name)
        # The tokenizer is beside the model, as it is beside the float one.
        return replace(found, bytes_on_disk=sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS)))


def weight_arguments(layer: Layer, format: Format) -> Arguments | None:
    """Returns compressed-tensors' arguments of a weight; None where it has none for the format or the layer."""
    if layer.kind not in KINDS or layer.channel_axis != 0 or len(layer.weight_shape) != 2:
        return None
    columns = layer.weight_shape[1]
    arguments: Arguments = {"num_bits": max(format.bits, 2), "type": "int", "symmetric": _is_symmetric(format)}
    if format == replace(Format.parse("fp8_e4m3"), granularity=format.granularity, group=format.group):
        arguments["type"] = "float"
    elif not (format.grid in ("binary", "ternary") or (format.grid == "int" and format.scale == "fp32")):
        return None
    elif format.bits == 1 and not arguments["symmetric"]:
        arguments["num_bits"] = 1
    if format.granularity == "tensor":
        return arguments | {"strategy": "tensor", "dynamic": False}
    if format.granularity != "group" or format.group >= columns:
        return arguments | {"strategy": "channel", "dynamic": False}
    if columns % format.group:
        return None
    return arguments | {"strategy": "group", "group_size": format.group, "dynamic": False}


def running_input(layer: Layer, format: Format) -> Format:
    """Returns the format that compressed-tensors gives to an input; `float` where it has none like it."""
    is_fp8 = format.base == Format.parse("fp8_e4m3")
    if format.is_float or not (is_fp8 or (format.grid == "int" and format.scale == "fp32" and 1 < format.bits <= 8)):
        return FLOAT
    if format.granularity == "group" and layer.weight_shape[1] % format.group:
        return FLOAT
    if format.granularity == "sample":
        format = replace(format, granularity="token")
    if is_fp8 or format.has_zero_point:
        return format
    if format.is_dynamic:
        return replace(format, span="asym" if format.signed else "")
    return replace(format, span="full") if format.signed else format


def input_arguments(format: Format) -> Arguments | None:
    """Returns compressed-tensors' arguments of an input in a format that it runs."""
    if format.is_float:
        return None
    kind = "float" if format.grid == "minifloat" else "int"
    arguments: Arguments = {"num_bits": format.bits, "type": kind, "symmetric": _is_symmetric(format)}
    if format.granularity == "token":
        return arguments | {"strategy": "token", "dynamic": True}
    if format.granularity == "group":
        return arguments | {"strategy": "group", "group_size": format.group, "dynamic": True}
    return arguments | {"strategy": "tensor", "dynamic": False}


def stored_weight(weight: Tensor, format: Format, parameters: Parameters, scheme: Scheme) -> dict[str, Tensor]:
    """Returns the tensors that compressed-tensors reads a weight from, by their names within the layer.

    Args:
        weight: In float, shape `(rows, columns)`.
        format: Of the plan.
        parameters: What places its codes.
        scheme: How it is stored.
    """
    groups = to_groups(weight, format, 0)
    codes = groups.restore(encode(groups.rows, format, parameters))
    bits, rows = scheme.weights["num_bits"], len(weight)

    def spread(values: Tensor) -> Tensor:
        """One value per group, beside its row; a single one stays alone, or becomes one per row."""
        if scheme.weights["strategy"] == "tensor":
            return values.reshape(1)
        return values.reshape(1 if values.numel() == 1 else rows, -1).expand(rows, -1)

    stored = {"weight_scale": spread(parameters["scale"].float())}
    if scheme.weights["type"] == "float":
        return stored | {"weight": codes.to(torch.uint8).view(torch.float8_e4m3fn)}
    if not scheme.weights["symmetric"]:
        zero_point = parameters.get("zero_point", torch.zeros(1, dtype=torch.int32))
        zero_point = spread(zero_point - _offset(format)).to(torch.int8)
        stored["weight_zero_point"] = pack(zero_point.T, bits).T if scheme.format == PACKED else zero_point
    codes = codes - _offset(format)
    if scheme.format == PACKED:
        shape = torch.tensor(weight.shape, dtype=torch.int64)
        return stored | {"weight_packed": pack(codes, bits), "weight_shape": shape}
    return stored | {"weight": codes.to(torch.int16 if bits > 8 else torch.int8)}


def stored_range(range_: Range, format: Format) -> dict[str, Tensor]:
    """Returns the tensors that compressed-tensors reads the static range of an input from."""
    stored = {"input_scale": torch.tensor([range_.scale], dtype=torch.float32)}
    if not _is_symmetric(format):
        stored["input_zero_point"] = torch.tensor([range_.zero_point - _offset(format)], dtype=torch.int8)
    return stored


def pack(codes: Tensor, bits: int) -> Tensor:
    """Returns the codes of every row as one stream of bits, lowest first, in whole words: int32.

    Codes count from the lowest that `bits` can hold; the last word of a row is filled up with zeros.

    Args:
        codes: Integers of either sign, shape `(rows, columns)`.
        bits: Width of a code, 1 to 8.
    """
    unsigned = (codes.int() + (1 << (bits - 1))).to(torch.uint8)
    stream = ((unsigned[..., None] >> torch.arange(bits, dtype=torch.uint8)) & 1).flatten(1)
    filled = F.pad(stream, (0, -stream.shape[1] % WORD)).numpy()
    return torch.from_numpy(np.packbits(filled, axis=1, bitorder="little").view("<i4").astype(np.int32))


def quantization_config(schemes: Mapping[str, Scheme], modules: Sequence[str]) -> dict[str, Any]:
    """Returns the `quantization_config` of a checkpoint; empty where nothing is quantized.

    Args:
        schemes: How each quantized layer is stored.
        modules: Everything that could be quantized.
    """
    if not schemes:
        return {}
    distinct = list({json.dumps(scheme.group([])): scheme for scheme in schemes.values()}.values())
    groups = {
        f"group_{index}": scheme.group([name for name, given in schemes.items() if given == scheme])
        for index, scheme in enumerate(distinct)
    }
    layouts = {scheme.format for scheme in distinct}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if len(layouts) > 1 else layouts.pop(),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in modules if name not in schemes],
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the `quantization_config` in a checkpoint; empty where nothing is quantized."""
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return found.get("quantization_config", {})  # type: ignore[no-any-return]


def _weight_fidelity(format: Format, scheme: Scheme | None) -> Fidelity:
    if format.is_float:
        return "float"
    is_same = scheme is not None and scheme.bits == format.bits and format.grid in ("int", "minifloat")
    return "exact" if is_same else "contained"


def _is_symmetric(format: Format) -> bool:
    """True where zero has the code zero once codes are signed."""
    return format.grid != "int" or (format.signed and not format.has_zero_point)


def _offset(format: Format) -> int:
    """What comes off an unsigned code to make it signed."""
    return 0 if format.signed else 1 << (format.bits - 1)


def _quantizable(model: Any) -> list[str]:
    """Names of the modules that compressed-tensors could quantize."""
    return [name for name, module in model.named_modules() if isinstance(module, MODULES)]
