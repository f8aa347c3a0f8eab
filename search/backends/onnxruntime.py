"""The onnxruntime backend: one QDQ ONNX file that computes the plan's own values."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hwmodels import Format, Layer, Precision
from search.backends.array_process import call_arrays, run_models
from search.backends.base import Backend
from search.backends.onnx_capture import capture, layers_in
from search.backends.onnx_quantize import quantized, save
from search.backends.onnx_ranges import find_ranges, takes_own_range
from search.backends.onnx_storage import has_integer_kernel, input_storage, takes_input, weight_storage
from search.backends.outcome import ExportReport, Fidelity, LayerExport, Verification
from search.backends.realize import simulate
from search.backends.verify import compare, record, replay, uniform_int8
from search.errors import UnsupportedError
from search.plan import Plan
from search.policy import Policy
from search.quantize.simulate import QuantizedModel
from search.tasks.task import Task

MODEL = "model.onnx"
NARROWEST = 2  # bits of an integer that onnxruntime 1.32 loads
WORKER = Path(__file__).with_name("onnxruntime_worker.py")
INTEGER_OPERATIONS = {
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QAttention",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}
BIAS_INPUT = {"QLinearConv": 8, "QGemm": 6}  # of the integer operations that add an int32 bias


class OnnxRuntime(Backend):
    """Writes weights of 2, 4, 8 and 16 bits in their own types, other widths in the next wider one."""

    name = "onnxruntime"
    header_bytes = 5120  # names, shapes, quantizers: 1.5 KB for a convolution, 5 KB for a linear layer of a Llama
    proof = "executed"
    packages = ("onnx", "onnxscript", "onnxruntime")
    recalibrates = True
    places = True
    usage = """
    import onnxruntime
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: batch})  # float32, samples first
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Formats with integer codes keep them; other weights keep their values, other inputs stay float."""
        return exported_layer(layer.name, precision)

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes `model.onnx`."""
        runs = running(plan.policy)
        simulated = simulate(plan, task, runs)
        simulated.apply({})
        captured = capture(simulated.model, plan.network, task.example_input, plan.points)
        if recalibrate:
            find_ranges(captured, simulated, runs, [task.inputs(batch) for batch in task.batches("calibration")])
        save(quantized(captured, simulated, runs, NARROWEST), folder / MODEL)
        return exported_layers(plan, folder / MODEL, recalibrate)

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification:
        """Runs `model.onnx` over the report split, beside the float network and the one at 8 bits everywhere."""
        return check_model(self.name, plan, task, folder, layers, quantized)


Quantize = Callable[[Any, QuantizedModel, Mapping[str, Precision]], Any]  # captured graph, network, policy -> graph


def check_model(
    backend: str, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...], quantize: Quantize
) -> Verification:
    """Runs `model.onnx` in a folder over the report split, beside the float network and the one at 8 bits everywhere.

    Args:
        backend: Who wrote it.
        plan: The plan.
        task: The plan's.
        folder: Holds the artifact.
        layers: What became of each layer.
        quantize: How the backend quantizes a captured graph, for the network at 8 bits.
    """
    simulated = simulate(plan, task, ExportReport(backend, (), layers).policy)
    recording = record(task, simulated.model)
    policies = {"float": Policy({}), "int8": uniform_int8(plan, task, simulated)}
    captured = capture(simulated.model, plan.network, task.example_input, plan.points)
    with tempfile.TemporaryDirectory() as temporary:
        models = {"plan": folder / MODEL}
        for name, policy in policies.items():
            models[name] = Path(temporary) / f"{name}.onnx"
            save(quantize(captured, simulated, policy), models[name])
        returned, seconds = run_in_fresh_process(models, recording.calls, Path(temporary))
    outputs = replay(task, recording, returned)
    return compare(plan, task, recording, outputs, folder, seconds, layers, backend)


def run_in_fresh_process(
    models: dict[str, Path], calls: Sequence[Any], folder: Path
) -> tuple[list[list[Tensor]], dict[str, list[float]]]:
    """Runs the first of `models` on every call, and times all of them on one sample.

    Args:
        models: Name to ONNX file.
        calls: Positional and keyword arguments of every call.
        folder: A temporary folder, through which the processes talk.

    Returns:
        The tensors that every call returned, and the seconds of the timed runs by name of the model.

    Raises:
        UnsupportedError: If the runtime refuses a model.
    """
    return run_models(WORKER, "onnxruntime", models, call_arrays(calls), len(calls), folder)


def running(policy: Mapping[str, Precision]) -> Policy:
    """Returns the policy that runs: inputs in formats that no graph can state stay float."""
    return Policy(
        {
            name: precision if takes_input(precision.input) else Precision(precision.weight)
            for name, precision in policy.items()
        }
    )


