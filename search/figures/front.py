"""The front: each of its costs against quality, with everything that was tried behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from search.figures import style
from search.pareto import front as non_dominated
from search.trials import Trial
from search.units import Unit, axis_label, log_ticks, unit_for

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Side = Literal["right", "top", "bottom"]

COLUMNS = 2
"""Panels side by side where the front has several costs."""

NAME_WIDTH, NAME_HEIGHT = 0.17, 0.04
"""Shares of a panel that the name of a baseline takes."""

BESIDE: Mapping[Side, Mapping[str, Any]] = {
    "right": {"xytext": (7, 0), "ha": "left", "va": "center"},
    "top": {"xytext": (0, 7), "ha": "center", "va": "bottom"},
    "bottom": {"xytext": (0, -7), "ha": "center", "va": "top"},
}
"""How matplotlib writes a name on a side of its point."""

ELSEWHERE = "on the front for another cost"


class Point(NamedTuple):
    """A policy in the plane of one cost and quality.

    Attributes:
        name: What to call it.
        digest: The policy's digest.
        cost: The plane's cost, in the plane's unit.
        quality: Quality on the report split; for trials off the front on the selection split.
        low: Lower end of the quality's 95% interval; NaN where there is none.
        high: Upper end likewise.
        bits: Average weight bits.
        costs: Stored size and all costs of the front, in SI units.
    """

    name: str
    digest: str
    cost: float
    quality: float
    low: float
    high: float
    bits: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class FrontInfo:
    """What the figure of the front shows in the plane of one cost and quality.

    Attributes:
        cost: Name of the cost.
        unit: Unit of every cost here.
        metric: Name of the quality.
        higher_is_better: Whether more of it is better.
        members: The front by rising cost, the winner among them.
        steps: Those of them that no other beats in this cost and the drop; of a front of one cost, all.
        winner: The winner.
        baselines: The float network and the uniform policies.
        tried: Other complete trials.
        infeasible: Costs of trials over budget, which were not measured.
        cost_limit: Budget of the cost; None without one.
        quality_limit: Quality that the budget asks for; None where it does not.
        view: Lowest and highest quality that are shown.
    """

    cost: str
    unit: Unit
    metric: str
    higher_is_better: bool
    members: tuple[Point, ...]
    steps: tuple[Point, ...]
    winner: Point
    baselines: tuple[Point, ...]
    tried: tuple[Point, ...]
    infeasible: tuple[float, ...]
    cost_limit: float | None
    quality_limit: float | None
    view: tuple[float, float]

    @property
    def elsewhere(self) -> tuple[Point, ...]:
        """Members that are on the front for another cost."""
        return tuple(point for point in self.members if point not in self.steps)

    @property
    def costs(self) -> list[float]:
        """Every cost shown."""
        limit = [] if self.cost_limit is None else [self.cost_limit]
        return [*(p.cost for p in (*self.members, *self.baselines, *self.tried)), *self.infeasible, *limit]

    @property
    def is_log(self) -> bool:
        """Whether costs are so far apart that their axis is logarithmic."""
        return min(self.costs) > 0 and max(self.costs) / min(self.costs) > 4

    @property
    def hidden(self) -> int:
        """How many trials lie outside the view."""
        return sum(not self.view[0] <= point.quality <= self.view[1] for point in (*self.members, *self.tried))

    def height(self, point: Point) -> float:
        """Where a point is drawn: at its quality, or at the edge of the view where that lies beyond."""
        return min(max(point.quality, self.view[0]), self.view[1])

    def label(self, point: Point) -> str:
        """The name of a point, with its quality where it is not drawn there."""
        return point.name if self.height(point) == point.quality else f"{point.name}\n({point.quality:.3g})"

    def name_side(self, point: Point) -> Side:
        """Where the name of a baseline is written: to its right, unless it would run into the next baseline there."""
        scale = math.log if self.is_log else float
        low, high = self.view
        width = scale(max(self.costs)) - scale(min(self.costs))
        is_free = not any(
            0 < scale(other.cost) - scale(point.cost) < NAME_WIDTH * width
            and abs(self.height(other) - self.height(point)) < NAME_HEIGHT * (high - low)
            for other in self.baselines
        )
        if is_free:
            return "right"
        higher = any(other.cost < point.cost and self.height(other) > self.height(point) for other in self.baselines)
        return "bottom" if higher else "top"

    @property
    def labels(self) -> tuple[str, str]:
        """What the axes say."""
        better = "" if self.higher_is_better else ", lower is better"
        return axis_label(self.cost, self.unit), f"{self.metric}{better}"


def front_costs(about: Mapping[str, Any]) -> list[str]:
    """The costs that a run's front is about, as run.json says, or said when there was but one."""
    return list(about.get("front_costs") or [about["primary_cost"]])


