"""How figures look: one colour per role, one map for bits, bare axes, and room for the names of many layers.

Colours are of the Okabe-Ito and Paul Tol palettes, which people with colour vision deficiencies can tell apart.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colour = tuple[float, float, float, float]
"""Red, green, blue and opacity, in [0, 1]."""

DPI = 200
PIXELS_PER_INCH = 105  # where figures are shown on a page
INK = "#333333"
GRID = "#e4e4e4"
REST = "#c4c4c4"

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

DARK = {
    "#ffffff": "#14171c",
    INK: "#e6e8eb",
    GRID: "#2b313a",
    REST: "#6b7480",
    INFEASIBLE: "#6e7681",
    WINNER: "#f07f2e",
    FRONT: "#4aa3df",
    "#332288": "#8f83e6",
    "#117733": "#3fae68",
    "#aa4499": "#cf74c2",
    "#4477aa": "#6f9fd0",
    "#aa3377": "#d267a3",
    "#228833": "#4cb35c",
    "#882255": "#c7608f",
    "#994455": "#c9727f",
    "#004488": "#4f8fd6",
}
"""What colours become on dark paper, which is the first, so that they stand out from it; others stay as they are."""

ON_LIGHT, ON_DARK = "#222222", "#fefefe"
"""Ink on a coloured cell, which is the same on any paper."""

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
    return ON_LIGHT if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else ON_DARK


def panels(width: float, heights: Sequence[float], columns: int = 1, room: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Returns a figure with a row of axes for each of `heights`.

    Args:
        width: Inches across.
        heights: Inches that the rows share, in these proportions.
        columns: Axes in a row.
        room: Further inches, for what stands outside the axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights) + room), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(len(heights), columns, squeeze=False, height_ratios=list(heights)).ravel().tolist()
    for axis in axes:
        axis.set_facecolor("none")  # whatever paper the figure is on
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(TRIAL)
        axis.tick_params(labelsize=NORMAL, color=TRIAL, labelcolor=INK)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color=GRID, linewidth=0.6)
    return figure, axes


def near(focus: Iterable[float], others: Iterable[float]) -> tuple[float, float]:
    """A range that shows all of `focus`, and of the others those near it, so that outliers do not squash the rest."""
    ends = [value for value in focus if math.isfinite(value)]
    low, high = min(ends), max(ends)
    reach = 3 * (high - low) or 0.01 * abs(high) or 0.01
    inside = [value for value in others if low - reach <= value <= high + reach]
    low, high = min([low, *inside]), max([high, *inside])
    margin = 0.08 * (high - low) or reach
    return low - margin, high + margin


def layers_width(count: int) -> float:
    """Inches that a figure with `count` layers side by side takes."""
    return min(max(8.0, 1.6 + 0.22 * count), 15.5)


def name_columns(axis: Axes, names: Sequence[str], last: Sequence[str] = ()) -> None:
    """Writes the names of layers or tensors below the columns 0, 1, ..., every other one where there are too many.

    Args:
        axis: Where to write.
        names: Names, which are shortened.
        last: What to write, in full, below the columns after those.
    """
    labels = [*short_names(names), *last]
    shown = range(0, len(labels), math.ceil(len(labels) / MOST_LABELS))
    rotation = 90 if _are_upright(labels) else 0
    texts = [labels[index] for index in shown]
    axis.set_xticks(list(shown), texts, rotation=rotation, fontsize=SMALL, color=INK, parse_math=False)
    axis.set_xlim(-0.6, len(labels) - 0.4)
    axis.tick_params(axis="x", length=0)


def names_room(names: Sequence[str]) -> float:
    """Inches that the names of columns take below the axes."""
    labels = short_names(names)
    return 0.15 + (0.058 * max(map(len, labels)) if _are_upright(labels) else 0.1)


def _are_upright(labels: Sequence[str]) -> bool:
    return len(labels) * max(map(len, labels)) >= 70


def short_names(names: Sequence[str], longest: int = 30) -> list[str]:
    """Cuts the leading parts that all names share, and the middle of those still longer than `longest` letters."""
    parts = [name.split(".") for name in names]
    columns = zip(*(part[:-1] for part in parts), strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    cut = [".".join(part[shared:]) for part in parts]
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
            columnspacing=1.0,
        )


def swatches(found: Mapping[str, str | Colour]) -> dict[str, Any]:
    """Legend entries of names and their colours."""
    from matplotlib.patches import Patch

    return {name or "not known": Patch(color=colour) for name, colour in found.items()}


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file, the same for the same figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    _lay_out(figure)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element to stand in a page, the same for the same figure.

    Its text is text, and its colours are custom properties of the page (`--c-332288`) where `DARK` names them, so that
    they follow the page's scheme.

    Args:
        figure: The figure.
        name: What its identifiers begin with, so that those of several figures on a page differ.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    _lay_out(figure)
    paper = figure.get_facecolor()
    figure.set_facecolor("none")
    canvas: Any = FigureCanvasSVG(figure)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "svg.image_inline": True}):
        canvas.print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    figure.set_facecolor(paper)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>| font-family: [^;]*;", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub("|".join(DARK), lambda found: f"var(--c-{found[0][1:]}, {found[0]})", text)


def _lay_out(figure: Figure) -> None:
    """Settles where everything stands, once: `savefig` would find it anew, and draw all of it twice, for every file."""
    from matplotlib.layout_engine import PlaceHolderLayoutEngine

    engine = figure.get_layout_engine()
    if engine is not None and not isinstance(engine, PlaceHolderLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
