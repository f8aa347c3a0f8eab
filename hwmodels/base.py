"""The contract every cost model fulfils."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hwmodels.cost import Cost, CostReport, CostTable, LayerCost, Tier, Workload
from hwmodels.memory import peak_activation_bytes
from hwmodels.network import Layer, Network
from hwmodels.precision import Precision

Choices = Mapping[str, Sequence[Precision]]
"""Layer name to the precisions it may take."""


class CostModel(ABC):
    """Predicts what a network costs on one target.

    Subclasses implement `cost_table`; a model that can only judge whole networks overrides `network_cost` as well.

    Attributes:
        name: What tables, tags and plans call the target.
    """

    name: str

    @abstractmethod
    def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
        """Prices every choice of every layer.

        Raises:
            ValueError: If a precision cannot be priced on this target.
        """

    def network_cost(self, network: Network, policy: Mapping[str, Precision], workload: Workload) -> CostReport:
        """Prices a whole policy: the sum of the table and its boundaries, with the peak of the live activations."""
        table = self.cost_table(network, {name: (precision,) for name, precision in policy.items()}, workload)
        return sum_costs(table, network, policy, workload)


def sum_costs(table: CostTable, network: Network, policy: Mapping[str, Precision], workload: Workload) -> CostReport:
    """Adds up a cost table over a policy; what boundaries cost is in the total only.

    The result's `activation_bytes` is the peak by liveness, not a sum.
    """
    layers: dict[str, LayerCost] = {name: table.layers[name][precision] for name, precision in policy.items()}
    met = [boundary.cost(policy[boundary.producer], policy[boundary.consumer]) for boundary in table.boundaries]
    total = sum((*(layer.cost for layer in layers.values()), *met), start=table.fixed)
    peak = peak_activation_bytes(network, policy) * workload.batch
    return CostReport(replace(total, activation_bytes=peak), layers, table.tiers, table.source)


class StorageModel(CostModel):
    """Counts bytes and bit operations, exactly; it knows no device, hence neither time nor energy."""

    name = "storage"

    def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
        nan = float("nan")
        layers = {
            name: {
                precision: LayerCost(
                    replace(storage_cost(network[name], precision, workload), latency_s=nan, energy_j=nan)
                )
                for precision in precisions
            }
            for name, precisions in choices.items()
        }
        fixed = fixed_storage(network)
        exact: dict[str, Tier] = {"weight_bytes": "exact", "activation_bytes": "exact", "bit_ops": "exact"}
        return CostTable(layers, fixed, exact, "counted")


def storage_cost(layer: Layer, precision: Precision, workload: Workload) -> Cost:
    """Counts a layer's stored bytes and bit operations; time and energy are left at zero."""
    weight_bits = layer.weight_bits(precision.weight) + 32 * layer.bias_count
    has_input = layer.quantizes_input and layer.input_shape
    input_values = math.prod(layer.input_shape[1:]) * workload.batch if has_input else 0
    parameters_of_input = precision.input.input_bits() if layer.quantizes_input else 0
    return Cost(
        weight_bytes=(weight_bits + parameters_of_input) / 8,
        activation_bytes=input_values * precision.input.bits / 8,
        bit_ops=float(layer.macs * workload.batch * precision.weight.bits * precision.input.bits),
    )


def fixed_storage(network: Network) -> Cost:
    """Bytes of the parameters that no policy touches."""
    return Cost(weight_bytes=4.0 * network.other_parameters)
