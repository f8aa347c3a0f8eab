"""What fine-tuning learns of a layer: its weight and bias, and the ranges that quantize the weight and the input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hwmodels import Format, Precision
from search.quantize.affine import Range
from search.quantize.formats import Parameters, defined_parameters, quantize_weight
from search.quantize.simulate import QuantizedModel
from search.quantize.straight_through import damped, fake_quantize, fake_quantize_input, learned_parameters

SPAN = 4.0
"""Standard deviations of a weight that the values of a format span: `SPAN / 2**bits` of them are about a step."""


@dataclass(frozen=True)
class Learned:
    """A tensor that is learned as the distance it has moved from its start, in a unit of its own.

    Units make one learning rate fit tensors of all magnitudes. What must stay positive is moved by factors instead.

    Attributes:
        start: Where it starts, float32.
        moved: The leaf that an optimizer changes; zeros at first.
        unit: What a distance of one is, broadcasting against `start`; None where `exp(moved)` is a factor.
    """

    start: Tensor
    moved: Tensor
    unit: Tensor | None = None

    @classmethod
    def of(cls, start: Tensor, unit: Tensor | None = None, learn: bool = True) -> Learned:
        """Returns a tensor that has not moved yet."""
        start = start.detach().float()
        return cls(start, torch.zeros_like(start, requires_grad=learn), unit)

    @property
    def value(self) -> Tensor:
        """The tensor now, with a gradient for `moved`."""
        return self.start * self.moved.exp() if self.unit is None else self.start + self.unit * self.moved


class LearnedWeight:
    """A quantized weight, its bias, and the parameters of its format.

    Parameters that follow from the weight, such as a block's power of two, are found anew whenever it has changed.

    Attributes:
        format: How the weight is quantized.
        weight: The weight in float.
        bias: The bias; None where there is none.
        ranges: The format's parameters that are learned, by name.
    """

    def __init__(
        self, simulated: QuantizedModel, layer: str, precision: Precision, spread: float, learn_ranges: bool
    ) -> None:
        """Starts from the network as a policy leaves it, gains and biases repaired in the loop included.

        Args:
            simulated: The network, with the policy applied.
            layer: Whose weight.
            precision: The layer's in the policy.
            spread: Standard deviation of the layer's outputs, by which its bias is moved.
            learn_ranges: Whether to learn the format's parameters.
        """
        self.format, self._axis = precision.weight, simulated.network[layer].channel_axis
        weight, step = simulated.stored_weight(layer, precision), SPAN / 2**self.format.bits
        others = [dim for dim in range(weight.dim()) if dim != self._axis]
        self.weight = Learned.of(weight, step * weight.float().square().mean(others, keepdim=True).sqrt())
        self.bias: Learned | None = None
        if name := simulated.bias_name(layer):
            bias = simulated.model.get_parameter(name)
            self.bias = Learned.of(bias, torch.full_like(bias, step * spread, dtype=torch.float32))
        self._dtype = weight.dtype
        self._first = simulated.stored_parameters(layer, precision)
        names = learned_parameters(self.format)
        self.ranges = {name: _learned_range(self._first[name], learn_ranges) for name in names}

    def quantized(self) -> tuple[Tensor, Parameters]:
        """The weight in its format, with gradients for all that is learned, and the parameters of the format."""
        weight = self.weight.value.to(self._dtype)
        parameters = self._parameters(weight)
        return fake_quantize(weight, self.format, self._axis, parameters), parameters

    def _parameters(self, weight: Tensor) -> Parameters:
        values = {name: learned.value for name, learned in self.ranges.items()}
        if "codebook" in values:
            return {"codebook": values["codebook"].sort(1).values}
        defined = defined_parameters(weight.detach(), self.format, self._axis)
        if defined is not None:
            return defined | values
        shared = weight.numel() // len(self._first["scale"])
        return self._first | {"scale": damped(values["scale"], shared, self.format)}

    @torch.no_grad()
    def settled(self) -> Tensor:
        """The weight to keep: as quantized, or in float where quantizing again would give other values."""
        quantized, parameters = self.quantized()
        again = quantize_weight(quantized, self.format, self._axis, parameters)
        return quantized if torch.equal(quantized, again) else self.weight.value.to(self._dtype)


def _learned_range(start: Tensor, learn: bool) -> Learned:
    """Scales are learned as factors, entries of a codebook in units of their mean distance."""
    if start.dim() == 1:
        return Learned.of(start, learn=learn)
    return Learned.of(start, (start[:, -1:] - start[:, :1]) / start.shape[1], learn)


@dataclass(frozen=True)
class LearnedRange:
    """The static range of a tensor, whose zero point stays."""

    format: Format
    scale: Learned
    zero_point: int

    @property
    def range(self) -> Range:
        """The range now."""
        return Range(float(self.scale.value.detach()), self.zero_point)

    def quantize(self, x: Tensor, axis: int) -> Tensor:
        """Quantizes values, features along `axis`, with gradients for them and the scale."""
        scale = damped(self.scale.value, x.numel() // max(len(x), 1), self.format)
        return fake_quantize_input(x, self.format, axis, scale, self.zero_point)
