"""Figures of the study: predicted against measured times, of whole networks and of their layers."""

from __future__ import annotations

import pandas as pd

from search.figures import style

COLOURS = {"roofline": style.FRONT, "lookup": style.BASELINE}
TITLES = {"roofline": "calibrated roofline", "lookup": "lookup table"}
NAMES = {"digits": "digits", "resnet20": "ResNet-20", "mobilenetv2": "MobileNetV2", "text": "text model"}
MARKS = {"float": "o", "int8": "s", "plan": "*"}
AIM = 0.15
"""Error of a whole network that is aimed at."""


def whole(found: pd.DataFrame) -> bytes:
    """Draws predicted over measured milliseconds of every policy, a panel per network; a PNG."""
    networks = [name for name in NAMES if name in set(found["network"])]
    figure, axes = style.panels(10.5, [2.9], columns=len(networks), room=0.4)
    entries = {}
    for axis, network in zip(axes, networks, strict=True):
        mine = found[found["network"] == network]
        unit = 1e6 if mine["measured_s"].max() < 1e-4 else 1e3
        ends = unit * min(mine["measured_s"].min(), mine["predicted_s"].min()), unit * max(mine["high_s"].max(), 0.0)
        line = [ends[0] / 1.15, ends[1] * 1.05]
        axis.fill_between(
            line, [(1 - AIM) * x for x in line], [(1 + AIM) * x for x in line], color=style.GRID, zorder=0
        )
        axis.plot(line, line, color=style.INK, linewidth=0.7, zorder=1)
        for model, colour in COLOURS.items():
            for row in mine[mine["model"] == model].itertuples():
                mark = MARKS.get(row.policy, "x")
                x, y = unit * row.measured_s, unit * row.predicted_s
                axis.plot([x, x], [unit * row.low_s, unit * row.high_s], color=colour, linewidth=0.8, alpha=0.4)
                (dot,) = axis.plot(x, y, mark, color=colour, markersize=8 if mark == "*" else 5, alpha=0.85)
                if mark == "o":
                    entries[TITLES[model]] = dot
        axis.set_xlim(*line)
        axis.set_ylim(*line)
        axis.set_title(NAMES[network], loc="left", fontsize=style.NORMAL, color=style.INK)
        axis.set_xlabel("measured (µs)" if unit > 1e5 else "measured (ms)", fontsize=style.NORMAL, color=style.INK)
    axes[0].set_ylabel("predicted", fontsize=style.NORMAL, color=style.INK)
    entries |= _marks(axes[0])
    style.legend(figure, entries)
    return style.png(figure)


def _marks(axis: object) -> dict[str, object]:
    """Legend entries of the marks."""
    from matplotlib.lines import Line2D

    names = {"float": "o", "int8 everywhere": "s", "mixed": "x", "plan of a search": "*"}
    return {name: Line2D([], [], color=style.INK, marker=mark, linestyle="") for name, mark in names.items()}


def layers(found: pd.DataFrame) -> bytes:
    """Draws predicted over measured time of every layer at every policy, a panel per model; a PNG."""
    figure, axes = style.panels(10.5, [3.0], columns=len(COLOURS), room=0.4)
    kinds = {"int8 kernel": "#4477aa", "float kernel": "#ccbb44", "int8, run in float": "#aa3377"}
    for axis, model in zip(axes, COLOURS, strict=True):
        mine = found[(found["model"] == model) & (found["measured_s"] > 0)]
        for kind, colour in kinds.items():
            rows = mine[mine.apply(_kind, axis=1) == kind]
            ratio = rows["predicted_s"] / rows["measured_s"]
            axis.scatter(rows["measured_s"] * 1e6, ratio, s=9, color=colour, alpha=0.5, linewidths=0)
        axis.axhspan(1 / 1.1, 1.1, color=style.GRID, zorder=0)
        axis.axhline(1, color=style.INK, linewidth=0.7)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks([1, 10, 100], ["1", "10", "100"])
        axis.set_ylim(0.25, 8)
        axis.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
        axis.minorticks_off()
        axis.set_title(TITLES[model], loc="left", fontsize=style.NORMAL, color=style.INK)
        axis.set_xlabel("measured (µs)", fontsize=style.NORMAL, color=style.INK)
    axes[0].set_ylabel("predicted / measured", fontsize=style.NORMAL, color=style.INK)
    style.legend(figure, style.swatches(kinds))
    return style.png(figure)


def _kind(row: pd.Series) -> str:
    """How a layer ran."""
    if row["precision"] in ("float", "float/float"):
        return "float kernel"
    return (
        "int8 kernel" if row["operation"] in ("QLinearConv", "QGemm", "MatMulIntegerToFloat") else "int8, run in float"
    )
