"""The front: cost against quality, with everything that was tried behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from search.figures import style
from search.trials import Trial
from search.units import Unit, axis_label, log_ticks, unit_for

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Point(NamedTuple):
    """A policy in the plane of cost and quality.

    Attributes:
        name: What to call it.
        digest: The policy's digest.
        cost: The primary cost, in the figure's unit.
        quality: Quality on the report split; for trials off the front on the selection split.
        low: Lower end of the quality's 95% interval; NaN where there is none.
        high: Upper end likewise.
        bits: Average weight bits.
        weight_bytes: Stored size.
    """

    name: str
    digest: str
    cost: float
    quality: float
    low: float
    high: float
    bits: float
    weight_bytes: float


@dataclass(frozen=True)
class FrontInfo:
    """What the figure of the front shows.

    Attributes:
        cost: Name of the primary cost.
        unit: Unit of every cost here.
        metric: Name of the quality.
        higher_is_better: Whether more of it is better.
        members: The front by rising cost, the winner among them.
        winner: The winner.
        baselines: The float network and the uniform policies.
        tried: Other complete trials.
        infeasible: Costs of trials over budget, which were not measured.
        cost_limit: Budget of the primary cost; None without one.
        quality_limit: Quality that the budget asks for; None where it does not.
        view: Lowest and highest quality that are shown.
    """

    cost: str
    unit: Unit
    metric: str
    higher_is_better: bool
    members: tuple[Point, ...]
    winner: Point
    baselines: tuple[Point, ...]
    tried: tuple[Point, ...]
    infeasible: tuple[float, ...]
    cost_limit: float | None
    quality_limit: float | None
    view: tuple[float, float]

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

    @property
    def labels(self) -> tuple[str, str]:
        """What the axes say."""
        better = "" if self.higher_is_better else ", lower is better"
        return axis_label(self.cost, self.unit), f"{self.metric}{better}"


def front_info(front: pd.DataFrame, trials: Sequence[Trial], about: Mapping[str, Any]) -> FrontInfo:
    """Gathers the figure of the front.

    Args:
        front: The table front.csv.
        trials: Every trial.
        about: What run.json says.
    """
    cost, limits = about["primary_cost"], about["limits"]
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
            weight_bytes=row["weight_bytes"],
        )

    members = sorted((member(row) for row in rows if row["role"] in ("front", "winner")), key=lambda point: point.cost)
    baselines = tuple(member(row) for row in rows if row["role"] in ("float", "uniform"))
    winner = next(member(row) for row in rows if row["role"] == "winner")
    shown = {point.digest for point in members}
    complete = [t for t in trials if t.state == "complete" and t.fidelity == 1.0 and t.digest not in shown]
    tried = tuple(
        Point(
            name=f"trial {trial.number}",
            digest=trial.digest,
            cost=price / unit.size,
            quality=trial.quality,
            low=math.nan,
            high=math.nan,
            bits=trial.cost["average_weight_bits"] or math.nan,
            weight_bytes=trial.cost["weight_bytes"] or math.nan,
        )
        for trial in complete
        if (price := trial.cost[cost]) is not None
    )
    over = [trial.cost[cost] for trial in trials if trial.state == "infeasible"]
    drop = about["budget"].get("quality_drop")
    return FrontInfo(
        cost=cost,
        unit=unit,
        metric=about["metric"],
        higher_is_better=about["higher_is_better"],
        members=tuple(members),
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


def draw_front(info: FrontInfo) -> Figure:
    """Draws the front with matplotlib."""
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure, (axis,) = style.panels(8.0, [4.4])
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
        [p.cost for p in info.members],
        [p.quality for p in info.members],
        color=style.FRONT,
        drawstyle="steps-post",
        marker="o",
        markersize=4.5,
        linewidth=1.5,
    )[0]
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
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.SMALL,
            color=style.INK,
            path_effects=halo,
            zorder=5,
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
    axis.set_xlabel(info.labels[0], fontsize=style.NORMAL, color=style.INK)
    axis.set_ylabel(info.labels[1], fontsize=style.NORMAL, color=style.INK)
    style.legend(figure, entries, columns=6)
    return figure
