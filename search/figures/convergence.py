"""Convergence: how good the best policy and the whole front were after how many evaluations and seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from search.figures import style
from search.figures.front import front_costs
from search.trials import Trial, spending
from search.units import COST_NAMES, axis_label, unit_for

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ConvergenceInfo:
    """One entry per evaluation spent, in order.

    Attributes:
        evaluations: Evaluations spent when it ended; a measurement on part of the split counts as that part.
        seconds: Seconds of measuring and proposing spent when it ended.
        values: What was optimised: quality on the selection split, or the primary cost where the budget limits the drop
            of quality; NaN where the trial does not count: failed, on part of the split, or over the allowed drop.
        best: The best value so far; NaN before there is one.
        label: What the values are.
        reference: The float network's quality; None where values are costs.
        hypervolume: Share of the box between the float network and nothing that the front so far covers; empty where
            the run does not say.
        costs: The costs that the front is about, in words.
    """

    evaluations: tuple[float, ...]
    seconds: tuple[float, ...]
    values: tuple[float, ...]
    best: tuple[float, ...]
    label: str
    reference: float | None
    hypervolume: tuple[float, ...]
    costs: tuple[str, ...]

    @property
    def sides(self) -> tuple[tuple[tuple[float, ...], str], ...]:
        """What may be across, and what it is called."""
        return (self.evaluations, "evaluations"), (self.seconds, "seconds of measuring and proposing")

    @property
    def view(self) -> tuple[float, float] | None:
        """Lowest and highest value to show: all of the best so far; None where there is none."""
        if not np.isfinite(self.best).any():
            return None
        return style.near([*self.best, *([] if self.reference is None else [self.reference])], self.values)

    @property
    def volume_view(self) -> tuple[float, float]:
        """Lowest and highest hypervolume to show."""
        return style.near([volume for volume in self.hypervolume if volume > 0] or [0.0], ())


def convergence_info(
    trials: Sequence[Trial], about: Mapping[str, Any], float_quality: float, history: pd.DataFrame | None = None
) -> ConvergenceInfo:
    """Gathers how the search went.

    Args:
        trials: Every trial.
        about: What run.json says.
        float_quality: The float network's quality on the selection split.
        history: The table history.csv; None for a run of an earlier version, which has none.
    """
    steps = list(spending(trials))
    spent = [trial for trial, *_ in steps]
    allowed, cost = about["budget"].get("quality_drop"), about["primary_cost"]
    if allowed is None:
        values = [trial.quality if trial.is_whole else math.nan for trial in spent]
        keep = np.fmax if about["higher_is_better"] else np.fmin
        label, reference = f"{about['metric']} (selection split)", float_quality
    else:
        prices = [
            _price(trial, cost) if trial.is_whole and trial.certain_drop <= allowed else math.nan for trial in spent
        ]
        unit = unit_for(cost, prices)
        values = [price / unit.size for price in prices]
        keep, label, reference = np.fmin, f"{axis_label(cost, unit)}\nwithin the allowed drop", None
    known = [] if history is None else history[["trial", "hypervolume"]].dropna().to_dict("records")
    volumes = {row["trial"]: row["hypervolume"] for row in known}
    return ConvergenceInfo(
        evaluations=tuple(step.evaluations for step in steps),
        seconds=tuple(step.seconds for step in steps),
        values=tuple(values),
        best=tuple(float(value) for value in keep.accumulate(np.array(values))) if values else (),
        label=label,
        reference=reference,
        hypervolume=tuple(volumes.get(trial.number, math.nan) for trial in spent) if volumes else (),
        costs=tuple(COST_NAMES[name] for name in front_costs(about)),
    )


def _price(trial: Trial, cost: str) -> float:
    price = trial.cost[cost]
    return math.nan if price is None else price


def draw_convergence(info: ConvergenceInfo) -> Figure:
    """Draws the best so far over evaluations and over seconds, with every evaluation near it, and the hypervolume."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = style.panels(8.0, [3.0, 1.9] if info.hypervolume else [3.0], columns=2)
    entries: dict[str, Any] = {}
    for place, (across, label) in enumerate(info.sides):
        column = axes[place::2]
        entries |= _draw_best(column[0], info, across)
        if info.hypervolume:
            _draw_steps(column[1], across, info.hypervolume)
            column[0].sharex(column[1])
            column[0].tick_params(labelbottom=False)
        column[-1].set_xlim(left=0)
        column[-1].set_xlabel(label, fontsize=style.NORMAL, color=style.INK)
    for left, right in zip(axes[::2], axes[1::2], strict=True):
        right.sharey(left)
        right.tick_params(labelleft=False)
    axes[-2].xaxis.set_major_locator(MaxNLocator(integer=True))
    if info.view:
        axes[0].set_ylim(info.view)
    axes[0].set_ylabel(info.label, fontsize=style.NORMAL, color=style.INK)
    if info.hypervolume:
        axes[2].set_ylim(info.volume_view)
        axes[2].set_ylabel("hypervolume", fontsize=style.NORMAL, color=style.INK)
    style.legend(figure, entries)
    return figure


def _draw_best(axis: Axes, info: ConvergenceInfo, across: Sequence[float]) -> dict[str, Any]:
    """Draws every evaluation and the best so far; returns the entries of the legend."""
    entries: dict[str, Any] = {
        "evaluation": axis.scatter(across, info.values, s=16, c=style.TRIAL, alpha=0.55, linewidths=0),
        "best so far": _draw_steps(axis, across, info.best),
    }
    if info.reference is not None:
        entries["float"] = axis.axhline(info.reference, color=style.BASELINE, linewidth=1, linestyle="--")
    return entries


def _draw_steps(axis: Axes, across: Sequence[float], values: Sequence[float]) -> Any:
    return axis.plot(across, values, color=style.FRONT, drawstyle="steps-post", linewidth=1.6)[0]
