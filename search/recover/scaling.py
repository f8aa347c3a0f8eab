"""Moves per-channel factors from what produces a tensor to the layers that read it; the network computes the same.

Where `y = W2 f(W1 x)` and `f` lets positive factors through, as ReLU does, the rows of W1 may be divided by any factors
`s` and the columns of W2 multiplied by them: the network is the same, but its tensors are easier or harder to quantize.
`sites` finds the places; equalization, SmoothQuant and AWQ are three ways to choose `s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hwmodels import Precision
from hwmodels.network import Layer
from hwmodels.precision import FLOAT_PRECISION
from search.quantize.simulate import QuantizedModel
from search.tasks.task import Task

Side = Literal["input", "output"]


@dataclass(frozen=True, eq=False)
class Site:
    """A tensor whose channels can be rescaled: what produces it, and every layer that reads it.

    Attributes:
        producer: A layer, or a norm with a weight per channel.
        channels: Number of channels that the producer writes.
        columns: Reader to the producer's channel behind each of its input channels, int64 of shape `(inputs,)`; -1
            where an input channel comes from elsewhere. Flattened pixels and the heads that share one value projection
            are several columns of one channel.
        offset: What a norm adds to its weight before it multiplies: 1 where it stores how far its gain is from 1.
    """

    producer: str
    channels: int
    columns: Mapping[str, Tensor]
    offset: float = 0.0

    @property
    def readers(self) -> tuple[str, ...]:
        """The layers that read the tensor, in execution order."""
        return tuple(self.columns)

    def spread(self, reader: str, factors: Tensor) -> Tensor:
        """Returns the factor of each input channel of a reader, shape `(inputs,)`; 1 where none applies."""
        return torch.cat([factors, factors.new_ones(1)])[self.columns[reader].to(factors.device)]

    def gather(self, values: Mapping[str, Tensor], how: Literal["amax", "mean"] = "amax") -> Tensor:
        """Joins one value per input channel of each reader to one per channel of the site, shape `(channels,)`.

        A channel that nobody reads gets 0.
        """
        stacked = torch.cat([values[reader].float().cpu() for reader in self.readers])
        channel = torch.cat([columns.cpu() for columns in self.columns.values()])
        joined = torch.zeros(self.channels, dtype=stacked.dtype)
        read = channel >= 0
        return joined.scatter_reduce(0, channel[read], stacked[read], how, include_self=False)


class Rescaling:
    """The parameters of a network as they become while factors move from site to site.

    Arithmetic is in float32 at least; the model itself is altered by `applied` only.
    """

    def __init__(self, simulated: QuantizedModel) -> None:
        self._simulated = simulated
        self._parameters = dict(simulated.apply({}).named_parameters())
        self._moved: dict[str, Tensor] = {}

    def weight(self, layer: str) -> Tensor:
        """The weight of a layer with all factors moved so far."""
        return self._now(self._simulated.weight_name(layer))

    def move(self, site: Site, factors: Tensor) -> None:
        """Divides what the producer writes by positive `factors`, shape `(channels,)`; the readers make up for it."""
        network = self._simulated.network
        if site.producer in network:
            layer = network[site.producer]
            name, bias = self._simulated.weight_name(layer.name), self._simulated.bias_name(layer.name)
            self._moved[name] = self._now(name) / along(layer, factors.to(self._now(name)), "output")
        else:
            name, bias = f"{site.producer}.weight", f"{site.producer}.bias"
            self._moved[name] = (self._now(name) + site.offset) / factors.to(self._now(name)) - site.offset
        if bias in self._parameters:
            self._moved[bias] = self._now(bias) / factors.to(self._now(bias))
        for reader in site.readers:
            name = self._simulated.weight_name(reader)
            columns = site.spread(reader, factors.to(self._now(name)))
            self._moved[name] = self._now(name) * along(network[reader], columns, "input")

    def tensors(self) -> dict[str, Tensor]:
        """The parameters that have changed, by name, in their own type."""
        return {name: value.to(self._parameters[name].dtype) for name, value in self._moved.items()}

    def applied(self, task: Task) -> QuantizedModel:
        """Returns the simulated network with the factors moved, its inputs observed anew on the calibration split."""
        if self._moved:
            self._simulated.alter(self.tensors())
            self._simulated.calibrate(task.inputs(batch) for batch in task.batches("calibration"))
        return self._simulated

    def _now(self, name: str) -> Tensor:
        if name in self._moved:
            return self._moved[name]
        value = self._parameters[name].detach()
        return value.to(torch.promote_types(value.dtype, torch.float32))


def along(layer: Layer, values: Tensor, side: Side) -> Tensor:
    """Shapes one value per input or output channel of a layer so that it broadcasts over the layer's weight."""
    rows, columns, *kernel = layer.weight_shape
    ones = [1] * len(kernel)
    if _is_first_axis(layer, side):
        return values.view(-1, 1, *ones)
    return values.view(layer.groups, -1).repeat_interleave(rows // layer.groups, 0).view(rows, columns, *ones)


def largest(layer: Layer, weight: Tensor, side: Side) -> Tensor:
    """Returns the largest magnitude of the weights of every input or output channel, shape `(channels,)`."""
    magnitudes = weight.abs().reshape(*weight.shape[:2], -1).amax(2)
    if _is_first_axis(layer, side):
        return magnitudes.amax(1)
    return magnitudes.view(layer.groups, -1, weight.shape[1]).amax(1).flatten()


def _is_first_axis(layer: Layer, side: Side) -> bool:
    """True if a weight's first axis is that of the inputs or outputs; its second is shared by the groups."""
    return (side == "output") != layer.kind.startswith("conv_transpose")


def quantized_sites(sites: Iterable[Site], policy: Mapping[str, Precision]) -> list[Site]:
    """Returns the sites all of whose readers the policy quantizes, their weights or their inputs."""
    return [
        site for site in sites if all(policy.get(reader, FLOAT_PRECISION) != FLOAT_PRECISION for reader in site.readers)
    ]
