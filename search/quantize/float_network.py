"""The float network under a simulation: who owns the weight and the bias of each layer, and what they are in float."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor, nn

from hwmodels import Network
from search.quantize.shift import LINEAR_KINDS
from search.trace import parameter_of


class FloatNetwork:
    """A network's parameters by layer.

    Attributes:
        model: The network, whose weights may hold other values for the moment.
        network: Its layers.
    """

    def __init__(self, model: nn.Module, network: Network) -> None:
        """Remembers the weights and biases that `model` holds now."""
        self.model = model
        self.network = network
        self._owners = {layer.name: parameter_of(model, layer.name) for layer in network}
        self._names = {id(value): name for name, value in model.named_parameters()}
        self._float = {name: self.weight(name).detach().clone() for name in network.names}
        self._float_bias = {
            name: model.get_parameter(bias).detach().clone() for name in network.names if (bias := self.bias_name(name))
        }
        self._sharing = self._weight_sharing()

    def owner(self, layer: str) -> nn.Module:
        """The module that runs a layer and owns its weight."""
        return self._owners[layer][0]

    def weight(self, layer: str) -> nn.Parameter:
        """The weight a layer holds now."""
        owner, name = self._owners[layer]
        return owner.get_parameter(name)

    def float_weight(self, layer: str) -> Tensor:
        """The weight a layer has in float."""
        return self._float[layer]

    def weight_name(self, layer: str) -> str:
        """Name of a layer's weight among the model's parameters."""
        return self._names[id(self.weight(layer))]

    def bias_name(self, layer: str) -> str | None:
        """Name of the bias that a linear layer or convolution adds; None for other layers, and where there is none."""
        owner = self.owner(layer)
        bias = owner._parameters.get("bias") if isinstance(owner, LINEAR_KINDS) else None
        return None if bias is None else self._names[id(bias)]

    def _weight_sharing(self) -> dict[str, list[str]]:
        """Layer name to the layers that hold the same weight, in execution order, itself included."""
        holders = defaultdict(list)
        for name in self.network.names:
            holders[id(self.weight(name))].append(name)
        return {name: names for names in holders.values() for name in names}
