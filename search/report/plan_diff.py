"""The plan diff: which layers two policies treat differently, and what that costs, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hwmodels import Precision

if TYPE_CHECKING:
    import pandas as pd

LAYER_COSTS = ("weight_bytes", "latency_s", "energy_j", "bit_ops")
"""The costs that are known layer by layer."""


@dataclass(frozen=True)
class Change:
    """A layer that two policies treat differently.

    Attributes:
        layer: Name of the layer.
        before: Its precision in the one policy.
        after: Its precision in the other.
        costs: By name, how much more the layer costs after, in SI units; NaN where either cost is not known.
    """

    layer: str
    before: Precision
    after: Precision
    costs: Mapping[str, float]

    @property
    def weight_bits(self) -> int:
        """How many more bits a weight has after."""
        return self.after.weight.bits - self.before.weight.bits


def plan_diff(before: Mapping[str, str], after: Mapping[str, str], costs: pd.DataFrame | None) -> list[Change]:
    """Lists the layers that two policies treat differently, in the order of the second.

    Args:
        before: A policy: layer names and precisions.
        after: The policy it is held against, of the same layers.
        costs: The table costs.parquet, which prices every choice of every layer; None where there is none.
    """
    prices: dict[tuple[str, str], Mapping[Any, Any]] = {}
    if costs is not None:
        prices = {(row["layer"], row["precision"]): row for row in costs.to_dict("records")}

    def more(layer: str, cost: str) -> float:
        old, new = (prices.get((layer, policy[layer]), {}).get(cost, math.nan) for policy in (before, after))
        return float(new - old)

    return [
        Change(
            layer=layer,
            before=Precision.parse(before[layer]),
            after=Precision.parse(after[layer]),
            costs={cost: more(layer, cost) for cost in LAYER_COSTS},
        )
        for layer in after
        if before[layer] != after[layer]
    ]


def best_uniform(front: pd.DataFrame, about: Mapping[str, Any]) -> dict[Any, Any]:
    """The uniform baseline to beat, as a row of front.csv with its policy parsed.

    Of those that keep the budget it is the best: the one of the least drop of quality, or of the least primary cost
    where the budget limits the drop. Where none does, it is the nearest: the one of the least primary cost, or of the
    least drop where the budget limits the drop.

    Args:
        front: The table front.csv.
        about: What run.json says.
    """
    rows = front[front["role"] == "uniform"].to_dict("records")
    keeping = [row for row in rows if row["verdict"] == "met"]
    limits_drop = about["budget"].get("quality_drop") is not None
    keys = ["drop", about["primary_cost"]]
    if limits_drop == bool(keeping):
        keys.reverse()
    best = min(keeping or rows, key=lambda row: tuple(row[key] for key in keys))
    return best | {"policy": json.loads(best["policy"])}
