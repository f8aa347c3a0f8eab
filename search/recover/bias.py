"""Bias correction: quantized weights shift the mean of a layer's outputs, and its bias can take the shift back.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019 (arXiv 1906.04721), in its
empirical form: the shift is measured on calibration data, layer after layer in execution order, with every layer before
already quantized and corrected.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from search.policy import Policy
from search.quality.evaluate import Evaluator
from search.quantize.simulate import QuantizedModel, exact_inference
from search.tasks.task import Task, call

CHANNEL_AXIS = {"linear": -1}  # of a layer's output; convolutions have theirs at 1


def bias_correction(evaluator: Evaluator, policy: Policy) -> dict[str, Tensor]:
    """Returns corrected biases by parameter name, for every quantized layer that has a bias; alters nothing."""
    simulated, task = evaluator.simulated, evaluator.task
    modules = dict(simulated.model.named_modules())
    corrected: dict[str, Tensor] = {}
    targets = [
        layer.name
        for layer in simulated.network
        if not policy[layer.name].weight.is_float and isinstance(getattr(modules.get(layer.name), "bias", None), Tensor)
    ]
    simulated.apply({})
    wanted = _output_means(simulated, task, targets)
    simulated.apply(policy)
    original = {name: modules[name].bias.detach().clone() for name in targets}
    for name in targets:
        shift = wanted[name] - _output_means(simulated, task, [name])[name]
        corrected[f"{name}.bias"] = original[name] + shift.to(original[name].dtype)
        modules[name].bias.data = corrected[f"{name}.bias"].clone()
    for name in targets:
        modules[name].bias.data = original[name]
    return corrected


def _output_means(simulated: QuantizedModel, task: Task, layers: list[str]) -> dict[str, Tensor]:
    """Mean output of every channel of `layers` over the calibration split, each of shape `(channels,)`."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        axis = CHANNEL_AXIS.get(simulated.network[name].kind, 1)

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            flat = output.movedim(axis, -1).reshape(-1, output.shape[axis]).double()
            sums[name] = sums.get(name, torch.zeros(flat.shape[1], dtype=torch.float64)) + flat.sum(0)
            counts[name] = counts.get(name, 0) + len(flat)

        return hook

    modules = dict(simulated.model.named_modules())
    handles = [modules[name].register_forward_hook(watch(name)) for name in layers]
    with exact_inference():
        for batch in task.batches("calibration"):
            call(simulated.model, task.inputs(batch))
    for handle in handles:
        handle.remove()
    return {name: sums[name] / counts[name] for name in layers}
