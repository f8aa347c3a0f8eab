"""What single choices change, from a base on: values of parameters, and the formats of quantized tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hwmodels import FLOAT, Format, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.quantize.cache import TensorCache
from search.quantize.placement import formats_of
from search.quantize.simulate import QuantizedModel
from search.quantize.straight_through import fake_quantize_input
from search.sensitivity.choices import Base, Choice


@dataclass(frozen=True)
class Site:
    """Where a tensor is quantized.

    Attributes:
        name: The layer in front of which it is, or the tensor.
        is_produced: Whether it is quantized where it is produced, as `placement=full` has it, for all that read it.
    """

    name: str
    is_produced: bool = False


class Changes:
    """The changes that choices make at a base; those that the base makes already change nothing.

    Attributes:
        parameters: Name of a weight or bias to the positions of the choices that may change it. A weight that several
            layers hold is one.
        sites: Where tensors are quantized, to the positions of the choices that change the format there, and to which.
    """

    def __init__(self, simulated: QuantizedModel, choices: Sequence[Choice], base: Base) -> None:
        """Looks up where choices act; values are computed when asked for, and kept within the simulation's limit."""
        self._simulated, self._choices, self._base = simulated, choices, base
        self._cache: TensorCache[str] = TensorCache(
            next(simulated.model.parameters()).device, simulated.settings.memory_bytes
        )
        parameters: defaultdict[str, list[int]] = defaultdict(list)
        sites: defaultdict[Site, dict[int, Format]] = defaultdict(dict)
        held = formats_at(simulated, base)
        for position, choice in enumerate(choices):
            if choice.is_in(base):
                continue
            for name in self._touched(choice):
                parameters[name].append(position)
            if choice.decision.side == "input" or simulated.points:
                made = formats_at(simulated, choice.on(base))
                for site in held.keys() | made.keys():
                    if (format := made.get(site, FLOAT)) != held.get(site, FLOAT):
                        sites[site][position] = format
        self.parameters, self.sites = dict(parameters), dict(sites)

    def _touched(self, choice: Choice) -> dict[str, None]:
        """Names of the parameters that a choice may change, each once."""
        simulated, is_weight = self._simulated, choice.decision.side == "weight"
        names = [simulated.weight_name(layer) for layer in choice.decision.layers] if is_weight else []
        if is_weight or simulated.points:  # `placement=full` keeps biases in steps of the input's scale
            names += [name for layer in choice.decision.layers if (name := simulated.bias_name(layer))]
        return dict.fromkeys(names)

    def of(self, parameter: str) -> Tensor:
        """Returns the changes of a parameter by each of its choices, float32, shape `(choices, *parameter)`.

        The network is left at the base.
        """
        return self._cache.get(parameter, lambda: (self._compute(parameter),))[0]

    def _compute(self, parameter: str) -> Tensor:
        simulated = self._simulated
        stored = simulated.apply(self._base).get_parameter(parameter)
        before, positions = stored.data, self.parameters[parameter]
        changes = torch.empty((len(positions), *before.shape), dtype=torch.float32, device=before.device)
        for change, position in zip(changes, positions, strict=True):
            simulated.apply(self._choices[position].on(self._base))
            torch.sub(stored.data.float(), before.float(), out=change)
        simulated.apply(self._base)
        return changes


def formats_at(simulated: QuantizedModel, policy: Mapping[str, Precision]) -> dict[Site, Format]:
    """Returns where a policy quantizes tensors, and the format of each; what is in float is left out.

    A layer whose inputs are all quantized where they are produced does not change them further.
    """
    operation_format = Format.parse(simulated.settings.operation_format)
    produced = formats_of(simulated.points, simulated.network, policy, operation_format) if simulated.points else {}
    found = {Site(tensor, is_produced=True): format for tensor, format in produced.items()}
    for layer in simulated.network:
        format = policy.get(layer.name, FLOAT_PRECISION).input
        is_done = layer.reads and all(produced.get(tensor) == format for tensor in layer.reads)
        if layer.quantizes_input and not (format.is_float or is_done):
            found[Site(layer.name)] = format
    return found


def quantized_at(simulated: QuantizedModel, site: Site, format: Format, x: Tensor) -> Tensor:
    """Returns what a format makes of a tensor at a site, with straight-through gradients."""
    layer: str | None = site.name
    if site.is_produced:
        point = next(point for point in simulated.points if point.tensor == site.name)
        layer = point.readers[0] if point.readers else None
    axis = simulated.feature_axis(layer) if layer else -1
    if not format.has_static_range:
        return fake_quantize_input(x, format, axis)
    range_ = simulated.input_range(layer, format) if layer else simulated.tensor_range(site.name, format)
    scale = torch.tensor(range_.scale, dtype=torch.float64, device=x.device)
    return fake_quantize_input(x, format, axis, scale, range_.zero_point)
