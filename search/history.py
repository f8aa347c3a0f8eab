"""The history of a search: how good the best policy and the whole front were after each measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from search.front import front_costs, price
from search.objective import Objective
from search.pareto import hypervolume
from search.trials import Trial, spending

if TYPE_CHECKING:
    import pandas as pd


def history_table(objective: Objective, trials: Sequence[Trial], costs: Sequence[str] = ()) -> pd.DataFrame:
    """Builds history.csv: one row for every trial that spent evaluations.

    Its columns are `trial`, the number; `evaluations` and `seconds` spent by its end; `best_loss`, the least loss so
    far within the budget: a drop of quality, or the primary cost in SI units where the budget limits the drop, NaN
    before there is one; `hypervolume`, how much the front so far covers; and `primary_hypervolume`, how much a front
    about the primary cost alone would cover, the same where it is. It compares searches whose fronts are about
    different costs.

    A hypervolume is the share of a box that is dominated by the policies measured so far in full, whether they keep a
    limit on the drop or not (policies over a limit on costs are never measured). The box spans the drop on the
    selection split and the costs. Its best corner is no drop at no cost. Its worst is a drop as large as the float
    network's quality, which of accuracies leaves 0, at the float network's cost in each cost, or at twice the 8-bit
    network's where that is more: on devices where fewer bits save little time, or none, nothing would be left to
    compare. A drop below 0 counts as 0. So the share lies in [0, 1] and can be compared between all runs of one task,
    hardware and workload, for the same costs, whatever their budgets and spaces. It is NaN where the float network's
    quality is 0.

    Args:
        objective: Knows the float network's quality and costs, the budget and the primary cost.
        trials: Everything tried.
        costs: The costs that the front is about beside quality; none stands for the primary cost.

    Raises:
        ConfigError: If a cost is not known.
    """
    import pandas as pd

    spent = list(spending(trials))
    measured = [trial for trial, *_ in spent]
    losses = np.array([_loss(objective, trial) for trial in measured], dtype=np.float64)
    return pd.DataFrame(
        {
            "trial": [trial.number for trial in measured],
            "evaluations": [evaluations for _, evaluations, _ in spent],
            "seconds": [seconds for *_, seconds in spent],
            "best_loss": np.fmin.accumulate(losses),
            "hypervolume": _hypervolumes(objective, measured, front_costs(objective, costs)),
            "primary_hypervolume": _hypervolumes(objective, measured, [objective.primary_cost]),
        }
    )


def _hypervolumes(objective: Objective, trials: Sequence[Trial], costs: Sequence[str]) -> np.ndarray:
    """The share of the box of `history_table` that the first 1, 2, ... trials dominate, shape `(trials,)`."""
    float_, int8 = map(objective.pricing.reference, ("float", "int8"))
    corner = np.array([abs(objective.float_quality), *(max(float_[cost], 2 * int8[cost]) for cost in costs)])
    if not (corner > 0).all():
        return np.full(len(trials), math.nan)
    points = [[_drop(trial), *(price(trial, cost) for cost in costs)] for trial in trials]
    return growing_volumes(np.array(points).reshape(len(trials), len(corner)) / corner)


def growing_volumes(losses: np.ndarray) -> np.ndarray:
    """The share of the unit box that the first 1, 2, 3, ... points dominate.

    Each point adds what it alone dominates: its own box, less the hypervolume of the front so far cut to that box
    (While et al., "A Fast Way of Calculating Exact Hypervolumes", IEEE TEC 2012).

    Args:
        losses: Shape `(points, objectives)`; what is below 0 counts as 0, and a point with a loss of 1 or more covers
            nothing.

    Returns:
        Rising shares, shape `(points,)`.
    """
    losses = np.maximum(losses, 0.0)
    objectives = losses.shape[1]
    corner, minimise = [1.0] * objectives, [False] * objectives
    front, covered, volumes = np.empty((0, objectives)), 0.0, np.zeros(len(losses))
    for number, point in enumerate(losses):
        if (point < 1).all() and not (front <= point).all(axis=1).any():
            own = float(np.prod(1 - point)) - hypervolume(np.maximum(front, point), corner, minimise)
            covered += max(own, 0.0)  # rounding may leave less than nothing
            front = np.vstack([front[(front < point).any(axis=1)], point])
        volumes[number] = covered
    return volumes


def _drop(trial: Trial) -> float:
    """The drop of a trial that may be on the front; infinite for others."""
    return trial.drop if trial.is_whole else math.inf


def _loss(objective: Objective, trial: Trial) -> float:
    """The loss of a trial that may win: measured in full, and within the budget; NaN for others."""
    allowed = math.inf if objective.quality_drop is None else objective.quality_drop
    return objective.loss(trial) if trial.is_whole and trial.certain_drop <= allowed else math.nan
