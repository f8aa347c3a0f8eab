"""The litert backend: a .tflite model that holds the plan's own codes and scales, and the recipe it was made with.

litert-torch converts the network with the plan's weights in it, ai-edge-quantizer quantizes the result. A recipe has no
place for scales, but the quantizer takes the statistics that calibration would find, by tensor and weights included; so
the plan's scales go in as the smallest and largest value that each stands for, and come out of its arithmetic as they
were. (Its algorithm `dequantized_weight_recovery` finds scales in quantized weights instead, and only where every
channel holds two neighbouring codes.) The interpreter runs the model in a process of its own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hwmodels import Layer, Precision
from search.backends.array_process import run_models
from search.backends.base import Backend
from search.backends.litert_convert import converted, leaves_of, samples_of
from search.backends.litert_model import Made, quantized
from search.backends.litert_storage import stored_as
from search.backends.outcome import ExportReport, LayerExport, Verification
from search.backends.realize import simulate
from search.backends.verify import compare, record, replay, uniform_int8
from search.plan import Plan
from search.policy import Policy
from search.quantize.simulate import QuantizedModel
from search.tasks.task import Task

MODEL, RECIPE = "model.tflite", "recipe.json"
WORKER = Path(__file__).with_name("litert_worker.py")
CALIBRATION_SAMPLES = 256
COMPUTE = {"float": "fp32", "cast": "fp32", "weight": "fp32", "dynamic": "int8"}


class LiteRT(Backend):
    """Writes `model.tflite`, for one sample at a time, and `recipe.json`, ai-edge-quantizer's recipe."""

    name = "litert"
    proof = "executed"
    packages = ("ai-edge-quantizer", "ai-edge-litert", "litert-torch")
    ranges = "own"
    usage = """
    from ai_edge_litert.interpreter import Interpreter
    run = Interpreter("model.tflite").get_signature_runner()  # takes one sample at a time, int64 as int32
    outputs = run(args_0=sample)["output_0"]  # recipe.json is what ai-edge-quantizer made of each operation
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Weights keep their values; inputs are quantized where LiteRT has a kernel, which rounds outputs too."""
        stored = stored_as(layer, precision)
        runs = Precision(precision.weight, stored.input)
        is_altered = stored.weight == "altered" or not stored.input.is_float
        return LayerExport(
            layer.name,
            str(precision),
            stored.weight,
            "float" if stored.input.is_float else "altered",
            compute=COMPUTE.get(stored.mode, f"int{stored.input.bits}"),
            note="; ".join(stored.notes),
            runs=str(runs) if is_altered or runs != precision else "",
        )

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Converts and quantizes the network, and checks the type and the scales of every weight."""
        found = made(plan.simulate(task.model), plan.policy, task)
        (folder / MODEL).write_bytes(found.content)
        (folder / RECIPE).write_text(json.dumps(found.recipe, indent=2) + "\n", encoding="utf-8")
        layers = [self.express(plan.network[name], precision) for name, precision in plan.policy.items()]
        return [_computed_ahead(layer) if layer.name in found.unfound else layer for layer in layers]

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification:
        """Runs `model.tflite` over the report split, beside the float network and the one at 8 bits everywhere."""
        report = ExportReport(self.name, (), layers)
        simulated = simulate(plan, task, report.policy)
        recording = record(task, simulated.model)
        policies = {"float": Policy({}), "int8": uniform_int8(plan, task, simulated)}
        with tempfile.TemporaryDirectory() as temporary:
            models = {"plan": folder / MODEL}
            for name, policy in policies.items():
                models[name] = Path(temporary) / f"{name}.tflite"
                models[name].write_bytes(made(simulated, policy, task).content)
            returned, seconds = run_in_fresh_process(models, recording.calls, Path(temporary))
        outputs = replay(task, recording, returned)
        return compare(plan, task, recording, outputs, folder, seconds, layers, self.name)


def _computed_ahead(layer: LayerExport) -> LayerExport:
    note = "litert-torch computed it ahead of time or made another operation of it: its values are float32"
    return replace(layer, weight="contained", compute="fp32", note=f"{layer.note}; {note}" if layer.note else note)


def made(simulated: QuantizedModel, policy: Mapping[str, Precision], task: Task) -> Made:
    """Returns the .tflite model of a policy, and the recipe it was made with.

    Raises:
        UnsupportedError: If the network cannot be converted, or quantized as the policy has it.
    """
    samples = samples_of((task.inputs(batch) for batch in task.batches("calibration")), CALIBRATION_SAMPLES)
    return quantized(converted(simulated, policy, task.example_input), simulated, policy, samples)


def run_in_fresh_process(
    models: Mapping[str, Path], calls: Sequence[Any], folder: Path
) -> tuple[list[list[Tensor]], dict[str, list[float]]]:
    """Runs the first of `models` on every sample of every call, and times all of them on the first one.

    Args:
        models: Name to .tflite file.
        calls: Positional and keyword arguments of every call.
        folder: A temporary folder, through which the processes talk.

    Returns:
        The tensors that every call returned, and the seconds of the timed runs by name of the model.

    Raises:
        UnsupportedError: If the runtime refuses a model, or a call of another shape.
    """
    arrays = {f"{key}/{i}": x.cpu().numpy() for key, call in enumerate(calls) for i, x in enumerate(leaves_of(call))}
    return run_models(WORKER, "LiteRT", models, arrays, len(calls), folder)
