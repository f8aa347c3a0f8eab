"""The front once more, to be explored with the pointer."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from search.figures import style
from search.figures.front import FrontInfo, Point
from search.units import COST_NAMES, interval, log_ticks, quantity

if TYPE_CHECKING:
    import plotly.graph_objects as go


def plot_front(info: FrontInfo) -> go.Figure:
    """Draws the front with plotly, to be explored with the pointer."""
    import plotly.graph_objects as go

    def trace(name: str, points: Sequence[Point], marker: dict[str, Any], **more: Any) -> go.Scatter:
        usual = {
            "x": [p.cost for p in points],
            "y": [p.quality for p in points],
            "mode": "markers",
            "error_y": error_bars(points),
            "hovertext": [hover_text(p, info) for p in points],
            "hoverinfo": "text",
        }
        return go.Scatter(name=name, marker=marker, **usual | more)

    low, high = info.view
    figure = go.Figure()
    if info.infeasible:
        figure.add_scatter(
            name="over budget, not measured",
            x=info.infeasible,
            y=[low + 0.02 * (high - low)] * len(info.infeasible),
            mode="markers",
            marker={"symbol": "x-thin", "size": 7, "line": {"color": style.INFEASIBLE, "width": 1}},
            hovertemplate=f"over budget: %{{x:.4g}} {info.unit.symbol}<extra></extra>",
        )
    if info.tried:
        figure.add_trace(
            trace("other trials (selection split)", info.tried, {"color": style.TRIAL, "size": 6, "opacity": 0.45})
        )
    line = {"shape": "hv", "color": style.FRONT, "width": 1.5}
    figure.add_trace(trace("front", info.members, {"color": style.FRONT, "size": 8}, mode="lines+markers", line=line))
    figure.add_trace(
        trace(
            "float and uniform",
            info.baselines,
            {"color": style.BASELINE, "size": 13, "symbol": "star"},
            mode="markers+text",
            y=[info.height(p) for p in info.baselines],
            error_y=error_bars(
                [p if info.height(p) == p.quality else p._replace(low=math.nan) for p in info.baselines]
            ),
            text=[html.escape(info.label(p)).replace("\n", "<br>") for p in info.baselines],
            textposition="middle right",
            textfont={"size": 11},
            cliponaxis=False,
        )
    )
    figure.add_trace(
        trace(
            "winner",
            [info.winner],
            {"color": style.WINNER, "size": 12, "symbol": "diamond", "line": {"color": "white", "width": 1}},
        )
    )
    dashes = {"mode": "lines", "line": {"color": style.INK, "width": 1.2, "dash": "dash"}, "hoverinfo": "skip"}
    if info.cost_limit is not None:
        figure.add_scatter(name="budget", x=[info.cost_limit] * 2, y=[low, high], **dashes)
    if info.quality_limit is not None:
        figure.add_scatter(name="budget", x=[min(info.costs), max(info.costs)], y=[info.quality_limit] * 2, **dashes)
    across, up = info.labels
    grid = {"gridcolor": style.GRID, "zeroline": False, "showline": True, "linecolor": style.TRIAL, "ticks": "outside"}
    figure.update_layout(
        template="none",
        xaxis=grid | {"title": html.escape(across), "showgrid": False},
        yaxis=grid | {"title": html.escape(up), "range": info.view},
        font={"family": "system-ui, sans-serif", "size": 13, "color": style.INK},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 70, "r": 20, "t": 50, "b": 55},
        height=520,
        paper_bgcolor="white",
        plot_bgcolor="white",
        hoverlabel={"align": "left"},
    )
    if info.is_log:
        ticks = log_ticks(min(info.costs), max(info.costs))
        figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def error_bars(points: Sequence[Point]) -> dict[str, Any]:
    """Plotly's error bars for the intervals of points, of no length where there is no interval."""

    def lengths(length: Callable[[Point], float]) -> list[float]:
        return [length(p) if math.isfinite(p.low) else 0.0 for p in points]

    return {
        "array": lengths(lambda p: p.high - p.quality),
        "arrayminus": lengths(lambda p: p.quality - p.low),
        "thickness": 1.2,
        "width": 3,
    }


def hover_text(point: Point, info: FrontInfo) -> str:
    """What a point says when the pointer is on it."""
    lines = [
        f"<b>{html.escape(point.name)}</b> {html.escape(point.digest)}",
        f"{html.escape(info.metric)} {interval(point.quality, point.low, point.high)}",
        f"{point.bits:.2f} bits per weight on average",
        f"{quantity('weight_bytes', point.weight_bytes, 4)} stored",
    ]
    if info.cost not in ("weight_bytes", "average_weight_bits"):
        lines.append(f"{COST_NAMES[info.cost]} {quantity(info.cost, point.cost * info.unit.size, 4)}")
    return "<br>".join(lines)
