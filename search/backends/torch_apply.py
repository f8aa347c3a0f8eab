"""Checks backends whose package puts quantizers of its own into a network, in place of writing a new one."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from hwmodels import Format, Layer, Precision
from search.backends.outcome import ExportReport, Fidelity, LayerExport, Verification
from search.backends.realize import simulate
from search.backends.torch_process import run_in_fresh_process
from search.backends.verify import compare, record, replay, uniform_int8
from search.plan import Plan
from search.quantize.simulate import QuantizedModel
from search.tasks.task import Task

Write = Callable[[QuantizedModel, Mapping[str, Precision], Path], None]
"""Writes the artifact of a policy into a folder."""


def check_applied(
    backend: str,
    load: str,
    plan: Plan,
    task: Task,
    folder: Path,
    layers: tuple[LayerExport, ...],
    write: Write,
    recalibrated: bool = False,
) -> Verification:
    """Runs a folder's quantizers over the report split, beside the float network and the one at 8 bits everywhere.

    Args:
        backend: Its name.
        load: A function as `module:name`, which a fresh process gives a float network, a folder (None for float) and
            inputs to calibrate on, and which returns the network with the folder's quantizers.
        plan: The plan.
        task: Its task.
        folder: The artifact.
        layers: What became of each layer.
        write: Writes the artifact of another policy, whose latency is set beside the plan's.
        recalibrated: Whether `load` finds the ranges, from the float weights and the calibration split.

    Raises:
        UnsupportedError: If the network cannot be sent to another process, or fails there.
    """
    runs = ExportReport(backend, (), layers).policy
    simulated = simulate(plan, task, runs)
    recording = record(task, simulated.model)
    calibration = [task.inputs(batch) for batch in task.batches("calibration")] if recalibrated else []
    models: dict[str, tuple[nn.Module, Path | None, list[object]]] = {
        "plan": (network_to_quantize(simulated, {} if recalibrated else runs), folder.resolve(), calibration),
        "float": (network_to_quantize(simulated, {}), None, []),
    }
    with tempfile.TemporaryDirectory() as temporary:
        int8, beside = uniform_int8(plan, task, simulated), Path(temporary) / "int8"
        beside.mkdir()
        write(simulated, int8, beside)
        models["int8"] = network_to_quantize(simulated, int8), beside, []
        returned, seconds = run_in_fresh_process(load, models, recording.calls, Path(temporary))
    outputs = replay(task, recording, returned)
    return compare(plan, task, recording, outputs, folder, seconds, layers, backend)


def network_to_quantize(simulated: QuantizedModel, policy: Mapping[str, Precision]) -> nn.Module:
    """Returns a copy of the folded network whose weights lie on the grids of a policy, its inputs in float.

    Quantizers under the same scales then find the very same codes, since what lies on a grid is far from where rounding
    turns.
    """
    weights = {name: Precision(precision.weight) for name, precision in policy.items()}
    network = copy.deepcopy(simulated.apply(weights))
    simulated.apply({})
    return network


def exact_or_float(backend: str, layer: Layer, precision: Precision, runs: Precision, reason: str = "") -> LayerExport:
    """Says of a layer that is simulated as planned, but for what stays in float, what becomes of it.

    Args:
        backend: Name of the backend.
        layer: The layer.
        precision: What was planned.
        runs: The same, float where the backend has no quantizer.
        reason: What the quantizers lack, in words that follow "no int4 weight of linear".
    """
    sides = (("weight", precision.weight, runs.weight), ("input", precision.input, runs.input))
    notes = [
        f"{backend} has no {planned} {side} of {layer.kind}{reason}: it stays in float"
        for side, planned, running in sides
        if running != planned
    ]
    weight, input_ = (_fidelity(format) for format in (runs.weight, runs.input))
    said = "" if runs == precision else str(runs)
    return LayerExport(layer.name, str(precision), weight, input_, "fp32", "; ".join(notes), said)


def _fidelity(runs: Format) -> Fidelity:
    return "float" if runs.is_float else "exact"
