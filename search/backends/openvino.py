"""The openvino backend: OpenVINO's IR of the plan's QDQ graph, run on the CPU.

OpenVINO finds integer kernels where 8-bit inputs meet signed 8-bit weights with one scale per channel; elsewhere it
computes in float32 with the same values. Its quantizers multiply by the inverse of a step, where the simulation
divides: a value that lies within float32's rounding of the middle between two codes may get the other one. Checked
against openvino 2026.4.1.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hwmodels import FLOAT, Format, Layer, Precision
from search.backends.array_process import ask, call_arrays, run_models
from search.backends.base import Backend
from search.backends.onnx_capture import capture, layers_in
from search.backends.onnx_qdq import with_quantizers
from search.backends.onnx_quantize import save
from search.backends.outcome import ExportReport, Fidelity, LayerExport, Verification
from search.backends.realize import simulate
from search.backends.verify import THREADS, compare, record, replay, uniform_int8
from search.plan import Plan
from search.policy import Policy
from search.tasks.task import Task

MODEL, GRAPH = "model.xml", "model.onnx"
WORKER = Path(__file__).with_name("openvino_worker.py")
COMPUTES = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "Gather", "RNNCell", "RNNSeq"}
TYPES = {"i8": "int8", "u8": "int8", "f32": "fp32", "f16": "fp16"}


class OpenVino(Backend):
    """Writes `model.xml` and `model.bin`, weights of 4 and 8 bits in their own types where kernels take those."""

    name = "openvino"
    header_bytes = 8192  # an operation takes about 600 bytes of XML
    proof = "executed"
    packages = ("onnx", "onnxscript", "openvino")
    usage = """
    import openvino
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}  # no rounding of its own
    model = openvino.Core().compile_model("model.xml", "CPU", exact)
    outputs = model(batch)  # samples first
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Integers keep their codes, other weights their values; other inputs stay in float."""
        return exported_layer(layer, precision)

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes `model.xml` and `model.bin`."""
        runs = ExportReport(self.name, (), tuple(exported_layers(plan))).policy
        simulated = simulate(plan, task, runs)
        simulated.apply({})
        captured = capture(simulated.model, plan.network, task.example_input)
        with tempfile.TemporaryDirectory() as temporary:
            model = with_quantizers(captured, simulated, runs, weight_storage, input_storage)
            save(model, Path(temporary) / GRAPH)
            operations = converted(Path(temporary) / GRAPH, folder / MODEL)
        returning = {value.name: value.producer().name for value in model.graph.outputs}
        return list(exported_layers(plan, operations, returning))

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification:
        """Runs the model over the report split, beside the float network and the one at 8 bits everywhere."""
        simulated = simulate(plan, task, ExportReport(self.name, (), layers).policy)
        recording = record(task, simulated.model)
        policies = {"float": Policy({}), "int8": uniform_int8(plan, task, simulated)}
        captured = capture(simulated.model, plan.network, task.example_input)
        with tempfile.TemporaryDirectory() as temporary:
            models, graphs = {"plan": folder / MODEL}, {}
            for name, policy in policies.items():
                graph, models[name] = Path(temporary) / f"{name}.onnx", Path(temporary) / f"{name}.xml"
                save(with_quantizers(captured, simulated, policy, weight_storage, input_storage), graph)
                graphs[graph] = models[name]
            returned, seconds = run_in_fresh_process(models, graphs, recording.calls, Path(temporary))
        outputs = replay(task, recording, returned)
        return compare(plan, task, recording, outputs, folder, seconds, layers, self.name)


def takes_input(format: Format) -> bool:
    """True for the input formats that run as planned: integers of up to 8 bits under one static range, and float."""
    is_integer = format.is_static_integer and format.bits <= 8 and not (format.bits == 1 and format.signed)
    return format.is_float or is_integer


def input_storage(format: Format) -> Format:
    """Returns the format of 8 bits that holds an input format's codes."""
    return Format(8, signed=format.signed, span="asym" if format.signed and format.has_zero_point else "")


