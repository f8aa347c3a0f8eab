"""How figures look: one colour per role, one map for bits, bare axes, and room for the names of many layers.

Colours are of the Okabe-Ito and Paul Tol palettes, which people with colour vision deficiencies can tell apart.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Colour = tuple[float, float, float, float]

DPI = 200
INK = "#333333"
GRID = "#e4e4e4"

WINNER = "#d55e00"
FRONT = "#0072b2"
BASELINE = "#009e73"
TRIAL = "#8c8c8c"
INFEASIBLE = "#b0b0b0"

KIND_COLOURS = {
    "conv": "#332288",
    "pointwise": "#88ccee",
    "depthwise": "#ddcc77",
    "linear": "#cc6677",
    "embedding": "#117733",
    "attention": "#aa4499",
    "lstm": "#44aa99",
    "gru": "#999933",
}
COMPUTE_COLOURS = {
    "int8": "#4477aa",
    "fp32": "#ccbb44",
    "int4": "#aa3377",
    "bf16": "#66ccee",
    "fp16": "#228833",
    "": "#bbbbbb",
}
SPARE_COLOURS = ("#882255", "#6699cc", "#997700", "#994455", "#004488")
"""For kinds and types without a colour of their own."""

SMALL = 7.0  # points
NORMAL = 8.5
MOST_LABELS = 64  # names of layers that fit side by side in the widest figure


def layer_kind(layer: Mapping[str, Any]) -> str:
    """What a row of layers.json is called in legends: convolutions by shape, anything else by its kind."""
    kind = str(layer["kind"])
    if not kind.startswith("conv"):
        return kind
    if layer["groups"] > 1 and layer["groups"] == layer["weight_shape"][layer["channel_axis"]]:
        return "depthwise"
    return "pointwise" if all(size == 1 for size in layer["kernel"]) else "conv"


def colours(names: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
    """Gives every name its colour, in the order of `known`, and spare ones to names without."""
    given = dict.fromkeys(names)
    spare = [name for name in given if name not in known]
    mine = {name: colour for name, colour in known.items() if name in given}
    return mine | {name: SPARE_COLOURS[index % len(SPARE_COLOURS)] for index, name in enumerate(spare)}


def bits_colour(bits: int) -> Colour:
    """Colour of a number of bits: light for 2, dark from 10 up."""
    from matplotlib import colormaps

    return colormaps["YlGnBu"](0.1 + 0.9 * (min(max(bits, 2), 10) - 2) / 8)


def text_on(colour: Colour) -> str:
    """Black or white, whichever can be read on a colour (by luminance, ITU-R BT.709)."""
    red, green, blue, _ = colour
    return INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else "white"


def panels(width: float, heights: Sequence[float], columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `width` inches with a row of axes for each of `heights`, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights)), dpi=DPI, layout="constrained")
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=list(heights)).ravel().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(TRIAL)
        axis.tick_params(labelsize=NORMAL, color=TRIAL, labelcolor=INK)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color=GRID, linewidth=0.6)
    return figure, axes


def layers_width(count: int) -> float:
    """Inches that a figure with `count` layers side by side takes."""
    return min(max(8.0, 1.6 + 0.22 * count), 15.5)


def name_columns(axis: Axes, names: Sequence[str]) -> None:
    """Writes the names of layers or tensors below the columns 0, 1, ..., every other one where there are too many."""
    step = math.ceil(len(names) / MOST_LABELS)
    shown = range(0, len(names), step)
    labels = short_names(names)
    rotation = 0 if len(names) * max(map(len, labels)) < 70 else 90
    axis.set_xticks(
        list(shown), [labels[i] for i in shown], rotation=rotation, fontsize=SMALL, color=INK, parse_math=False
    )
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.tick_params(axis="x", length=0)


def short_names(names: Sequence[str], longest: int = 30) -> list[str]:
    """Cuts the leading parts that all names share, and the middle of those still longer than `longest` letters."""
    prefix = os.path.commonprefix(list(names)) if len(names) > 1 else ""
    start = prefix.rfind(".") + 1
    cut = [name[start:] for name in names]
    half = (longest - 1) // 2
    return [name if len(name) <= longest else f"{name[:half]}…{name[-half:]}" for name in cut]


def legend(figure: Figure, entries: Mapping[str, Any], columns: int = 8) -> None:
    """Draws a legend above all axes; nothing where there are no entries."""
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside upper left",
            ncols=min(len(entries), columns),
            fontsize=NORMAL,
            frameon=False,
            labelcolor=INK,
            handlelength=1.6,
            columnspacing=1.4,
        )


def swatches(found: Mapping[str, str]) -> dict[str, Any]:
    """Legend entries of names and their colours."""
    from matplotlib.patches import Patch

    return {name or "not known": Patch(color=colour) for name, colour in found.items()}


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
