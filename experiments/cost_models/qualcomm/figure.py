"""Predicted against measured latencies, and ratios of precisions network by network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from search.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"w8a8": style.FRONT, "w8a16": style.BASELINE, "float": style.WINNER}
MARKS = {"roofline": ("o", style.WINNER), "constant": ("_", style.TRIAL)}
LABELS = {"roofline": "roofline", "constant": "median of the others"}


def draw_latencies(predicted: pd.DataFrame, chips: Sequence[str]) -> bytes:
    """Draws predictions of networks that were left out, one panel per chip; returns a PNG."""
    from matplotlib.lines import Line2D

    figure, axes = style.panels(9.6, [3.2], columns=len(chips))
    for axis, chip in zip(axes, chips, strict=True):
        rows = predicted[predicted.chip == chip]
        for precision, colour in COLOURS.items():
            some = rows[rows.precision == precision]
            axis.scatter(
                1e3 * some.latency_s, 1e3 * some.roofline_s, s=20, color=colour, alpha=0.8, linewidth=0, zorder=3
            )
        ends = 0.7e3 * rows.latency_s.min(), 1.5e3 * rows.latency_s.max()
        axis.plot(ends, ends, color=style.INK, linewidth=0.8)
        low, high = ([share * end for end in ends] for share in (0.8, 1.2))
        axis.fill_between(ends, low, high, color=style.GRID, linewidth=0, zorder=0)
        axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        axis.grid(visible=False)
        axis.set_title(chip, loc="left", fontsize=style.NORMAL, color=style.INK)
        axis.set_xlabel("measured, ms", fontsize=style.NORMAL, color=style.INK)
    axes[0].set_ylabel("predicted, left out, ms", fontsize=style.NORMAL, color=style.INK)
    marks = {name: Line2D([], [], marker="o", linewidth=0, color=colour) for name, colour in COLOURS.items()}
    style.legend(figure, marks | style.swatches({"within 20%": style.GRID}))
    return style.png(figure)


def draw_ratios(found: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> bytes:
    """Draws the ratio of two precisions of each network, a panel per chip and pair of precisions; returns a PNG."""
    from matplotlib.lines import Line2D

    figure, axes = style.panels(9.6, [2.6] * len(pairs), room=0.4)
    for axis, (chip, ratio) in zip(axes, pairs, strict=True):
        rows = found[(found.chip == chip) & (found.ratio == ratio)].sort_values("measured", ignore_index=True)
        _columns(axis, rows)
        axis.set_title(f"{chip}: {ratio.replace('/', ' over ')}", loc="left", fontsize=style.NORMAL, color=style.INK)
        axis.set_ylabel("ratio of latencies", fontsize=style.NORMAL, color=style.INK)
        axis.set_xticks(range(len(rows)), rows.model, rotation=30, ha="right", fontsize=style.SMALL)
    marks = {"measured": Line2D([], [], color=style.INK, linewidth=5, alpha=0.35)}
    marks |= {
        LABELS[name]: Line2D([], [], marker=mark, color=colour, linewidth=0) for name, (mark, colour) in MARKS.items()
    }
    style.legend(figure, marks)
    return style.png(figure)


def _columns(axis: Axes, rows: pd.DataFrame) -> None:
    axis.bar(range(len(rows)), rows.measured, 0.7, color=style.INK, alpha=0.25)
    for name, (mark, colour) in MARKS.items():
        axis.scatter(range(len(rows)), rows[name], s=90 if mark == "_" else 22, marker=mark, color=colour, zorder=3)
    axis.axhline(1, color=style.INK, linewidth=0.8)
    axis.set_xlim(-0.6, len(rows) - 0.4)
