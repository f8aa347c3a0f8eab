"""The tensorrt backend: a strongly typed QDQ graph in ONNX, as the parser of TensorRT 11 takes it.

TensorRT takes the precision of every layer from the quantizers around it, and knows symmetric ones alone: int8 and fp8
without zero points for inputs and weights, int4 for weights in blocks. What is written here is checked against those
rules and run by onnxruntime, not by TensorRT: its libraries need an NVIDIA GPU. Rules:
https://docs.nvidia.com/deeplearning/tensorrt/11.0.0/inference-library/work-quantized-types.html,
https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/operators/Quantize.html,
and what the parser refuses (onnx-tensorrt, `QuantDequantLinearHelper` in `onnxOpImporters.cpp`, release 10.1).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from hwmodels import FLOAT, Format, Layer, Precision
from search.backends.base import Emitter
from search.backends.onnx_capture import call_arguments, capture
from search.backends.onnx_qdq import with_quantizers
from search.backends.onnx_quantize import save
from search.backends.outcome import ExportReport, Fidelity, LayerExport
from search.backends.realize import simulate
from search.backends.tensorrt_rules import Tensors, broken_rule
from search.backends.verify import record
from search.errors import DataError, UnsupportedError
from search.plan import Plan
from search.tasks.task import Task, tensors_in

MODEL, KEY = "model.onnx", "bitplan"
DOCUMENT = "NVIDIA TensorRT 11 documentation, Working with Quantized Types"
BLOCK_SIZES = (32, 64, 128)
INT8, INT4, FP8 = Format.parse("int8"), Format.parse("int4"), Format.parse("fp8_e4m3")
RECURRENT = {"lstm", "gru", "rnn"}
TOLERANCE = 1e-3  # of the largest output, in onnxruntime with all optimizations off


class Entry(BaseModel):
    """What the file says of one layer: the precision, and the nodes that make it.

    Attributes:
        precision: That runs.
        weight: Name of the `DequantizeLinear` that returns the weight; empty where its values are stored.
        input: Name of the `DequantizeLinear` that returns the input; empty where it stays in float.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: str
    weight: str
    input: str


