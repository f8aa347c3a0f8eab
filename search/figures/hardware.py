"""Networks on devices: layers under the roofs of a device, and what the time of every layer is made of."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from hwmodels import Device
from hwmodels.quantity import rate_at
from search.figures import style
from search.units import log_ticks, quantity, significant, unit_for

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOAT = "float"  # what the policy of the float network is called
OTHER = "other"
ROUNDING = 1e-9  # share of a latency that is left when its parts are taken away
PART_COLOURS = {
    "compute": "#332288",
    "memory": "#ddcc77",
    "overhead": "#88ccee",
    "conversion": "#cc6677",
    OTHER: style.REST,
}
POLICY_COLOURS = (style.FRONT, style.WINNER, style.BASELINE, *style.SPARE_COLOURS)
FLOAT_COLOUR = style.TRIAL

KIND_MARKERS = {"conv": "o", "pointwise": "s", "depthwise": "^", "linear": "D", "attention": "P", "embedding": "v"}
OTHER_MARKER = "X"
LARGEST, SMALLEST = 110.0, 14.0  # areas of the first policy's points and of the last's
RATES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


@dataclass(frozen=True)
class RooflineInfo:
    """Layers under the roofs of a device.

    Attributes:
        title: Names the device.
        peaks: Compute type to operations per second.
        bandwidths: Memory level that layers move through to bytes per second.
        policies: Names of all policies, so that colours are the same on every device; some may have no points.
        policy: Policy of every point, as its place in `policies`.
        kinds: Kind of every point's layer.
        intensity: Operations per byte of every point.
        attained: Operations per second of every point.
    """

    title: str
    peaks: Mapping[str, float]
    bandwidths: Mapping[str, float]
    policies: tuple[str, ...]
    policy: np.ndarray
    kinds: tuple[str, ...]
    intensity: np.ndarray
    attained: np.ndarray


def roofline_info(device: Device, threads: int, totals: pd.DataFrame, layers: pd.DataFrame) -> RooflineInfo:
    """Gathers the points of one target; layers that multiply nothing have none.

    Args:
        device: The target.
        threads: How many of its threads work.
        totals: Its rows of the table comparison.csv.
        layers: Its rows of the table layers.csv.
    """
    drawn = (layers["intensity"] > 0) & (layers["attained"] > 0)
    policies = tuple(totals["policy"])
    used = set(layers["level"])
    peaks = {name: device.peak(name, threads) for name in dict.fromkeys(layers["compute"]) if name in device.compute}
    return RooflineInfo(
        title=f"{device.id}: {device.name}{f', {threads} threads' if device.threads else ''}",
        peaks={name: peak for name, peak in peaks.items() if math.isfinite(peak)},
        bandwidths={one.name: rate_at(one.bandwidth, threads) for one in device.memory if one.name in used},
        policies=policies,
        policy=layers.loc[drawn, "policy"].map(policies.index).to_numpy(),
        kinds=tuple(layers.loc[drawn, "kind"]),
        intensity=layers.loc[drawn, "intensity"].to_numpy(float),
        attained=layers.loc[drawn, "attained"].to_numpy(float),
    )


def draw_roofline(info: RooflineInfo) -> Figure:
    """Draws a point per layer and policy under the raw roofs; what several policies share lies as ring in ring."""
    from matplotlib.lines import Line2D

    figure, (axis,) = style.panels(8.0, [4.6], room=0.5)
    axis.set(xscale="log", yscale="log")
    low, high = _intensities(info)
    _draw_roofs(axis, info, low, high)
    colours = dict(zip((name for name in info.policies if name != FLOAT), cycle(POLICY_COLOURS)))
    colours = {name: colours.get(name, FLOAT_COLOUR) for name in info.policies}
    kinds, areas = np.array(info.kinds), np.geomspace(LARGEST, SMALLEST, max(len(info.policies), 2))
    for index, policy in enumerate(info.policies):
        for kind in dict.fromkeys(info.kinds):
            chosen = (info.policy == index) & (kinds == kind)
            axis.scatter(
                info.intensity[chosen],
                info.attained[chosen],
                s=areas[index],
                marker=KIND_MARKERS.get(kind, OTHER_MARKER),
                color=colours[policy],
                edgecolor="white",
                linewidth=0.3,
                zorder=3,
                label=f"{policy}: {kind}",
            )
    axis.set_xlim(low, high)
    axis.set_xlabel("operations per byte moved", fontsize=style.NORMAL, color=style.INK)
    axis.set_ylabel("operations per second", fontsize=style.NORMAL, color=style.INK)
    axis.set_yticks(ticks := log_ticks(*axis.get_ylim()), [_rate(tick).strip() for tick in ticks])
    axis.set_xticks(ticks := log_ticks(low, high), [significant(tick, 1) for tick in ticks])
    axis.minorticks_off()
    axis.set_title(info.title, loc="left", fontsize=style.NORMAL, color=style.INK, parse_math=False)
    entries = style.swatches(
        {name: colour for index, (name, colour) in enumerate(colours.items()) if index in info.policy}
    )
    for kind in dict.fromkeys(info.kinds):
        marker = KIND_MARKERS.get(kind, OTHER_MARKER)
        entries[kind] = Line2D([], [], color=style.INK, marker=marker, linestyle="", markersize=5)
    style.legend(figure, entries)
    return figure


def _intensities(info: RooflineInfo) -> tuple[float, float]:
    """The range of intensities that shows all points, and where every roof bends."""
    ridges = [peak / bandwidth for peak in info.peaks.values() for bandwidth in info.bandwidths.values()]
    shown = [*info.intensity.tolist(), *(ridge for ridge in ridges if math.isfinite(ridge))] or [1.0]
    return min(shown) / 2, max(shown) * 3


def _draw_roofs(axis: Axes, info: RooflineInfo, low: float, high: float) -> None:
    """Draws the slope of every memory level up to the highest peak, and the flat of every compute type from there."""
    from matplotlib.patheffects import withStroke

    bandwidths = {name: rate for name, rate in info.bandwidths.items() if math.isfinite(rate)}
    highest, widest = max(info.peaks.values(), default=math.nan), max(bandwidths.values(), default=math.nan)
    line: dict[str, Any] = {"color": style.INK, "linewidth": 1.0, "zorder": 2}
    halo = [withStroke(linewidth=2, foreground="white")]
    note: dict[str, Any] = {"fontsize": style.SMALL, "color": style.INK, "path_effects": halo}
    for name, bandwidth in bandwidths.items():
        ends = np.array([low, min(high, highest / bandwidth)])
        axis.plot(ends, bandwidth * ends, **line)
        axis.annotate(
            f"{name} {_rate(bandwidth)}B/s",
            (at := ends[0] * (ends[1] / ends[0]) ** 0.6, bandwidth * at),
            xytext=(-5, 2),
            textcoords="offset points",
            ha="right",
            **note,
        )
    above = math.inf
    for name, peak in sorted(info.peaks.items(), key=lambda item: -item[1]):
        axis.plot([max(low, peak / widest), high], [peak, peak], **line)
        is_close = above / peak < 1.3  # then the label goes below the line
        axis.annotate(
            f"{name} {_rate(peak)}op/s",
            (high, peak),
            xytext=(-2, -3 if is_close else 2),
            textcoords="offset points",
            ha="right",
            va="top" if is_close else "bottom",
            **note,
        )
        above = peak


def _rate(value: float) -> str:
    """A rate with the prefix that fits, such as `1.35 T`."""
    size, prefix = next(((size, prefix) for size, prefix in RATES if value >= size), RATES[-1])
    return f"{value / size:.3g} {prefix}"


@dataclass(frozen=True)
class LayerTimesInfo:
    """What the time of every layer is made of, for each policy on one target.

    Attributes:
        hardware: Name of the target.
        layers: Names of the layers, in execution order.
        seconds: Policy to seconds, shape `(parts, layers + 1)`, parts in the order of `PART_COLOURS`; last what is no
            layer.
        latency: Policy to its latency with its interval, in words.
        refused: Policy to why there are no times of it.
    """

    hardware: str
    layers: tuple[str, ...]
    seconds: Mapping[str, np.ndarray]
    latency: Mapping[str, str]
    refused: Mapping[str, str]


def layer_times_info(totals: pd.DataFrame, layers: pd.DataFrame) -> LayerTimesInfo:
    """Gathers the times from the tables comparison.csv and layers.csv, the rows of one target each."""
    parts = [f"{part}_s" for part in PART_COLOURS]
    names = tuple(dict.fromkeys(layers["layer"]))
    seconds, latency, refused = {}, {}, {}
    for row in totals.to_dict("records"):
        policy = row["policy"]
        if row["refusal"] or math.isnan(row["latency_s"]):
            refused[policy] = row["refusal"] or "its latency is not known"
            continue
        mine = layers[layers["policy"] == policy].set_index("layer")[parts].reindex(names).to_numpy(float).T
        rest = np.zeros((len(parts), 1))
        left = row["latency_s"] - np.nansum(mine)
        rest[-1] = left if left > ROUNDING * row["latency_s"] else 0.0
        seconds[policy] = np.hstack([mine, rest])
        latency[policy] = spread(row["latency_s"], row["latency_low_s"], row["latency_high_s"], row["latency_tier"])
    return LayerTimesInfo(totals["hardware"].iloc[0], names, seconds, latency, refused)


def spread(value: float, low: float, high: float, tier: str) -> str:
    """A time with its interval in the same unit, such as `58 µs [24, 140]`, or alone where it has none.

    Args:
        value: Seconds.
        low: Lower end of the interval, NaN where there is none.
        high: Upper end.
        tier: What was not timed on the device, or between timings, is given to two digits and no more.
    """
    digits = 3 if tier in ("exact", "measured", "interpolated") else 2
    value, low, high = (float(f"{seconds:.{digits - 1}e}") for seconds in (value, low, high))
    if not (math.isfinite(low) and math.isfinite(high)) or low == high:
        return quantity("latency_s", value, digits)
    unit = unit_for("latency_s", [value])
    ends = ", ".join(significant(end / unit.size, digits) for end in (low, high))
    return f"{quantity('latency_s', value, digits)} [{ends}]"


def draw_layer_times(info: LayerTimesInfo) -> Figure:
    """Draws a panel per policy, on one scale: a bar per layer, stacked from the parts of its time.

    What is no layer may take longer than all of them: its bar is then cut off, and its length written beside it.
    """
    columns = [*info.layers, OTHER]
    width = style.layers_width(len(columns))
    notes = [textwrap.fill(f"{policy}: {why}", round(16 * width)) for policy, why in info.refused.items()]
    room = 0.5 + style.names_room(info.layers) + 0.14 * sum(note.count("\n") + 1 for note in notes)
    figure, axes = style.panels(width, [1.5] * len(info.seconds), room=room)
    highest = max(float(np.nansum(seconds[:, :-1], axis=0).max()) for seconds in info.seconds.values())
    most = max(float(seconds[:, -1].sum()) for seconds in info.seconds.values())
    limit = 1.12 * min(max(highest, most), 2 * highest)
    unit = unit_for("latency_s", [limit])
    seen = np.zeros(len(PART_COLOURS), bool)
    for axis, (policy, seconds) in zip(axes, info.seconds.items(), strict=True):
        bottom = np.zeros(len(columns))
        for index, (part, colour) in enumerate(PART_COLOURS.items()):
            height = np.nan_to_num(seconds[index]) / unit.size
            axis.bar(range(len(columns)), height, 0.8, bottom=bottom, color=colour, label=part)
            bottom += height
            seen[index] |= bool(height.any())
        axis.set_ylim(0, limit / unit.size)
        if bottom[-1] > limit / unit.size:
            axis.annotate(
                f"{significant(bottom[-1], 2)} ",
                (len(columns) - 1.4, limit / unit.size),
                ha="right",
                va="top",
                fontsize=style.SMALL,
                color=style.INK,
            )
        axis.set_ylabel(unit.symbol, fontsize=style.NORMAL, color=style.INK)
        title = f"{policy}: {info.latency[policy]}"
        axis.set_title(title, loc="left", fontsize=style.NORMAL, color=style.INK, parse_math=False)
        style.name_columns(axis, info.layers, [OTHER])
        if axis is not axes[-1]:
            axis.tick_params(axis="x", labelbottom=False)
    if notes:
        axes[-1].set_xlabel("\n".join(notes), loc="left", fontsize=style.SMALL, color=style.INK, parse_math=False)
    colours = {part: colour for (part, colour), shown in zip(PART_COLOURS.items(), seen, strict=True) if shown}
    style.legend(figure, style.swatches(colours))
    return figure
