"""What the verifications of all backends share: record the simulation, replay the artifact, compare.

A task may call its model as it likes before it returns outputs. So the simulation runs behind a recorder that keeps the
arguments of every call; a fresh process runs the artifact on them; and the task computes its outputs once more, with a
player in place of the model that returns, call by call, what the artifact returned.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hwmodels import Precision
from search.backends.artifact import artifact_files
from search.backends.outcome import Latency, LayerExport, Verification
from search.errors import UnsupportedError
from search.plan import Plan
from search.policy import Policy
from search.quality.evaluate import batch_scores
from search.quality.interval import drop_interval
from search.quantize.fold import Fold, apply_folds
from search.quantize.simulate import QuantizedModel, exact_inference
from search.tasks.task import Task
from search.trace import parameter_of

WARMUP, RUNS, THREADS = 5, 40, 2
INT8 = Precision.parse("int8/uint8")


class Recorder(nn.Module):
    """Stands in for a model and keeps the arguments and results of every call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.results: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.model(*args, **kwargs)
        self.calls.append(copy.deepcopy((args, kwargs)))
        self.results.append(result)
        return result


class Player(nn.Module):
    """Stands in for a model and returns, call by call, what an artifact returned, nested as the model nests it."""

    def __init__(self, recorded: Sequence[Any], returned: Sequence[Sequence[Tensor]]) -> None:
        super().__init__()
        self.calls = iter(zip(recorded, returned, strict=True))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        like, tensors = next(self.calls)
        leaves, structure = pytree.tree_flatten(like)
        if sum(isinstance(leaf, Tensor) for leaf in leaves) != len(tensors):
            raise UnsupportedError(
                f"the artifact returns {len(tensors)} tensors where the model nests others: {structure}"
            )
        given = iter(tensors)
        return pytree.tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


@dataclass(frozen=True)
class Recording:
    """The simulated plan on the report split.

    Attributes:
        batches: The batches.
        outputs: The task's outputs of every batch.
        calls: Arguments of every call of the model.
        results: What every call returned.
    """

    batches: list[Any]
    outputs: list[Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    results: list[Any]


def record(task: Task, model: nn.Module) -> Recording:
    """Runs a model over the task's report split."""
    recorder = Recorder(model)
    batches = list(task.batches("report"))
    with exact_inference():
        outputs = [task.outputs(recorder, batch).cpu() for batch in batches]
    return Recording(batches, outputs, recorder.calls, recorder.results)


def replay(task: Task, recording: Recording, returned: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Returns the task's outputs of every batch, the model replaced by what an artifact returned for its calls."""
    player = Player(recording.results, returned)
    with torch.inference_mode():
        return [task.outputs(player, batch).cpu() for batch in recording.batches]


def single(call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call for its first sample alone."""
    size = next(len(leaf) for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim())

    def first(leaf: Any) -> Any:
        return leaf[:1] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size else leaf

    taken: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(first, call)
    return taken


def latencies(seconds: Mapping[str, Sequence[float]]) -> tuple[Latency, ...]:
    """Summarises measured seconds per forward pass by their median, 20th and 80th percentile."""
    found = []
    for name, values in seconds.items():
        low, median, high = np.percentile(values, (20, 50, 80))
        found.append(Latency(name, batch=1, median_s=float(median), low_s=float(low), high_s=float(high)))
    return tuple(found)


def compare(
    plan: Plan,
    task: Task,
    recording: Recording,
    outputs: Sequence[Tensor],
    folder: Path,
    seconds: Mapping[str, Sequence[float]],
    layers: tuple[LayerExport, ...],
    backend: str,
) -> Verification:
    """Sets what an artifact returned against the simulation and against the plan's promise.

    Args:
        plan: The plan.
        task: Scores the outputs.
        recording: The simulation's outputs, of the precisions that run.
        outputs: The artifact's outputs, batch by batch.
        folder: Holds the artifact.
        seconds: Measured seconds per forward pass, by name of what ran.
        layers: What became of each layer.
        backend: Name of the backend.
    """
    pairs = list(zip(outputs, recording.outputs, strict=True))
    scored = zip(outputs, recording.batches, strict=True)
    scores = torch.cat([task.score(found, batch) for found, batch in scored]).double().cpu().numpy()
    agreeing = torch.cat([(found.argmax(-1) == expected.argmax(-1)).flatten() for found, expected in pairs])
    promise, quality = plan.quality, task.reduce(scores)
    sign = -1 if promise.higher_is_better else 1

    def around(ends: Iterable[float | None]) -> tuple[float | None, float | None]:
        """The metric at both ends of a drop's interval."""
        found = sorted(promise.float_value + sign * end for end in ends if end is not None and math.isfinite(end))
        return (found[0], found[1]) if len(found) == 2 else (None, None)

    low, high = around(drop_interval(task, scores, batch_scores(task, task.model, recording.batches))[1:])
    promised_low, promised_high = around((promise.drop_low, promise.drop_high))
    return Verification(
        backend=backend,
        quality=quality,
        low=low,
        high=high,
        promised=promise.value,
        promised_low=promised_low,
        promised_high=promised_high,
        higher_is_better=promise.higher_is_better,
        samples=len(scores),
        agreement=float(agreeing.double().mean()),
        largest_difference=max(float((found - expected).abs().max()) for found, expected in pairs),
        bytes_on_disk=sum(file.stat().st_size for file in artifact_files(folder)),
        planned_bytes=sum(layer.weight_bytes for layer in plan.layers),
        other_bytes=_other_bytes(plan, task),
        latencies=latencies(seconds),
        predicted_s=plan.cost["latency_s"].value if "latency_s" in plan.cost else None,
        hardware=plan.hardware,
        layers=layers,
    )


def _other_bytes(plan: Plan, task: Task) -> float:
    """What a model holds beside its layers' weights: biases and other parameters and buffers, each counted once."""
    folded = apply_folds(task.model, tuple(Fold(*names) for names in plan.model.folded))
    weights = {id(_weight(folded, layer)) for layer in plan.network.names}
    tensors = {id(tensor): tensor for tensor in (*folded.parameters(), *folded.buffers())}
    return float(sum(tensor.nbytes for key, tensor in tensors.items() if key not in weights))


def _weight(model: nn.Module, layer: str) -> nn.Parameter:
    owner, parameter = parameter_of(model, layer)
    return owner.get_parameter(parameter)


def uniform_int8(plan: Plan, task: Task, simulated: QuantizedModel) -> Policy:
    """Calibrates the plan's network and returns the policy of 8 bits everywhere, which latencies are set beside."""
    simulated.calibrate([task.inputs(batch) for batch in task.batches("calibration")])
    return Policy.uniform(plan.network, INT8)
