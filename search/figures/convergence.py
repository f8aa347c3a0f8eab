"""Convergence: how good the best policy was after how many evaluations and seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from search.figures import style
from search.trials import Trial
from search.units import axis_label, unit_for

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ConvergenceInfo:
    """One entry per evaluation spent, in order.

    Attributes:
        evaluations: Evaluations spent when it ended; a measurement on part of the split counts as that part.
        seconds: Seconds of measuring spent when it ended.
        values: What was optimised: quality on the selection split, or the primary cost where the budget limits the drop
            of quality; NaN where the trial does not count: failed, on part of the split, or over the allowed drop.
        best: The best value so far; NaN before there is one.
        label: What the values are.
        reference: The float network's quality; None where values are costs.
    """

    evaluations: tuple[float, ...]
    seconds: tuple[float, ...]
    values: tuple[float, ...]
    best: tuple[float, ...]
    label: str
    reference: float | None


def convergence_info(trials: Sequence[Trial], about: Mapping[str, Any], float_quality: float) -> ConvergenceInfo:
    """Gathers how the search went.

    Args:
        trials: Every trial.
        about: What run.json says.
        float_quality: The float network's quality on the selection split.
    """
    spent = [trial for trial in trials if trial.state != "infeasible"]
    allowed, cost = about["budget"].get("quality_drop"), about["primary_cost"]
    if allowed is None:
        values = [trial.quality if _counts(trial) else math.nan for trial in spent]
        keep = np.fmax if about["higher_is_better"] else np.fmin
        label, reference = f"{about['metric']} (selection split)", float_quality
    else:
        prices = [
            _price(trial, cost) if _counts(trial) and trial.certain_drop <= allowed else math.nan for trial in spent
        ]
        unit = unit_for(cost, prices)
        values = [price / unit.size for price in prices]
        keep, label, reference = np.fmin, f"{axis_label(cost, unit)}\nwithin the allowed drop", None
    return ConvergenceInfo(
        evaluations=tuple(accumulate(trial.fidelity for trial in spent)),
        seconds=tuple(accumulate(trial.seconds for trial in spent)),
        values=tuple(values),
        best=tuple(float(value) for value in keep.accumulate(np.array(values))) if values else (),
        label=label,
        reference=reference,
    )


def _counts(trial: Trial) -> bool:
    return trial.state == "complete" and trial.fidelity == 1.0


def _price(trial: Trial, cost: str) -> float:
    price = trial.cost[cost]
    return math.nan if price is None else price


def draw_convergence(info: ConvergenceInfo) -> Figure:
    """Draws the best so far over evaluations and over seconds, with every evaluation near it."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = style.panels(8.0, [3.0], columns=2)
    axes[1].sharey(axes[0])
    axes[1].tick_params(labelleft=False)
    entries: dict[str, Any] = {}
    sides = ((info.evaluations, "evaluations"), (info.seconds, "seconds of measuring"))
    for axis, (across, label) in zip(axes, sides, strict=True):
        entries["evaluation"] = axis.scatter(across, info.values, s=16, c=style.TRIAL, alpha=0.55, linewidths=0)
        entries["best so far"] = axis.plot(across, info.best, color=style.FRONT, drawstyle="steps-post", linewidth=1.6)[
            0
        ]
        if info.reference is not None:
            entries["float"] = axis.axhline(info.reference, color=style.BASELINE, linewidth=1, linestyle="--")
        axis.set_xlabel(label, fontsize=style.NORMAL, color=style.INK)
        axis.set_xlim(left=0)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if np.isfinite(info.best).any():
        axes[0].set_ylim(style.near([*info.best, *([] if info.reference is None else [info.reference])], info.values))
    axes[0].set_ylabel(info.label, fontsize=style.NORMAL, color=style.INK)
    style.legend(figure, entries)
    return figure