def front_infos(front: pd.DataFrame, trials: Sequence[Trial], about: Mapping[str, Any]) -> list[FrontInfo]:
    """Gathers the figure of the front, one plane for each of its costs; arguments are those of `front_info`."""
    return [front_info(front, trials, about, cost) for cost in front_costs(about)]


def front_info(front: pd.DataFrame, trials: Sequence[Trial], about: Mapping[str, Any], cost: str) -> FrontInfo:
    """Gathers one plane of the figure of the front.

    Args:
        front: The table front.csv.
        trials: Every trial.
        about: What run.json says.
        cost: The cost of the plane.
    """
    limits, costs = about["limits"], list(dict.fromkeys(["weight_bytes", *front_costs(about)]))
    unit = unit_for(cost, [*front[cost], *limits.values()] if cost in limits else front[cost])
    sign = 1 if about["higher_is_better"] else -1
    rows = front.to_dict("records")
    float_quality = next(row["quality"] for row in rows if row["role"] == "float")

    def member(row: Mapping[Any, Any]) -> Point:
        low, high = sorted(float_quality - sign * row[end] for end in ("drop_low", "drop_high"))
        return Point(
            name=row["name"].removeprefix("uniform "),
            digest=row["digest"],
            cost=row[cost] / unit.size,
            quality=row["quality"],
            low=low if math.isfinite(low) and row["role"] != "float" else math.nan,
            high=high if math.isfinite(high) and row["role"] != "float" else math.nan,
            bits=row["average_weight_bits"],
            costs={name: row[name] for name in costs},
        )

    on_front = sorted((row for row in rows if row["role"] in ("front", "winner")), key=lambda row: row[cost])
    members = [member(row) for row in on_front]
    is_step = np.ones(len(members), dtype=bool)
    if len(front_costs(about)) > 1:
        points = np.array([[row[cost], row["selection_quality"]] for row in on_front])
        is_step = non_dominated(points, (False, about["higher_is_better"]))
    baselines = tuple(member(row) for row in rows if row["role"] in ("float", "uniform"))
    winner = next(member(row) for row in rows if row["role"] == "winner")
    shown = {point.digest for point in members}
    tried = tuple(
        Point(
            name=f"trial {trial.number}",
            digest=trial.digest,
            cost=price / unit.size,
            quality=trial.quality,
            low=math.nan,
            high=math.nan,
            bits=trial.cost["average_weight_bits"] or math.nan,
            costs={name: trial.cost[name] or math.nan for name in costs},
        )
        for trial in trials
        if trial.is_whole and trial.digest not in shown and (price := trial.cost[cost]) is not None
    )
    over = [trial.cost[cost] for trial in trials if trial.state == "infeasible"]
    drop = about["budget"].get("quality_drop")
    return FrontInfo(
        cost=cost,
        unit=unit,
        metric=about["metric"],
        higher_is_better=about["higher_is_better"],
        members=tuple(members),
        steps=tuple(point for point, is_kept in zip(members, is_step, strict=True) if is_kept),
        winner=winner,
        baselines=baselines,
        tried=tried,
        infeasible=tuple(price / unit.size for price in over if price is not None),
        cost_limit=limits[cost] / unit.size if cost in limits else None,
        quality_limit=None if drop is None else float_quality - sign * drop,
        view=style.near(
            (winner.low, winner.high, winner.quality, float_quality),
            (point.quality for point in (*members, *baselines, *tried)),
        ),
    )


