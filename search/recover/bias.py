"""Bias correction: quantized weights shift the mean of a layer's outputs, and its bias can take the shift back.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019 (arXiv 1906.04721), in both
forms. Empirical: the shift is measured on calibration data, layer after layer in execution order, with every layer
before already quantized and corrected. Analytic: it is the layer's weight error applied to its mean input in float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from hwmodels import Precision
from search.errors import ConfigError, closest
from search.quantize.shift import Mean, expected_shift
from search.quantize.simulate import QuantizedModel
from search.recover.stages import float_biases, last_of, quantized_layers, stages
from search.recover.statistics import Moments
from search.recover.unfold import channel_axis
from search.recover.watch import watch
from search.tasks.task import Task

METHODS = ("empirical", "analytic")


def bias_correction(
    simulated: QuantizedModel,
    policy: Mapping[str, Precision],
    task: Task,
    reference: QuantizedModel | None = None,
    *,
    method: str = "empirical",
) -> QuantizedModel:
    """Returns a copy whose quantized linear layers and convolutions keep the mean of every output channel.

    Layers without a bias stay as they are, as do those that no calibration sample reaches.

    Args:
        simulated: Has the network; it is not altered.
        policy: The precisions to repair.
        task: Gives the calibration data.
        reference: Has the float network whose means are to be kept, and is left in float; by default `simulated`.
            Needed where an earlier repair altered weights or biases of `simulated`.
        method: `empirical` corrects what quantized weights and inputs shift, in one pass over the data for every group
            of layers that do not depend on each other; `analytic` what quantized weights shift, in a single pass.

    Raises:
        ConfigError: If there is no such method.
    """
    if method not in METHODS:
        raise ConfigError(
            f"bias_correction has no method {method!r}{closest(method, METHODS)}; allowed: {', '.join(METHODS)}"
        )
    repaired = simulated.fork()
    layers = [layer for layer in quantized_layers(repaired, policy) if repaired.bias_name(layer)]
    if method == "analytic":
        _correct(repaired, _expected_shifts(repaired, policy, task, layers, reference or repaired))
        return repaired
    wanted = _output_means(reference or repaired, {}, task, layers)
    for stage in stages(repaired.network, layers):
        found = _output_means(repaired, policy, task, stage)
        _correct(repaired, {layer: mean - wanted[layer] for layer, mean in found.items() if layer in wanted})
    return repaired


def _correct(repaired: QuantizedModel, shifts: Mapping[str, Tensor]) -> None:
    """Takes shifts of mean outputs, by layer, out of the layers' biases."""
    biases = float_biases(repaired, shifts)
    names = {layer: repaired.bias_name(layer) for layer in shifts}
    repaired.alter({name: biases[layer] - shifts[layer] for layer, name in names.items() if name})


def _output_means(
    simulated: QuantizedModel, policy: Mapping[str, Precision], task: Task, layers: list[str]
) -> dict[str, Tensor]:
    """Mean output of every channel over the calibration split, by layer; layers that it does not reach are left out."""
    moments = {layer: Moments(channel_axis(simulated.owner(layer))) for layer in layers}
    looks = {layer: moment.add for layer, moment in moments.items()}
    until = last_of(simulated.network, layers) if layers else None
    watch(simulated, policy, task, outputs=looks, until=until)
    return {layer: moment.mean for layer, moment in moments.items() if moment.count}


def _expected_shifts(
    repaired: QuantizedModel,
    policy: Mapping[str, Precision],
    task: Task,
    layers: Iterable[str],
    reference: QuantizedModel,
) -> dict[str, Tensor]:
    """Shift of every channel's mean output under the policy, by layer: that of its weight and that of its bias."""
    means = {layer: Mean(reference.owner(layer)) for layer in layers}
    watch(reference, {}, task, inputs={layer: _unless_empty(mean) for layer, mean in means.items()})
    biases, weights = float_biases(reference, means), {layer: reference.float_weight(layer) for layer in means}
    repaired.apply(policy)
    shifts = {}
    for layer, mean in means.items():
        if mean.value is not None:
            error = repaired.weight(layer).float() - weights[layer].float()
            shift = expected_shift(repaired.owner(layer), error, mean.value)
            shifts[layer] = shift + repaired.owner(layer).get_parameter("bias").detach() - biases[layer]
    return shifts


def _unless_empty(mean: Mean) -> Callable[[Tensor], None]:
    """Shows a mean what has values: experts may be given no rows."""
    return lambda x: mean.add(x) if x.numel() else None
