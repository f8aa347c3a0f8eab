"""Errors layer by layer from a quarter of the table, and how they fall with what is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from experiments.cost_models.tables.interpolation import ALL, BITS, BOTH, LAYERS, SECONDS
from search.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {BOTH: style.WINNER, BITS: style.FRONT, LAYERS: style.BASELINE, SECONDS: style.TRIAL}
TICKS = (0.3, 1, 3, 10, 30, 100)


def draw(errors: pd.DataFrame, layers: pd.DataFrame) -> bytes:
    """Draws the tables errors.csv, to the right, and layers.csv, to the left; returns a PNG."""
    figure, (left, right) = style.panels(11.0, [3.4], columns=2, room=1.1)
    _draw_layers(left, layers)
    _draw_shares(right, errors)
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_yticks(TICKS, [f"{tick:g}%" for tick in TICKS])
        axis.set_yticks([], minor=True)
    return style.png(figure)


def _draw_layers(axis: Axes, layers: pd.DataFrame) -> None:
    palette = style.colours(layers["kind"], style.KIND_COLOURS)
    for kind, colour in palette.items():
        mine = layers[layers["kind"] == kind]
        axis.vlines(mine.index, 100 * mine["median"], 100 * mine["p90"], color=colour, linewidth=2.2)
        axis.plot(mine.index, 100 * mine["median"], "o", color=colour, markersize=5, label=kind)
    axis.set_ylabel("error, median to 90th percentile", fontsize=style.NORMAL, color=style.INK)
    axis.set_title("A quarter known, read from both", loc="left", fontsize=style.NORMAL, color=style.INK)
    style.name_columns(axis, layers["layer"].tolist())
    _legend(axis, "lower right", (1.0, 0.99), 4)


def _draw_shares(axis: Axes, errors: pd.DataFrame) -> None:
    whole = errors[errors["kind"] == ALL].groupby(["from", "known"])[["median", "p90"]].mean()
    for way, colour in COLOURS.items():
        curve = whole.loc[way]
        axis.plot(curve.index, 100 * curve["median"], "o-", color=colour, label=f"from {way}", markersize=4)
        axis.plot(curve.index, 100 * curve["p90"], "o:", color=colour, markersize=3)
    axis.set_xscale("log", base=2)
    shares = sorted(errors["known"].unique())
    axis.set_xticks(shares, [f"1/{round(1 / share)}" for share in shares])
    axis.set_xlabel("share of the table known", fontsize=style.NORMAL, color=style.INK)
    axis.set_ylabel("error, median (solid), 90th percentile (dotted)", fontsize=style.NORMAL, color=style.INK)
    axis.set_title("All layers, means over seeds", loc="left", fontsize=style.NORMAL, color=style.INK)
    _legend(axis, "upper center", (0.5, -0.16), 2)


def _legend(axis: Axes, place: str, anchor: tuple[float, float], columns: int) -> None:
    axis.legend(
        loc=place,
        bbox_to_anchor=anchor,
        ncols=columns,
        fontsize=style.SMALL,
        frameon=False,
        labelcolor=style.INK,
        handlelength=1.6,
        columnspacing=1.0,
    )