def draw_front(infos: Sequence[FrontInfo]) -> Figure:
    """Draws the front with matplotlib, one panel for each of its costs."""
    if len(infos) == 1:
        figure, axes = style.panels(8.0, [4.4])
    else:
        figure, axes = style.panels(11.5, [4.2] * math.ceil(len(infos) / COLUMNS), columns=COLUMNS)
    entries: dict[str, Any] = {}
    for place, (axis, info) in enumerate(zip(axes, infos, strict=False)):
        entries |= _draw_plane(axis, info)
        axis.set_xlabel(info.labels[0], fontsize=style.NORMAL, color=style.INK)
        if place % COLUMNS == 0:
            axis.set_ylabel(info.labels[1], fontsize=style.NORMAL, color=style.INK)
        else:
            axis.tick_params(labelleft=False)
    for axis in axes[len(infos) :]:
        axis.remove()
    style.legend(figure, entries, columns=7)
    return figure


def _draw_plane(axis: Axes, info: FrontInfo) -> dict[str, Any]:
    """Draws one panel; returns its entries of the legend."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    entries: dict[str, Any] = {}
    bottom = axis.get_xaxis_transform()  # costs across, share of the height up
    if info.infeasible:
        entries["over budget, not measured"] = axis.scatter(
            info.infeasible,
            [0.02] * len(info.infeasible),
            s=18,
            c=style.INFEASIBLE,
            marker="x",
            linewidths=0.8,
            transform=bottom,
        )
    if info.tried:
        costs, qualities = zip(*((p.cost, p.quality) for p in info.tried), strict=True)
        entries["other trials (selection split)"] = axis.scatter(
            costs, qualities, s=16, c=style.TRIAL, alpha=0.45, linewidths=0
        )
    entries["front"] = axis.plot(
        [p.cost for p in info.steps],
        [p.quality for p in info.steps],
        color=style.FRONT,
        drawstyle="steps-post",
        marker="o",
        markersize=4.5,
        linewidth=1.5,
        zorder=2.4,
    )[0]
    if info.elsewhere:
        entries[ELSEWHERE] = axis.scatter(
            [p.cost for p in info.elsewhere],
            [p.quality for p in info.elsewhere],
            s=20,
            facecolors="white",
            edgecolors=style.FRONT,
            linewidths=1.0,
            zorder=2.5,
        )
    for points, colour in (
        (info.members, style.FRONT),
        (info.baselines, style.BASELINE),
        ((info.winner,), style.WINNER),
    ):
        for p in points:
            axis.vlines(p.cost, p.low, p.high, colors=colour, linewidth=0.9, alpha=0.6)
    entries["float and uniform"] = axis.scatter(
        [p.cost for p in info.baselines],
        [info.height(p) for p in info.baselines],
        s=85,
        c=style.BASELINE,
        marker="*",
        linewidths=0,
        zorder=3,
        clip_on=False,
    )
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for p in info.baselines:
        axis.annotate(
            info.label(p),
            (p.cost, info.height(p)),
            textcoords="offset points",
            **BESIDE[info.name_side(p)],
            fontsize=style.SMALL,
            color=style.INK,
            path_effects=halo,
            zorder=2.3,  # over other trials, under the front
        )
    entries["winner"] = axis.scatter(
        [info.winner.cost],
        [info.winner.quality],
        s=60,
        c=style.WINNER,
        marker="D",
        edgecolors="white",
        linewidths=0.8,
        zorder=4,
    )
    if info.cost_limit is not None:
        entries["budget"] = axis.axvline(info.cost_limit, color=style.INK, linewidth=1, linestyle="--")
    if info.quality_limit is not None:
        entries["budget"] = axis.axhline(info.quality_limit, color=style.INK, linewidth=1, linestyle="--")
    if info.is_log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(log_ticks(min(info.costs), max(info.costs))))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.margins(x=0.08)
    axis.set_ylim(info.view)
    return entries
