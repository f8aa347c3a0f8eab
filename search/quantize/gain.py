"""The gain that gives the channels of a layer's output the standard deviation they have in float.

It is what re-estimated batch norm does to a network whose norms were folded (Sun et al., "Hybrid 8-bit Floating Point
(HFP8) Training and Inference for Deep Neural Networks", 2019): a factor per output channel. The factor multiplies
weight and scale alike, so that codes and bytes stay the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hwmodels import Format
from hwmodels.network import Layer
from search.quantize.affine import per_channel
from search.quantize.formats import Parameters
from search.quantize.shift import product

SCALED_PARAMETERS = ("scale", "negative_scale", "threshold", "codebook")
LARGEST_GAIN = 1e3
"""A channel that would need more holds no signal once it is quantized, and keeps the gain of 1."""


def output_deviation(module: Any, weight: Tensor, rows: Tensor) -> Tensor:
    """Returns the standard deviation of every channel of a layer's output, shape `(channels,)`, float32.

    Args:
        module: A linear layer or a convolution of any kind.
        weight: The weight it is to have.
        rows: Its inputs, as `search.quantize.shift.input_rows` returns them.
    """
    outputs = product(module, weight, rows)
    others = [0] if isinstance(module, nn.Linear) else [0, *range(2, outputs.dim())]
    return outputs.std(others, correction=0)


def matching_gain(wanted: Tensor, found: Tensor) -> Tensor:
    """Returns the factor from one standard deviation to another, 1 where a channel is constant in either."""
    is_varied = (wanted > 0) & (found * LARGEST_GAIN > wanted)
    return torch.where(is_varied, wanted / found, 1.0)


def takes_gain(layer: Layer, format: Format) -> bool:
    """True if every output channel of a layer has scales of its own in a format, and they may be any float32."""
    is_shared = layer.kind.startswith("conv_transpose") and layer.groups > 1
    has_scales = format.scale == "fp32" and format.grid not in ("float", "cast")
    own = format.groups(layer.weight_shape, layer.channel_axis) >= layer.channels
    return has_scales and own and not is_shared


def gained_weight(weight: Tensor, gain: Tensor, axis: int) -> Tensor:
    """Returns a weight, in its own type, its channels along `axis` multiplied by `gain`, of shape `(channels,)`."""
    return (weight.float() * per_channel(gain, weight, axis)).to(weight.dtype)


def with_gain(parameters: Parameters, gain: Tensor) -> Parameters:
    """Returns the parameters of a weight whose channels were multiplied by `gain`, of shape `(channels,)`."""

    def scaled(values: Tensor) -> Tensor:
        of_groups = gain.to(values.dtype).repeat_interleave(len(values) // len(gain))
        return values * of_groups.view(-1, *[1] * (values.dim() - 1))

    return {name: scaled(value) if name in SCALED_PARAMETERS else value for name, value in parameters.items()}
