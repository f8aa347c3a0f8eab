"""What the winner costs, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from search.figures import style
from search.units import COST_NAMES, quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from search.plan import Plan

SHOWN = ("latency_s", "energy_j", "weight_bytes", "bit_ops")
OTHER = "other"
HATCHES = {"memory": "/////", "overhead": "--"}
"""Lines alone: a hatch of dots would be a megabyte of a page."""


@dataclass(frozen=True)
class LayerCostsInfo:
    """The winner's costs, one entry per layer in execution order.

    Attributes:
        layers: Names of the layers.
        compute: Type each layer computes in; empty where not known.
        bound: `compute`, `memory` or `overhead`, whichever takes longest; empty where not known.
        shares: For each cost that is known, the layers' shares of the network's in percent, and last that of everything
            that is no layer.
        totals: The network's costs in SI units.
    """

    layers: tuple[str, ...]
    compute: tuple[str, ...]
    bound: tuple[str, ...]
    shares: Mapping[str, np.ndarray]
    totals: Mapping[str, float]


def layer_costs_info(plan: Plan) -> LayerCostsInfo:
    """Gathers the winner's costs from the plan."""
    shares, totals = {}, {}
    for cost in SHOWN:
        parts, total = [getattr(layer, cost) for layer in plan.layers], plan.cost[cost].value
        if total and None not in parts:
            rest = max(total - sum(parts), 0.0)  # rounding may leave less than nothing
            shares[cost] = 100 * np.array([*parts, rest]) / total
            totals[cost] = total
    return LayerCostsInfo(
        layers=tuple(layer.name for layer in plan.layers),
        compute=tuple(layer.compute for layer in plan.layers),
        bound=tuple(layer.bound for layer in plan.layers),
        shares=shares,
        totals=totals,
    )


def draw_layer_costs(info: LayerCostsInfo) -> Figure:
    """Draws a panel of bars per cost, coloured by compute type, hatched where memory or starting is the bound."""
    from matplotlib.patches import Patch

    width, room = style.layers_width(len(info.layers) + 1), 0.4 + style.names_room(info.layers)
    figure, axes = style.panels(width, [1.3] * len(info.shares), room=room)
    palette = style.colours(info.compute, style.COMPUTE_COLOURS)
    fills = [*(palette[compute] for compute in info.compute), style.REST]
    for axis, (cost, shares) in zip(axes, info.shares.items(), strict=True):
        bars = axis.bar(range(len(shares)), shares, 0.8, color=fills)
        for bar, bound in zip(bars, info.bound, strict=False):
            if bound in HATCHES:
                bar.set(hatch=HATCHES[bound], edgecolor="white", linewidth=0)
        label = f"{COST_NAMES[cost]}\n% of {quantity(cost, info.totals[cost])}"
        axis.set_ylabel(label, fontsize=style.NORMAL, color=style.INK)
        axis.margins(y=0.12)
        style.name_columns(axis, info.layers, [OTHER])
        if axis is not axes[-1]:
            axis.tick_params(axis="x", labelbottom=False)
    entries = style.swatches(palette) if any(info.compute) else {}
    for bound, hatch in HATCHES.items():
        if bound in info.bound:
            entries[f"{bound} bound"] = Patch(facecolor=style.TRIAL, hatch=hatch, edgecolor="white", linewidth=0)
    entries["not in layers"] = Patch(color=style.REST)
    style.legend(figure, entries)
    return figure
