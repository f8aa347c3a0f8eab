"""Cycles that each law predicts against those of the table, entry by entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from search.figures import style

COLOURS = {
    "stem": "#332288",
    "expand": "#88ccee",
    "project": "#44aa99",
    "depthwise": "#ddcc77",
    "pointwise, 7 x 7": "#aa4499",
    "classifier": "#cc6677",
}


def draw(cycles: np.ndarray, predicted: Mapping[str, np.ndarray], kinds: Sequence[str]) -> bytes:
    """Draws a panel per law; returns a PNG.

    Args:
        cycles: The table, shape `(layers, weight bits, input bits)`.
        predicted: For each law what it makes of the table.
        kinds: Kinds of the layers, keys of `COLOURS`.
    """
    figure, axes = style.panels(12.0, [3.2], columns=len(predicted), room=0.5)
    ends = 3e2, 1e7
    for axis, (law, found) in zip(axes, predicted.items(), strict=True):
        axis.plot(ends, ends, color=style.INK, linewidth=0.8, zorder=1)
        for kind, colour in COLOURS.items():
            mine = [index for index, one in enumerate(kinds) if one == kind]
            axis.scatter(cycles[mine], found[mine], s=7, color=colour, linewidths=0, alpha=0.8, zorder=2)
        off = np.abs(found / cycles - 1)
        axis.set_title(law, loc="left", fontsize=style.NORMAL, color=style.INK)
        errors = f"median error {np.median(off):.1%}\n90% below {np.percentile(off, 90):.1%}\nlargest {off.max():.1%}"
        axis.text(
            0.04,
            0.96,
            errors if off.any() else f"all {off.size:,} entries exactly",
            transform=axis.transAxes,
            va="top",
            fontsize=style.SMALL,
            color=style.INK,
        )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(*ends)
        axis.set_ylim(*ends)
        axis.set_aspect("equal")
        axis.set_xlabel("cycles in the table", fontsize=style.NORMAL, color=style.INK)
    axes[0].set_ylabel("cycles predicted", fontsize=style.NORMAL, color=style.INK)
    for axis in axes[1:]:
        axis.tick_params(labelleft=False)
    style.legend(figure, style.swatches(COLOURS))
    return style.png(figure)
