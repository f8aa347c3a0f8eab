"""The onnxruntime backend: one QDQ ONNX file that computes the plan's own values."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hwmodels import Layer, Precision
from search.backends.base import Backend
from search.backends.onnx_capture import call_arguments, capture, layers_in
from search.backends.onnx_quantize import input_storage, quantized, save, weight_storage
from search.backends.outcome import Fidelity, LayerExport, Verification
from search.backends.verify import RUNS, THREADS, WARMUP, compare, record, replay, single, uniform_int8
from search.errors import UnsupportedError
from search.plan import Plan
from search.policy import Policy
from search.tasks.task import Task, tensors_in

MODEL = "model.onnx"
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
    """Writes weights of 4, 8 and 16 bits in their own types, other widths in the next wider one."""

    name = "onnxruntime"
    proof = "executed"
    packages = ("onnx", "onnxscript", "onnxruntime")
    usage = """
    import onnxruntime
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: batch})  # float32, samples first
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Formats with integer codes keep them; other weights keep their values, other inputs are refused."""
        return _exported_layer(layer.name, precision, ())

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes `model.onnx`."""
        simulated = plan.simulate(task.model)
        simulated.apply({})
        captured = capture(simulated.model, plan.network, task.example_input)
        save(quantized(captured, simulated, plan.policy), folder / MODEL)
        return exported_layers(plan, folder / MODEL)

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification:
        """Runs `model.onnx` over the report split, beside the float network and the one at 8 bits everywhere."""
        simulated = plan.simulate(task.model)
        recording = record(task, simulated.model)
        policies = {"float": Policy({}), "int8": uniform_int8(plan, task, simulated)}
        captured = capture(simulated.model, plan.network, task.example_input)
        with tempfile.TemporaryDirectory() as temporary:
            models = {"plan": folder / MODEL}
            for name, policy in policies.items():
                models[name] = Path(temporary) / f"{name}.onnx"
                save(quantized(captured, simulated, policy), models[name])
            returned, seconds = run_in_fresh_process(models, recording.calls, Path(temporary))
        outputs = replay(task, recording, returned)
        return compare(plan, task, recording, outputs, folder, seconds, layers, self.name)


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
    keyed = dict(zip([*map(str, range(len(calls))), "single"], [*calls, single(calls[0])], strict=True))
    tensors = {key: tensors_in([args, call_arguments(kwargs)[1]]) for key, (args, kwargs) in keyed.items()}
    arrays = {f"{key}/{i}": x.cpu().numpy() for key, inputs in tensors.items() for i, x in enumerate(inputs)}
    np.savez(folder / "inputs.npz", **arrays)  # type: ignore[arg-type]
    paths = {name: str(path.resolve()) for name, path in models.items()}
    job = {"models": paths, "threads": THREADS, "warmup": WARMUP, "runs": RUNS}
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run([sys.executable, "-P", str(WORKER), str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise UnsupportedError(f"onnxruntime does not run the exported model: {done.stderr.strip().splitlines()[-1]}")
    returned: list[list[Tensor]] = [[] for _ in calls]
    with np.load(folder / "outputs.npz") as file:
        for key in file.files:
            returned[int(key.split("/")[0])].append(torch.from_numpy(file[key]))
    return returned, json.loads((folder / "seconds.json").read_text())


def exported_layers(plan: Plan, file: Path) -> tuple[LayerExport, ...]:
    """Says what became of each layer, looking for its compute type in the graph that onnxruntime makes of the file."""
    nodes: dict[str, list[Any]] = {layer.name: [] for layer in plan.layers}
    for node in optimized_graph(file).node:
        for name in layers_in(node.name):
            nodes[name].append(node)
    return tuple(_exported_layer(name, precision, nodes[name]) for name, precision in plan.policy.items())


def _exported_layer(name: str, precision: Precision, nodes: Sequence[Any]) -> LayerExport:
    weight, input_ = precision.weight, precision.input
    compute = "/".join(sorted({"int8" if node.op_type in INTEGER_OPERATIONS else "fp32" for node in nodes}))
    notes, is_rounded = [], False
    if not weight.is_float and weight_storage(weight).is_float:
        notes.append(f"onnxruntime has no {weight} weight: its values are stored as float32")
        if is_rounded := "int8" in compute:
            notes.append("onnxruntime rounds them to int8 of its own, because quantizers stand on both sides")
    elif not weight.is_float and weight != weight_storage(weight):
        shift = 2 ** (weight_storage(weight).bits - weight.bits)
        notes.append(
            f"{weight} codes are stored as {weight_storage(weight)}, times {shift}, and the scales over {shift}"
        )
    if not input_.is_float and input_ != input_storage(input_):
        notes.append(f"{input_} codes are clipped to [{input_.lowest}, {input_.highest}] in {input_storage(input_)}")
    if any(len(node.input) > BIAS_INPUT.get(node.op_type, len(node.input)) for node in nodes):
        notes.append("the bias is rounded to int32 steps of input scale times weight scale")
    if not weight.is_float and not input_.is_float and compute == "fp32":
        notes.append("onnxruntime has no integer kernel for it here and multiplies the same values in fp32")
    if not nodes:
        notes.append("onnxruntime computed it ahead of time or merged it into another operation")
    return LayerExport(
        name=name,
        precision=str(precision),
        weight="altered" if is_rounded else _fidelity(weight.is_float, weight == weight_storage(weight)),
        input=_fidelity(input_.is_float, input_ == input_storage(input_)),
        compute=compute,
        note="; ".join(notes),
    )


def _fidelity(is_float: bool, in_own_type: bool) -> Fidelity:
    return "float" if is_float else "exact" if in_own_type else "contained"


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
