"""The contract every cost model fulfils."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from hwmodels.cost import COSTS, Cost, CostReport, CostTable, LayerCost, LayerCosts, Tier, Workload
from hwmodels.memory import peak_activation_bytes
from hwmodels.network import Layer, Network
from hwmodels.precision import Format, Precision
from hwmodels.sequence import cache_bytes

WEIGHT_BYTES, ACTIVATION_BYTES, BIT_OPS = (
    COSTS.index(name) for name in ("weight_bytes", "activation_bytes", "bit_ops")
)

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

    def refusal(self, layer: Layer, precision: Precision) -> str | None:
        """Why the target cannot run a layer at a precision; None where it can, if only by falling back."""
        return None

    def with_integer_operations(self) -> CostModel:
        """The target as it runs graphs that are quantized between layers, too; itself where that is no difference."""
        return self

    def confirm(self, network: Network, policy: Mapping[str, Precision], workload: Workload) -> CostReport | None:
        """Prices a policy by an oracle too slow for searching, to settle a shortlist; None where there is none."""
        return None

    def network_cost(self, network: Network, policy: Mapping[str, Precision], workload: Workload) -> CostReport:
        """Prices a whole policy: the sum of the table and its boundaries, with the peak of the live activations."""
        table = self.cost_table(network, {name: (precision,) for name, precision in policy.items()}, workload)
        return sum_costs(table, network, policy, workload)


def sum_costs(table: CostTable, network: Network, policy: Mapping[str, Precision], workload: Workload) -> CostReport:
    """Adds up a cost table over a policy; what boundaries cost is in the total only.

    The result's `activation_bytes` is the peak by liveness, not a sum.
    """
    layers: dict[str, LayerCost] = {name: table.layers[name][precision] for name, precision in policy.items()}
    met = [(one.cost(policy[one.producer], policy[one.consumer]), one.path) for one in table.boundaries]
    total = sum((*(layer.cost for layer in layers.values()), *(cost for cost, _ in met)), start=table.fixed)
    peak = peak_activation_bytes(network, policy) * workload.batch
    paths: dict[str, float] = defaultdict(float, {table.fixed_path: table.fixed.latency_s})
    for cost, path in (*((layer.cost, layer.path) for layer in layers.values()), *met):
        paths[path] += cost.latency_s
    report = CostReport(replace(total, activation_bytes=peak), layers, table.tiers, table.source)
    return replace(
        report,
        path_seconds=dict(paths),
        sigmas=table.sigmas,
        warnings=table.warnings,
        cache_bytes=cache_bytes(network, workload),
    )


class StorageModel(CostModel):
    """Counts bytes and bit operations, exactly; it knows no device, hence neither time nor energy."""

    name = "storage"

    def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
        layers = {}
        for name, precisions in choices.items():
            values = storage_columns(network[name], precisions, workload)
            values[:, [COSTS.index("latency_s"), COSTS.index("energy_j")]] = math.nan
            layers[name] = LayerCosts(precisions, values)
        exact: dict[str, Tier] = {"weight_bytes": "exact", "activation_bytes": "exact", "bit_ops": "exact"}
        return CostTable(layers, fixed_storage(network), exact, "counted")


def storage_columns(layer: Layer, precisions: Sequence[Precision], workload: Workload) -> np.ndarray:
    """Counts a layer's stored bytes and bit operations at each precision; time and energy are left at zero.

    Returns:
        Costs in the order of `COSTS`, shape `(precisions, costs)`.
    """
    has_input = layer.quantizes_input and layer.input_shape
    input_values = math.prod(layer.input_shape[1:]) * workload.batch if has_input else 0
    formats, which, widths = _columns_of(tuple(precisions))
    weight_bits, input_bits, beside_inputs = widths.T
    stored = np.array([layer.weight_bits(format) for format in formats], dtype=np.float64)[which]
    numbers = np.zeros((len(precisions), len(COSTS)))
    numbers[:, WEIGHT_BYTES] = (stored + 32 * layer.bias_count + beside_inputs * layer.quantizes_input) / 8
    numbers[:, ACTIVATION_BYTES] = input_values * input_bits / 8
    numbers[:, BIT_OPS] = layer.macs * workload.batch * weight_bits * input_bits
    return numbers


@lru_cache(maxsize=1024)
def _columns_of(precisions: tuple[Precision, ...]) -> tuple[tuple[Format, ...], np.ndarray, np.ndarray]:
    """Weight formats, each once; which one each precision has; bits of weight, of input and beside an input."""
    formats = tuple(dict.fromkeys(precision.weight for precision in precisions))
    which = np.array([formats.index(precision.weight) for precision in precisions], dtype=np.intp)
    widths = [(one.weight.bits, one.input.bits, one.input.input_bits()) for one in precisions]
    return formats, which, np.array(widths, dtype=np.float64).reshape(-1, 3)


def fixed_storage(network: Network) -> Cost:
    """Bytes of the parameters that no policy touches."""
    return Cost(weight_bytes=4.0 * network.other_parameters)