def exported_layers(plan: Plan, file: Path, recalibrated: bool = False) -> tuple[LayerExport, ...]:
    """Says what became of each layer, looking for its compute type in the graph that onnxruntime makes of the file."""
    nodes: dict[str, list[Any]] = {layer.name: [] for layer in plan.layers}
    rounded: set[str] = set()  # whose bias the runtime rounds
    graph = optimized_graph(file)
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        for name in layers_in(node.name):
            nodes[name].append(node)
            if len(node.input) > BIAS_INPUT.get(node.op_type, 99) or dequantized.intersection(node.input[2:3]):
                rounded.add(name)
    return tuple(
        exported_layer(name, precision, nodes[name], name in rounded, recalibrated)
        for name, precision in plan.policy.items()
    )


def exported_layer(
    name: str,
    precision: Precision,
    nodes: Sequence[Any] | None = None,
    rounds_bias: bool = False,
    recalibrated: bool = False,
) -> LayerExport:
    """Says what became of a layer.

    Args:
        name: The layer.
        precision: As planned.
        nodes: The operations that compute it in the runtime's graph; None before there is one.
        rounds_bias: Whether the runtime rounds its bias.
        recalibrated: Whether onnxruntime found the ranges.
    """
    weight, input_ = precision.weight, precision.input
    runs = running({name: precision})[name]
    compute = "/".join(sorted({"int8" if node.op_type in INTEGER_OPERATIONS else "fp32" for node in nodes or ()}))
    became: dict[str, Fidelity] = {"weight": _weight_fidelity(weight), "input": _input_fidelity(input_)}
    notes = [*_weight_notes(weight), *_input_notes(input_)]
    if recalibrated:
        own = [side for side, format in (("weight", weight), ("input", runs.input)) if takes_own_range(format)]
        became |= dict.fromkeys(own, "altered")
        if own:
            notes.append(f"onnxruntime found the range of its {' and '.join(own)}: the ends of what calibration saw")
    if rounds_bias:
        notes.append("the bias is rounded to int32 steps of input scale times weight scale")
    if nodes is not None:
        notes += _kernel_notes(precision, nodes, compute)
    has_faults = "altered" in became.values() or runs != precision
    return LayerExport(
        name,
        str(precision),
        became["weight"],
        became["input"],
        compute,
        "; ".join(notes),
        str(runs) if has_faults else "",
    )


def _weight_fidelity(format: Format) -> Fidelity:
    if format.is_float:
        return "float"
    storage = weight_storage(format, NARROWEST)
    is_exact = storage == format or (storage.grid == "int" and storage.bits == format.bits and format.scale == "fp32")
    return "exact" if is_exact else "contained"


def _weight_notes(format: Format) -> Iterator[str]:
    storage = weight_storage(format, NARROWEST)
    if format.is_float or _weight_fidelity(format) == "exact":
        return
    if storage.is_float:
        yield f"onnxruntime has no {format} weight: its values are stored as float32"
    elif format.scale != "fp32":
        yield f"{format} codes are stored as {storage}, their scales as float32"
    else:
        yield f"{format} codes are stored as {storage}"


def _input_fidelity(format: Format) -> Fidelity:
    if format.is_float or not takes_input(format):
        return "float"
    return "exact" if format.grid == "cast" or input_storage(format).bits == format.bits else "contained"


def _input_notes(format: Format) -> Iterator[str]:
    if not takes_input(format):
        how = "finds its scales at run time" if format.is_dynamic else "is not made of integers with a zero"
        yield f"the input stays float: {format} {how}, and QuantizeLinear rounds to integers under one static range"
    elif _input_fidelity(format) == "contained":
        yield f"{format} codes are clipped to [{format.lowest}, {format.highest}] in {input_storage(format)}"


def _kernel_notes(precision: Precision, nodes: Sequence[Any], compute: str) -> Iterator[str]:
    """What only the runtime's own graph tells."""
    if has_integer_kernel(precision) and compute == "fp32":
        yield "onnxruntime has no integer kernel for it here and multiplies the same values in fp32"
    if not nodes:
        yield "onnxruntime computed it ahead of time or merged it into another operation"


def optimized_graph(file: Path) -> Any:
    """Returns the graph that onnxruntime makes of an ONNX file, as `onnx.GraphProto`.

    All optimizations are on but those of memory layout, which rename float convolutions and change no type.

    Raises:
        UnsupportedError: If the runtime refuses the model.
    """
    import onnx
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / MODEL
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = 3
        try:
            onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except (errors.Fail, errors.InvalidGraph, errors.NotImplemented, errors.RuntimeException) as error:
            raise UnsupportedError(f"onnxruntime does not load {file}: {error}") from error
        return onnx.load(optimized).graph
