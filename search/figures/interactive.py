"""The front and the convergence once more, to be explored with the pointer."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from search.figures import style
from search.figures.convergence import ConvergenceInfo
from search.figures.front import COLUMNS, ELSEWHERE, FrontInfo, Point, Side
from search.units import COST_NAMES, interval, log_ticks, quantity

if TYPE_CHECKING:
    import plotly.graph_objects as go

BESIDE: Mapping[Side, str] = {"right": "middle right", "top": "top center", "bottom": "bottom center"}
"""How plotly writes a name on a side of its point."""

_AXIS = {
    "gridcolor": style.GRID,
    "zeroline": False,
    "showline": True,
    "linecolor": style.TRIAL,
    "ticks": "outside",
    "automargin": True,
    "title": {"font": {"size": 13}, "standoff": 12},
}


def plot_front(infos: Sequence[FrontInfo]) -> go.Figure:
    """Draws the front with plotly, to be explored with the pointer, one panel for each of its costs."""
    from plotly.subplots import make_subplots

    columns = min(len(infos), COLUMNS)
    rows = math.ceil(len(infos) / columns)
    figure = make_subplots(
        rows, columns, shared_yaxes=True, horizontal_spacing=0.04, vertical_spacing=0.16 if rows > 1 else None
    )
    named: set[str] = set()
    for place, info in enumerate(infos):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        for trace in _traces(info):  # one entry of the legend switches a trace in every panel
            figure.add_trace(trace.update(legendgroup=trace.name, showlegend=trace.name not in named), **at)
            named.add(trace.name)
        across, up = map(html.escape, info.labels)
        figure.update_xaxes(_AXIS | {"title_text": across, "showgrid": False}, **at)
        figure.update_yaxes(_AXIS | {"title_text": up if at["col"] == 1 else None, "range": info.view}, **at)
        if info.is_log:
            ticks = log_ticks(min(info.costs), max(info.costs))
            figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks], **at)
    return _laid_out(figure, height=520 if rows == 1 else 460 * rows)


def _laid_out(figure: go.Figure, height: int) -> go.Figure:
    """Gives a figure what all have in common."""
    return figure.update_layout(
        template="none",
        font={"family": "system-ui, sans-serif", "size": 13, "color": style.INK},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        margin={"l": 70, "r": 60, "t": 50, "b": 55},
        height=height,
        paper_bgcolor="white",
        plot_bgcolor="white",
        hoverlabel={"align": "left"},
    )


def plot_convergence(info: ConvergenceInfo) -> go.Figure:
    """Draws the best so far, and below it the hypervolume, over evaluations and over seconds with plotly."""
    from plotly.subplots import make_subplots

    rows = 2 if info.hypervolume else 1
    heights = [0.6, 0.4] if info.hypervolume else [1.0]
    figure = make_subplots(
        rows,
        2,
        shared_xaxes="columns",
        shared_yaxes=True,
        row_heights=heights,
        horizontal_spacing=0.04,
        vertical_spacing=0.07,
    )
    spent = list(zip(info.evaluations, info.seconds, strict=True))
    steps = {"mode": "lines", "line": {"shape": "hv", "color": style.FRONT, "width": 2}}
    value = html.escape(info.label).replace("\n", "<br>")
    for column, (across, label) in enumerate(info.sides, 1):
        usual = {
            "x": across,
            "customdata": spent,
            "hovertemplate": "%{y:.5g} after %{customdata[0]:g} evaluations, %{customdata[1]:.3g} s",
            "showlegend": column == 1,
        }
        at = {"row": 1, "col": column}
        dots = {"color": style.TRIAL, "size": 6, "opacity": 0.55}
        figure.add_scatter(
            name="evaluation", y=info.values, mode="markers", marker=dots, legendgroup="evaluation", **usual, **at
        )
        figure.add_scatter(name="best so far", y=info.best, legendgroup="best", **steps, **usual, **at)
        if info.reference is not None:
            ends = {"x": [0, max(across, default=1)], "y": [info.reference] * 2}
            dashes = {"mode": "lines", "line": {"color": style.BASELINE, "width": 1.5, "dash": "dash"}}
            figure.add_scatter(name="float", **ends, **dashes, legendgroup="float", showlegend=column == 1, **at)
        if info.hypervolume:
            usual["showlegend"] = False
            figure.add_scatter(name="hypervolume", y=info.hypervolume, **steps, **usual, row=2, col=column)
        figure.update_xaxes({"title_text": label}, row=rows, col=column)
    figure.update_xaxes(_AXIS | {"showgrid": False, "rangemode": "tozero"})
    figure.update_yaxes(_AXIS)
    figure.update_yaxes({"title_text": value, "range": info.view}, row=1, col=1)
    if info.hypervolume:
        figure.update_yaxes({"title_text": "hypervolume", "range": info.volume_view}, row=2, col=1)
    return _laid_out(figure, height=520 if info.hypervolume else 380)


def _traces(info: FrontInfo) -> Iterator[go.Scatter]:
    """Yields what one panel shows, from the back to the front."""
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
    if info.infeasible:
        yield go.Scatter(
            name="over budget, not measured",
            x=info.infeasible,
            y=[low + 0.02 * (high - low)] * len(info.infeasible),
            mode="markers",
            marker={"symbol": "x-thin", "size": 7, "line": {"color": style.INFEASIBLE, "width": 1}},
            hovertemplate=f"over budget: %{{x:.4g}} {info.unit.symbol}<extra></extra>",
        )
    if info.tried:
        yield trace("other trials (selection split)", info.tried, {"color": style.TRIAL, "size": 6, "opacity": 0.45})
    line = {"shape": "hv", "color": style.FRONT, "width": 1.5}
    yield trace("front", info.steps, {"color": style.FRONT, "size": 8}, mode="lines+markers", line=line)
    if info.elsewhere:
        hollow = {"color": "white", "size": 7, "line": {"color": style.FRONT, "width": 1.2}}
        yield trace(ELSEWHERE, info.elsewhere, hollow, error_y_color=style.FRONT)
    yield trace(
        "float and uniform",
        info.baselines,
        {"color": style.BASELINE, "size": 13, "symbol": "star"},
        mode="markers+text",
        y=[info.height(p) for p in info.baselines],
        error_y=error_bars([p if info.height(p) == p.quality else p._replace(low=math.nan) for p in info.baselines]),
        text=[html.escape(info.label(p)).replace("\n", "<br>") for p in info.baselines],
        textposition=[BESIDE[info.name_side(p)] for p in info.baselines],
        textfont={"size": 11},
        cliponaxis=False,
    )
    yield trace(
        "winner",
        [info.winner],
        {"color": style.WINNER, "size": 12, "symbol": "diamond", "line": {"color": "white", "width": 1}},
    )
    dashes = {"mode": "lines", "line": {"color": style.INK, "width": 1.2, "dash": "dash"}, "hoverinfo": "skip"}
    if info.cost_limit is not None:
        yield go.Scatter(name="budget", x=[info.cost_limit] * 2, y=[low, high], **dashes)
    if info.quality_limit is not None:
        yield go.Scatter(name="budget", x=[min(info.costs), max(info.costs)], y=[info.quality_limit] * 2, **dashes)


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
    ]
    shown = {name: value for name, value in point.costs.items() if name != "average_weight_bits"}
    lines += [f"{COST_NAMES[name]} {quantity(name, value, 4)}" for name, value in shown.items()]
    return "<br>".join(lines)