class TensorRT(Emitter):
    """Writes `model.onnx` with symmetric quantizers, and in its metadata which of them are whose."""

    name = "tensorrt"
    proof = "emitted"
    reason = "ONNX's checker, TensorRT's rules and ONNX Runtime read it; TensorRT itself needs a GPU"
    packages = ("onnx", "onnxscript")
    usage = """
    trtexec --onnx=model.onnx --saveEngine=model.engine
    TensorRT 11 builds strongly typed networks: the quantizers in the file say every layer's precision.
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Symmetric integers and fp8 keep codes, other weights values; 8-bit inputs with a zero point become int8."""
        weight, weight_note = _weight(layer, precision)
        input_, runs, input_note = _input(precision.input)
        note = "; ".join(filter(None, (weight_note, input_note)))
        running = Precision(precision.weight, runs)
        ran = "" if running == precision else str(running)
        return LayerExport(layer.name, str(precision), weight, input_, "", note, ran)

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes `model.onnx`."""
        layers = [self.express(plan.network[name], precision) for name, precision in plan.policy.items()]
        runs = ExportReport(self.name, (), tuple(layers)).policy
        simulated = simulate(plan, task, runs)
        simulated.apply({})
        captured = capture(simulated.model, plan.network, task.example_input)
        made: dict[str, str] = {}
        model = with_quantizers(captured, simulated, runs, weight_storage, input_storage, made)
        said = {
            name: Entry(
                precision=str(precision), weight=made.get(f"{name}/weight", ""), input=made.get(f"{name}/input", "")
            ).model_dump()
            for name, precision in runs.items()
        }
        model.metadata_props[KEY] = json.dumps(said)
        save(model, folder / MODEL)
        return layers

    def read(self, folder: Path) -> Mapping[str, Precision]:
        """Reads the precisions from the file, and checks its quantizers against TensorRT's rules."""
        return {name: Precision.parse(entry.precision) for name, entry in read_entries(folder / MODEL).items()}

    def validate(self, plan: Plan, task: Task, folder: Path) -> tuple[str, tuple[str, ...]]:
        """Checks the file against ONNX and TensorRT's rules, and runs it beside the simulation."""
        import onnx

        file = folder / MODEL
        onnx.checker.check_model(file, full_check=True)
        model = onnx.load(file)
        count = sum(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
        difference = _difference(plan, task, folder, self.read(folder))
        return DOCUMENT, (
            f"valid ONNX of opset {model.opset_import[0].version}",
            f"all {count} quantizers keep TensorRT's rules: int8, fp8 and int4 codes, no zero points, positive scales "
            "of one tensor, channel or block",
            f"onnxruntime computes from the file what the simulation computes, within {difference:.1e} of the largest "
            "output",
        )


def input_storage(format: Format) -> Format:
    """Returns what holds an input's codes: fp8 its own, integers int8."""
    return FP8 if format == FP8 else INT8


def weight_storage(layer: Layer, precision: Precision) -> Format:
    """Returns what holds a weight's codes; float where TensorRT has no type for them, and values are stored.

    Blocks may hold a channel's only scale more than once, which is how 4 bits are stored per channel; `with_quantizers`
    writes those as int8 instead, one scale per channel.
    """
    format = precision.weight
    if layer.kind in RECURRENT or format.is_float:
        return FLOAT
    if format.base == FP8 and format.granularity != "group":
        return FP8
    is_symmetric = format.signed and not format.has_zero_point and format.scale == "fp32" and format.bits <= 8
    if format.grid not in ("int", "binary", "ternary") or not is_symmetric:
        return FLOAT
    if format.granularity != "group":
        return INT8
    shape = layer.weight_shape
    is_blocked = layer.channel_axis == 0 and len(shape) == 2 and format.group in BLOCK_SIZES
    if not is_blocked or shape[1] % format.group or shape[1] == format.group:
        return FLOAT
    return INT4 if format.bits <= 4 else INT8


def _weight(layer: Layer, precision: Precision) -> tuple[Fidelity, str]:
    """What becomes of a weight, and why it is not plainly exact."""
    format, storage = precision.weight, weight_storage(layer, precision)
    if format.is_float:
        return "float", ""
    if storage.is_float:
        return "contained", f"TensorRT has no {format} weight of {layer.kind}: its values are stored as float32"
    if storage.bits == format.bits and storage.grid == format.grid:
        return "exact", ""
    blocks = ", since int4 is for blocks" if format.bits == 4 and storage == INT8 else ""
    return "contained", f"{format} codes are stored as {storage}{blocks}"


def _input(format: Format) -> tuple[Fidelity, Format, str]:
    """What becomes of an input, the format that runs, and why it is not plainly exact."""
    if format.is_float:
        return "float", format, ""
    if format == FP8 or (format.is_static_integer and format.signed and format.bits == 8 and not format.has_zero_point):
        return "exact", format, ""
    if format.is_static_integer and format.bits < 8 and not (format.bits == 1 and format.signed):
        return "contained", format, f"{format} values are the steps from zero in int8, clipped to the format's ends"
    if format.is_static_integer and format.bits == 8:
        note = f"TensorRT knows no zero points and no unsigned codes: the {format} input is quantized to int8"
        return "altered", INT8, note
    return "float", FLOAT, f"TensorRT takes no {format} input by ONNX's quantizers: it stays in float"


def read_entries(file: Path) -> dict[str, Entry]:
    """Reads what a file says of every layer.

    Raises:
        DataError: If it is no ONNX file, says nothing of layers, or its quantizers break a rule.
    """
    import onnx

    try:
        model = onnx.load(file)
        said = json.loads({entry.key: entry.value for entry in model.metadata_props}[KEY])
        entries = {name: Entry.model_validate(entry) for name, entry in said.items()}
    except Exception as error:  # protobuf, json and pydantic have errors of their own for what is no such file
        raise DataError(f"{file} is damaged, or no export wrote it: {error}; export again") from error
    nodes = {node.name: node for node in model.graph.node}
    tensors = Tensors.of(model.graph)
    for node in model.graph.node:
        if rule := broken_rule(node, tensors):
            raise DataError(f"{file}: TensorRT refuses {node.name or node.op_type}: {rule}")
    for name, entry in entries.items():
        for side in (entry.weight, entry.input):
            if side and (side not in nodes or nodes[side].op_type != "DequantizeLinear"):
                raise DataError(f"{file} has no quantizer {side}, which layer {name} is said to have; export again")
    return entries


def _difference(plan: Plan, task: Task, folder: Path, policy: Mapping[str, Precision]) -> float:
    """The largest difference between what onnxruntime computes from a file and the simulation, over the largest output.

    Without optimizations, since those of onnxruntime round where TensorRT's do not.

    Raises:
        UnsupportedError: If it is more than rounding explains.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    recording = record(task, simulate(plan, task, policy).model)
    (args, kwargs), expected = recording.calls[0], tensors_in(recording.results[0])
    inputs = tensors_in([args, call_arguments(kwargs)[1]])
    fed = {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)}
    returned: list[Any] = session.run(None, fed)
    differences, largest = [], 0.0
    for found, wanted in zip(returned, expected, strict=True):
        differences.append((torch.from_numpy(found) - wanted).abs().flatten())
        largest = max(largest, float(wanted.abs().max()))
    typical = float(torch.cat(differences).median()) / max(largest, 1e-9)
    if typical > TOLERANCE:
        raise UnsupportedError(
            f"what is in {folder / MODEL} does not compute what the plan says: outputs differ by {typical:.1e} of the "
            "largest; report this"
        )
    return float(torch.cat(differences).max()) / max(largest, 1e-9)
