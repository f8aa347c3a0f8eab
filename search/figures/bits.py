"""Who gets how many bits: the winner layer by layer, and the members of the front side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hwmodels import Format, Precision
from search.figures import style
from search.units import log_ticks, quantity

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from search.plan import Plan

MOST_MEMBERS = 40  # rows of the matrix that stay readable


@dataclass(frozen=True)
class AllocationInfo:
    """The winner's formats, one entry per layer in execution order.

    Attributes:
        layers: Names.
        kinds: What legends call them.
        weights: Weight formats.
        inputs: Input formats; None for weight-only layers.
        intensity: Operations that each layer does for a byte it moves, were all it moves 8 bits wide; empty where not
            known.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    weights: tuple[Format, ...]
    inputs: tuple[Format | None, ...]
    intensity: tuple[float, ...] = ()

    @property
    def float_height(self) -> int:
        """How high `float` is drawn: a little above the most bits of an integer, for 32 would dwarf the rest."""
        formats = [format for format in (*self.weights, *self.inputs) if format and not format.is_float]
        return max((format.bits for format in formats), default=8) + 2

    def height(self, format: Format | None) -> int:
        """How high a format is drawn."""
        if format is None:
            return 0
        return self.float_height if format.is_float else format.bits


def allocation_info(plan: Plan, layers: Sequence[Mapping[str, Any]]) -> AllocationInfo:
    """Gathers the winner's formats; `layers` are the rows of layers.json."""
    rows = {layer["name"]: layer for layer in layers}
    return AllocationInfo(
        layers=tuple(layer.name for layer in plan.layers),
        kinds=tuple(style.layer_kind(rows[layer.name]) for layer in plan.layers),
        weights=tuple(Format.parse(layer.weight) for layer in plan.layers),
        inputs=tuple(Format.parse(layer.input) if layer.quantizes_input else None for layer in plan.layers),
        intensity=tuple(_intensity(rows[layer.name], int(plan.workload["batch"])) for layer in plan.layers),
    )


def _intensity(layer: Mapping[str, Any], batch: int) -> float:
    """Operations per byte at 8 bits of a row of layers.json: weights are read once for the whole batch."""
    moved = layer["weight_count"] / batch + sum(math.prod(layer[name][1:]) for name in ("input_shape", "output_shape"))
    return float(2 * layer["macs"] / moved)


