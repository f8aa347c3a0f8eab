"""Prices of policies: every cost of any policy, and the columns the solver adds up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hwmodels import CostModel, CostReport, CostTable, Network, Precision, StorageModel, Workload, at_workload
from hwmodels.base import sum_costs
from hwmodels.cost import ADDITIVE_COSTS
from hwmodels.precision import FLOAT_PRECISION
from search.errors import ConfigError
from search.policy import Policy
from search.space import SearchSpace

if TYPE_CHECKING:
    import pandas as pd

INT8 = Precision.parse("int8/uint8")


def placed(cost_model: CostModel, placement: str) -> CostModel:
    """The target as it runs networks that are quantized at a placement of `search.quantize.settings`."""
    return cost_model.with_integer_operations() if placement == "full" else cost_model


@dataclass(frozen=True)
class Pricing:
    """What policies of one space cost on one target.

    Attributes:
        network: The network, at the workload's shapes.
        space: The choices.
        cost_model: The target.
        workload: What is asked of the network at once.
    """

    network: Network
    space: SearchSpace
    cost_model: CostModel
    workload: Workload

    @classmethod
    def of(cls, network: Network, space: SearchSpace, cost_model: CostModel, workload: Workload) -> Pricing:
        """Prices of a network as it was traced.

        Raises:
            ConfigError: If the workload asks for tokens and the network reads none.
        """
        try:
            return cls(at_workload(network, workload), space, cost_model, workload)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def report(self, policy: Mapping[str, Precision]) -> CostReport:
        """Prices a policy layer by layer; one of the space from the table that is there already."""
        is_sum = type(self.cost_model).network_cost is CostModel.network_cost
        if is_sum and all(policy[name] in self.table.layers[name] for name in self.table.layers):
            return sum_costs(self.table, self.network, policy, self.workload)
        with self._naming():
            return self.cost_model.network_cost(self.network, policy, self.workload)

    def runs(self, policy: Mapping[str, Precision]) -> bool:
        """Whether the target can run a policy."""
        return all(self.cost_model.refusal(self.network[layer], policy[layer]) is None for layer in policy)

    def costs(self, policy: Policy) -> dict[str, float]:
        """Every cost of a policy, with its average and effective weight bits.

        Of one that the target cannot run, such as the float network on an integer accelerator, only what is counted:
        time and energy are NaN.
        """
        bits = {
            "average_weight_bits": policy.average_weight_bits(self.network),
            "effective_bits": policy.effective_bits(self.network),
        }
        priced = self if self.runs(policy) else replace(self, cost_model=StorageModel())
        return asdict(priced.report(policy).total) | bits

    def reference(self, name: str) -> dict[str, float]:
        """Costs of the `float` or the `int8` network."""
        precision = FLOAT_PRECISION if name == "float" else INT8
        return self.costs(Policy.uniform(self.network, precision))

    @cached_property
    def table(self) -> CostTable:
        """The cost of every choice of every layer."""
        with self._naming():
            return self.cost_model.cost_table(self.network, self.space.layer_choices, self.workload)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turns what a cost model cannot price into an error of the configuration."""
        try:
            yield
        except ValueError as error:
            raise ConfigError(f"hardware {self.cost_model.name}: {error}") from error

    @cached_property
    def columns(self) -> dict[str, tuple[np.ndarray, ...]]:
        """Additive costs: for each cost, one array per unit with one value per choice.

        What no choice changes is in `fixed`. Average and effective bits are per weight of the whole network.
        """
        columns: dict[str, list[np.ndarray]] = {name: [] for name in self.fixed}
        for unit in self.space.units:
            layers = [
                (self.network[name], tuple(self.space.precision_of(name, choice) for choice in unit.choices))
                for name in unit.layers
            ]
            for cost in ADDITIVE_COSTS:
                columns[cost].append(np.sum([self.table.column(cost, layer.name, p) for layer, p in layers], axis=0))
            nominal = [
                sum(p[i].weight.bits * layer.weight_count for layer, p in layers) for i in range(len(unit.choices))
            ]
            stored = [sum(layer.weight_bits(p[i].weight) for layer, p in layers) for i in range(len(unit.choices))]
            columns["average_weight_bits"].append(np.array(nominal) / self.network.weight_count)
            columns["effective_bits"].append(np.array(stored) / self.network.weight_count)
        return {name: tuple(arrays) for name, arrays in columns.items()}

    @cached_property
    def fixed(self) -> dict[str, float]:
        """The part of each additive cost that no choice changes."""
        fixed = {name: getattr(self.table.fixed, name) for name in ADDITIVE_COSTS}
        return fixed | {"average_weight_bits": 0.0, "effective_bits": 0.0}

    def totals(self, points: np.ndarray) -> dict[str, np.ndarray]:
        """Sums of the costs that add up, for many points of the space at once.

        Peaks and what boundaries cost are left out, and the last digits may differ from those of `costs`.

        Args:
            points: Shape `(policies, decisions)`.

        Returns:
            For each cost an array of shape `(policies,)`.
        """
        totals = {name: np.full(len(points), fixed) for name, fixed in self.fixed.items()}
        for number, unit in enumerate(self.space.units):
            inputs = len(self.space.decisions[unit.input].formats)
            chosen = points[:, unit.weight] * inputs + points[:, unit.input]
            for name, total in totals.items():
                total += self.columns[name][number][chosen]
        return totals

    def to_frame(self) -> pd.DataFrame:
        """The cost table as `layer, precision, compute, bound` and one column per cost."""
        import pandas as pd

        return pd.DataFrame(
            [
                {"layer": layer, "precision": str(precision), "compute": priced.compute, "bound": priced.bound}
                | asdict(priced.cost)
                for layer, row in self.table.layers.items()
                for precision, priced in row.items()
            ]
        )