def weight_storage(layer: Layer, precision: Precision) -> Format:
    """Returns the integers of 4 or 8 bits that hold a weight's codes; float where there are none for them.

    4 bits are for float inputs: integer kernels take weights of 8 bits alone, and with others OpenVINO multiplies in
    float32. And they are for rows and groups that fill whole bytes: openvino 2026.4.1 multiplies odd numbers of such
    codes wrongly.
    """
    format = precision.weight
    if format.grid not in ("int", "binary", "ternary") or format.bits > 8:
        return FLOAT
    if format.granularity == "group":
        rows = layer.weight_shape
        fits = len(rows) == 2 and layer.channel_axis == 0 and rows[1] % format.group == 0
        if not fits:
            return FLOAT
    under_a_scale = format.group if format.granularity == "group" else math.prod(layer.weight_shape[1:])
    fills_bytes = under_a_scale % 2 == 0
    bits = 4 if format.bits <= 4 and precision.input.is_float and fills_bytes else 8
    return Format(bits, signed=format.signed)


def exported_layers(
    plan: Plan, operations: Sequence[Mapping[str, str]] = (), returning: Mapping[str, str] | None = None
) -> Iterator[LayerExport]:
    """Says what became of each layer.

    Args:
        plan: The plan.
        operations: What the runtime made of the graph; empty before that is known.
        returning: Name of an output of the graph to that of the node behind it: OpenVINO calls it by the output.
    """
    computes: dict[str, set[str]] = {layer.name: set() for layer in plan.layers}
    for operation in operations:
        nodes = [operation["name"], *operation.get("originalLayersNames", "").split(",")]
        names = layers_in(",".join((returning or {}).get(node, node) for node in nodes))
        if operation.get("layerType") in COMPUTES:
            type_ = "f32" if operation["layerType"] == "Gather" else operation["multiplies"]
            for name in names:
                computes[name].add(TYPES.get(type_, type_))
    for name, precision in plan.policy.items():
        yield exported_layer(plan.network[name], precision, "/".join(sorted(computes[name])))


def exported_layer(layer: Layer, precision: Precision, compute: str = "") -> LayerExport:
    """Says what becomes of a layer."""
    runs = precision if takes_input(precision.input) else Precision(precision.weight)
    weight, input_ = precision.weight, precision.input
    storage = weight_storage(layer, runs)
    notes = []
    kept: Fidelity = "float" if weight.is_float else "contained"
    if not weight.is_float:
        if storage.is_float:
            notes.append(f"OpenVINO has no {weight} weight of {layer.kind}: its values are stored as float32")
        elif storage.bits != weight.bits or weight.grid != "int":
            notes.append(f"{weight} codes are stored as {storage}")
        elif weight.scale != "fp32":
            notes.append("scales are stored as float32")
        else:
            kept = "exact"
    read: Fidelity = "float"
    if runs != precision:
        notes.append(f"OpenVINO quantizes no {input_} input: it stays in float")
    elif not input_.is_float:
        read = "exact" if input_.bits == 8 else "contained"
        if read == "contained":
            notes.append(f"{input_} values are clipped to the ends of [{input_.lowest}, {input_.highest}] in 8 bits")
        if compute == "fp32" and not weight.is_float:
            notes.append("OpenVINO has no integer kernel for it here and multiplies the same values in fp32")
    ran = "" if runs == precision else str(runs)
    return LayerExport(layer.name, str(precision), kept, read, compute, "; ".join(notes), ran)


def converted(graph: Path, target: Path) -> list[dict[str, str]]:
    """Converts an ONNX file in a fresh process; returns the operations that OpenVINO makes of it on this machine."""
    with tempfile.TemporaryDirectory() as temporary:
        job = {"convert": {str(graph): str(target)}, "operations": str(target), "threads": THREADS}
        ask(WORKER, "openvino", job, Path(temporary))
        found: list[dict[str, str]] = json.loads((Path(temporary) / "operations.json").read_text())
    return found


def run_in_fresh_process(
    models: Mapping[str, Path], graphs: Mapping[Path, Path], calls: Sequence[Any], folder: Path
) -> tuple[list[list[Tensor]], dict[str, list[float]]]:
    """Runs the first of `models` on every call, and times all of them on one sample.

    Args:
        models: Name to `.xml` file.
        graphs: ONNX files that are converted to `.xml` files first.
        calls: Positional and keyword arguments of every call.
        folder: A temporary folder, through which the processes talk.

    Returns:
        The tensors that every call returned, and the seconds of the timed runs by name of the model.

    Raises:
        UnsupportedError: If the runtime refuses a model.
    """
    sources = {str(graph): str(target) for graph, target in graphs.items()}
    return run_models(WORKER, "openvino", models, call_arrays(calls), len(calls), folder, convert=sources)
