"""Plans without a search: any policy on any task, and a task made of any model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from hwmodels import Layer, Precision
from search.plan import (
    MeasuredQuality,
    ModelRecord,
    Plan,
    PlannedBudget,
    PlannedLayer,
    TensorFile,
    fingerprint,
    pack,
    plan_tensors,
    tensor_digests,
)
from search.policy import Policy
from search.quality.evaluate import Evaluator
from search.quantize.fold import fold_batch_norm
from search.quantize.settings import QuantizerSettings
from search.quantize.simulate import QuantizedModel
from search.tasks.task import Split, Task
from search.trace import trace


class ModelTask(Task):
    """A model on given inputs, the same for every split; its labels are its own float predictions."""

    def __init__(self, model: nn.Module, inputs: Any, name: str = "model") -> None:
        self.model = model.eval()
        self.example_input = inputs
        self.name = name

    def batches(self, split: Split) -> list[Any]:
        return [self.example_input]

    def inputs(self, batch: Any) -> Any:
        return batch

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        with torch.no_grad():
            labels = self.outputs(self.model, batch).argmax(-1)
        return (outputs.argmax(-1) == labels).double().reshape(len(labels), -1).mean(1)


def make_plan(
    task: Task,
    policy: str | Mapping[str, str] | Callable[[int, Layer], str],
    altered: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Returns the plan of a policy, measured on the report split.

    Args:
        task: What the plan is for.
        policy: One precision for all layers, precisions by layer, or a function of a layer's position and the layer.
            The input of weight-only layers stays in float.
        altered: Parameters of the folded model that a repair changed.
    """
    folded, folds = fold_batch_norm(task.model, task.example_input)
    network = trace(folded, task.example_input)
    names = {}
    for position, layer in enumerate(network):
        if callable(policy):
            name = policy(position, layer)
        else:
            name = policy if isinstance(policy, str) else policy[layer.name]
        precision = Precision.parse(name)
        names[layer.name] = str(precision if layer.quantizes_input else Precision(precision.weight))
    chosen = Policy.from_dict(names)
    simulated = QuantizedModel(folded, network)
    simulated.calibrate([task.inputs(batch) for batch in task.batches("calibration")])
    evaluator = Evaluator(task, simulated)
    float_value = evaluator.float_quality("report").value
    simulated.alter(altered or {})
    found = evaluator.measure(chosen, "report")
    quality = MeasuredQuality(
        split="report",
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        value=found.value,
        float_value=float_value,
        samples=found.samples,
        drop=found.drop,
        drop_low=found.to_dict()["drop_low"],
        drop_high=found.to_dict()["drop_high"],
    )
    tensors, digests = plan_tensors(simulated, chosen, altered or {}), tensor_digests(task.model)
    plan = Plan(
        schema="bitplan/1",
        digest=chosen.digest,
        task=task.name,
        model=ModelRecord(name=type(task.model).__name__, fingerprint=fingerprint(task.model), folded=tuple(folds)),
        data_fingerprint=task.fingerprint,
        hardware="none",
        workload={"batch": 1},
        strategy="none",
        seed=0,
        quantizer=asdict(QuantizerSettings()),
        recover=(),
        space={},
        budget=PlannedBudget(limits={}, reference="float", verdict="met"),
        average_weight_bits=chosen.average_weight_bits(network),
        effective_bits=chosen.effective_bits(network),
        cost={},
        cost_source="none",
        quality=quality,
        selection=quality,
        layers=tuple(_planned_layer(layer, chosen[layer.name]) for layer in network),
        points=(),
        versions={},
        config={},
        tensors=TensorFile(file="plan.safetensors", sha256=hashlib.sha256(pack(tensors, digests)).hexdigest()),
    )
    return plan.with_tensors(tensors, digests)


def _planned_layer(layer: Layer, precision: Precision) -> PlannedLayer:
    return PlannedLayer(
        name=layer.name,
        kind=layer.kind,
        weight=str(precision.weight),
        input=str(precision.input),
        weight_shape=layer.weight_shape,
        channel_axis=layer.channel_axis,
        quantizes_input=layer.quantizes_input,
        reads=layer.reads,
        groups=layer.groups,
        compute="fp32",
        latency_s=None,
        energy_j=None,
        weight_bytes=layer.weight_bits(precision.weight) / 8,
        bit_ops=0.0,
    )
