"""Figures of the study: predicted against measured times, and how often the faster precision is told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.cost_models.gemm.predict import MODELS, Predictions
from search.figures import style

COLOURS = {"raw": style.REST, "calibrated": style.FRONT, "interpolated": style.BASELINE}
TITLES = {
    "raw": "datasheet roofline",
    "calibrated": "calibrated roofline, held out",
    "interpolated": "interpolation, held out",
}
DOTS = 1500
"""Dots of one table in one panel."""


def scatter(done: Sequence[Predictions]) -> bytes:
    """Draws predicted over measured time against measured time: a row per table, a column per model; a PNG."""
    figure, axes = style.panels(10.5, [1.9] * len(done), columns=len(MODELS), room=0.5)
    for number, axis in enumerate(axes):
        found, model = done[number // len(MODELS)], MODELS[number % len(MODELS)]
        rows = found.rows.sample(min(DOTS, len(found.rows)), random_state=0)
        ratio = (rows[model] / rows["seconds"]).to_numpy()
        axis.scatter(rows["seconds"], ratio, s=3, color=COLOURS[model], alpha=0.35, linewidths=0, rasterized=True)
        axis.axhspan(1 / 1.2, 1.2, color=style.GRID, zorder=0)
        axis.axhline(1, color=style.INK, linewidth=0.7)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(0.018, 6)
        axis.set_yticks([0.03, 0.1, 0.3, 1, 3], ["0.03", "0.1", "0.3", "1", "3"])
        axis.minorticks_off()
        if number < len(MODELS):
            axis.set_title(TITLES[model], loc="left", fontsize=style.NORMAL, color=style.INK)
        if number % len(MODELS) == 0:
            axis.set_ylabel(f"{found.table.name.split('_')[0].upper()}\npredicted / measured", fontsize=style.SMALL)
        else:
            axis.set_yticklabels([])
        if number >= len(axes) - len(MODELS):
            axis.set_xlabel("measured time (s)", fontsize=style.SMALL, color=style.INK)
    return style.png(figure)


def signs(pairs: pd.DataFrame) -> bytes:
    """Draws how often the faster of two precisions is told, a bar per pair and model; a PNG."""
    tables = list(dict.fromkeys(pairs["table"]))
    counts = [pairs[pairs["table"] == table].groupby(["first", "second"]).ngroups for table in tables]
    figure, axes = style.panels(9.0, [0.35 + 0.27 * max(count, 1) for count in counts], room=0.5)
    for axis, table in zip(axes, tables, strict=True):
        mine = pairs[pairs["table"] == table]
        names = list(dict.fromkeys(zip(mine["first"], mine["second"], strict=True)))
        places = np.arange(len(names))
        for row, model in enumerate(MODELS):
            signs = mine[mine["model"] == model].set_index(["first", "second"])["sign"]
            shown = [signs[name] for name in names]
            axis.barh(places + (row - 1) * 0.27, shown, 0.25, color=COLOURS[model])
        axis.axvline(0.95, color=style.INK, linewidth=0.7, linestyle=(0, (3, 3)))
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", color=style.GRID, linewidth=0.6)
        axis.set_yticks(places, [f"{first} : {second}" for first, second in names], fontsize=style.SMALL)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlim(0, 1)
        axis.set_xticks(np.arange(0, 1.01, 0.25), [])
        axis.set_title(table.split("_")[0].upper(), loc="left", fontsize=style.NORMAL, color=style.INK)
    axes[-1].set_xticks(np.arange(0, 1.01, 0.25), ["0%", "25%", "50%", "75%", "100%"])
    axes[-1].set_xlabel(
        "how often the faster of two precisions is told, where they differ by over 5% (dashed: 95%)",
        fontsize=style.SMALL,
        color=style.INK,
    )
    style.legend(figure, style.swatches({TITLES[model]: COLOURS[model] for model in MODELS}))
    return style.png(figure)
