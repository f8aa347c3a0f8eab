"""Batch norm re-estimation: the statistics that norms were trained with are not those of the quantized network.

Sun et al., "Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks", 2019, and Finkelstein
et al., "Fighting Quantization Bias With Bias", 2019 (arXiv 1906.03193). Norms that are still modules get the mean and
variance of what they read in the quantized network. Where a norm was folded into the layer before it, the same is
reached from the other side: a gain and a bias per channel give the layer's output the mean and the standard deviation
that it has in the float network. The gain multiplies weight and scale alike, so that codes and bytes stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from hwmodels import Format, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.quantize.fold import BATCH_NORMS
from search.quantize.gain import gained_weight, takes_gain, with_gain
from search.quantize.observe import first_tensor
from search.quantize.simulate import QuantizedModel
from search.recover.stages import dependent_on, float_biases, last_of, quantized_layers, stages, weight_format
from search.recover.statistics import Moments
from search.recover.unfold import channel_axis
from search.recover.watch import watch
from search.tasks.task import Task


def batch_norm(
    simulated: QuantizedModel, policy: Mapping[str, Precision], task: Task, reference: QuantizedModel | None = None
) -> QuantizedModel:
    """Returns a copy with the statistics of its batch norms, folded or not, as they are under the policy.

    In execution order, on the calibration split, with all that comes before already re-estimated; what does not depend
    on each other shares a pass. Norms that depend on nothing quantized stay. A folded norm is recognised by the bias it
    leaves: quantized linear layers and convolutions with a bias are matched. A gain needs float32 scales of every
    output channel's own; other formats (one scale per tensor, powers of two, e4m3, casts, channels that share a scale
    over groups) get the mean alone, as does a channel that is constant in either network.

    Args:
        simulated: Has the network; it is not altered.
        policy: The precisions to repair.
        task: Gives the calibration data.
        reference: Has the float network whose statistics are to be kept, and is left in float; by default `simulated`.
            Needed where an earlier repair altered weights or biases of `simulated`.
    """
    repaired = simulated.fork()
    layers = [layer for layer in quantized_layers(repaired, policy) if repaired.bias_name(layer)]
    quantized = [name for name, precision in policy.items() if precision != FLOAT_PRECISION]
    moved = dependent_on(repaired.network, quantized)
    norms = [part.name for part in repaired.network.operations if part.name in moved and _is_norm(repaired, part.name)]
    wanted = _moments(reference or repaired, {}, task, layers) if layers else {}
    for stage in stages(repaired.network, [*layers, *norms]):
        for name, found in _moments(repaired, policy, task, stage).items():
            if name in norms:
                repaired.alter({f"{name}.running_mean": found.mean, f"{name}.running_var": found.variance})
            elif name in wanted:
                _match(repaired, name, weight_format(policy, name), found, wanted[name])
    return repaired


def _is_norm(simulated: QuantizedModel, name: str) -> bool:
    """True if an operation is a batch norm that computes with running statistics."""
    module: Any = dict(simulated.model.named_modules()).get(name)
    return type(module) in BATCH_NORMS and module.running_mean is not None


def _moments(
    simulated: QuantizedModel, policy: Mapping[str, Precision], task: Task, names: list[str]
) -> dict[str, Moments]:
    """Moments of what layers return and of what norms read, by name; what no sample reaches is left out."""
    network = simulated.network
    outputs = {name: Moments(channel_axis(simulated.owner(name))) for name in names if name in network}
    inputs = {name: Moments(axis=1) for name in names if name not in network}
    with ExitStack() as hooks:
        for name, moments in inputs.items():
            hook = simulated.model.get_submodule(name).register_forward_pre_hook(_look(moments), with_kwargs=True)
            hooks.callback(hook.remove)
        looks = {name: moments.add for name, moments in outputs.items()}
        watch(simulated, policy, task, outputs=looks, until=last_of(network, names))
    return {name: moments for name, moments in (outputs | inputs).items() if moments.count}


def _look(moments: Moments) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        moments.add(first_tensor(args, kwargs))

    return hook


def _match(repaired: QuantizedModel, name: str, format: Format, found: Moments, wanted: Moments) -> None:
    """Gives a layer's output the mean and standard deviation that are wanted, by a gain and a bias per channel."""
    layer, weight = repaired.network[name], repaired.float_weight(name)
    bias, bias_name = float_biases(repaired, [name])[name].double(), repaired.bias_name(name)
    is_varied = (found.variance > 0) & (wanted.variance > 0) & takes_gain(layer, format)
    gain = torch.where(is_varied, (wanted.variance / found.variance).sqrt(), 1.0).float()
    if bias_name:
        repaired.alter({bias_name: wanted.mean - gain * (found.mean - bias)})
    if is_varied.any():
        parameters = with_gain(repaired.weight_parameters(name, format), gain)
        repaired.alter({repaired.weight_name(name): gained_weight(weight, gain, layer.channel_axis)})
        repaired.ranges.weights[name, format] = parameters