def draw_allocation(info: AllocationInfo) -> Figure:
    """Draws weight bits upward and input bits downward, coloured by the kind of layer, and the intensity below."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    heights = [3.2, 0.8] if any(info.intensity) else [3.2]
    figure, (axis, *below) = style.panels(
        style.layers_width(len(info.layers)), heights, room=0.3 + style.names_room(info.layers)
    )
    palette = style.colours(info.kinds, style.KIND_COLOURS)
    for formats, direction, strength in ((info.weights, 1, 1.0), (info.inputs, -1, 0.55)):
        heights = [direction * info.height(format) for format in formats]
        bars = axis.bar(range(len(heights)), heights, 0.8, color=[palette[kind] for kind in info.kinds], alpha=strength)
        for x, (bar, format) in enumerate(zip(bars, formats, strict=True)):
            if format is None:
                continue
            if format.is_float:
                bar.set(hatch="////", edgecolor="white", linewidth=0)
            if len(info.layers) <= style.MOST_LABELS:
                _number(axis, x, heights[x], "f" if format.is_float else str(format.bits))
    axis.grid(visible=False)
    axis.axhline(0, color=style.INK, linewidth=0.8)
    top, bottom = (max(map(info.height, side)) for side in (info.weights, info.inputs))
    ticks = [bits for bits in (-16, -8, -6, -4, -2, 0, 2, 4, 6, 8, 16) if -bottom <= bits <= top]
    axis.set_yticks(ticks, [str(abs(bits)) for bits in ticks])
    axis.set_ylim(-bottom - 1.2, top + 1.2)
    axis.set_ylabel("← input bits      weight bits →", fontsize=style.NORMAL, color=style.INK)
    for panel in (axis, *below):
        style.name_columns(panel, info.layers)
        for first in stages(info.layers):
            panel.axvline(first - 0.5, color=style.GRID, linewidth=1.0, zorder=0)
    for panel in below:
        axis.tick_params(labelbottom=False)
        panel.plot(range(len(info.layers)), info.intensity, color=style.FRONT, marker="o", markersize=3, linewidth=1.2)
        known = [value for value in info.intensity if value > 0]
        if max(known) > 4 * min(known):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(FixedLocator(log_ticks(min(known), max(known))[::2]))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_ylabel("operations\nper byte", fontsize=style.NORMAL, color=style.INK)
        panel.minorticks_off()
    style.legend(figure, style.swatches(palette))
    return figure


def stages(layers: Sequence[str]) -> list[int]:
    """Where the stages of a network begin, but for the first: where the name changes up to its first number.

    Empty where stages have fewer than two layers on average, which would be a line at every turn.
    """
    heads = []
    for name in layers:
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
        heads.append(parts[: number + 1])
    turns = [place for place in range(1, len(heads)) if heads[place] != heads[place - 1]]
    return turns if 2 * (len(turns) + 1) <= len(layers) else []


def _number(axis: Axes, x: int, height: float, text: str) -> None:
    up = height > 0
    axis.annotate(
        text,
        (x, height),
        (0, 2 if up else -2),
        textcoords="offset points",
        ha="center",
        va="bottom" if up else "top",
        fontsize=style.SMALL,
        color=style.INK,
    )


@dataclass(frozen=True)
class MembersInfo:
    """Weight formats of the front's members.

    Attributes:
        layers: Names of the layers, in execution order.
        members: What to call each member.
        weights: For each member, the weight format of every layer.
        winner: Index of the winner.
    """

    layers: tuple[str, ...]
    members: tuple[str, ...]
    weights: tuple[tuple[Format, ...], ...]
    winner: int


def members_info(front: pd.DataFrame, layers: Sequence[Mapping[str, Any]], costs: Sequence[str]) -> MembersInfo:
    """Gathers the front's weight formats from front.csv, by the first cost, falling; the nearest to the winner of many.

    Args:
        front: The table front.csv.
        layers: The rows of layers.json.
        costs: The costs that the front is about, which name each member.
    """
    rows = [row for row in front.to_dict("records") if row["role"] in ("front", "winner")]
    rows.sort(key=lambda row: -row[costs[0]])
    winner = next(index for index, row in enumerate(rows) if row["role"] == "winner")
    start = min(max(winner - MOST_MEMBERS // 2, 0), max(len(rows) - MOST_MEMBERS, 0))
    rows = rows[start : start + MOST_MEMBERS]
    names = tuple(str(layer["name"]) for layer in layers)
    policies = [json.loads(row["policy"]) for row in rows]
    return MembersInfo(
        layers=names,
        members=tuple(
            ", ".join([f"{row['name']}: {row['quality']:.4f}", *(quantity(cost, row[cost]) for cost in costs)])
            for row in rows
        ),
        weights=tuple(tuple(Precision.parse(policy[name]).weight for name in names) for policy in policies),
        winner=winner - start,
    )


def draw_members(info: MembersInfo) -> Figure:
    """Draws a matrix of members and layers, coloured by weight bits."""
    from matplotlib.patches import Rectangle

    width, rows = style.layers_width(len(info.layers)) + 1.2, len(info.members)
    figure, (axis,) = style.panels(width, [0.21 * rows], room=0.4 + style.names_room(info.layers))
    colours = [[style.bits_colour(format.bits) for format in row] for row in info.weights]
    axis.imshow(colours, aspect="auto", interpolation="nearest")
    if len(info.layers) <= style.MOST_LABELS:
        for y, row in enumerate(info.weights):
            for x, format in enumerate(row):
                text = "f" if format.is_float else str(format.bits)
                axis.text(
                    x, y, text, ha="center", va="center", fontsize=style.SMALL, color=style.text_on(colours[y][x])
                )
    box = Rectangle((-0.5, info.winner - 0.5), len(info.layers), 1, fill=False, edgecolor=style.WINNER, linewidth=1.8)
    axis.add_patch(box).set_clip_on(False)
    axis.grid(visible=False)
    axis.set_yticks(range(rows), list(info.members), fontsize=style.SMALL)
    axis.get_yticklabels()[info.winner].set(fontweight="bold")
    axis.tick_params(axis="y", length=0)
    axis.spines[:].set_visible(False)
    style.name_columns(axis, info.layers)
    axis.set_xlim(-0.5, len(info.layers) - 0.5)
    used = sorted(
        {(format.bits, str(format.bits) if not format.is_float else "float") for row in info.weights for format in row}
    )
    style.legend(
        figure,
        style.swatches({f"{name} bits" if name != "float" else name: style.bits_colour(bits) for bits, name in used}),
    )
    return figure
