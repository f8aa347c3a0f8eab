"""What a run has found after so many evaluations: regret, seconds and hypervolume along the way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from goals import Goal

from search.files import write_text

GRID = (1, 2, 3, 5, 10, 20, 40, 60, 100, 200, 400, 600)
"""Numbers of evaluations that are reported."""

ROUNDING = 1e-6
"""Shares of evaluations add up no better than this."""


@dataclass
class Run:
    """One strategy's measurements in their order, those it repeats included, as columns.

    Attributes:
        about: The contender, its settings, the goal and the seed.
        codes: The policies.
        fidelities: Share of the split that each was measured on.
        evaluations: Evaluations spent by then.
        seconds: Seconds spent by then on measuring, proposing, and scoring where scores were asked for.
    """

    about: dict[str, Any]
    codes: list[str] = field(default_factory=list)
    fidelities: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, code: str, fidelity: float, evaluations: float, seconds: float) -> None:
        """Adds one measurement."""
        self.codes.append(code)
        self.fidelities.append(fidelity)
        self.evaluations.append(round(evaluations, 6))
        self.seconds.append(round(seconds, 3))

    def save(self, path: Path) -> None:
        """Writes the run."""
        write_text(path, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        """Reads what `save` wrote."""
        return cls(**json.loads(path.read_text()))


def follow(run: Run, goal: Goal, policies: pd.DataFrame) -> pd.DataFrame:
    """Tells what a run has found after every number of evaluations in `GRID` up to its end, and at its end.

    Only measurements on the whole split count. `regret` is the loss of the best policy within the goal's limit minus
    that of the best there is, in points of quality or in bits; the plan that needs no search is known from the start.
    `hypervolume` is the share of the true front's.

    Args:
        run: The run.
        goal: What its findings are held against.
        policies: What every policy costs and is worth, by its code.

    Returns:
        Columns `evaluations`, `seconds`, `regret`, `hypervolume`.
    """
    losses = pd.Series(goal.losses(policies), policies.index)
    spent, whole = np.array(run.evaluations), np.array(run.fidelities) == 1.0
    end = round(float(spent[-1]), 3) if len(spent) else 0.0
    reachable = goal.volume(policies)
    rows = []
    for count in [*(count for count in GRID if count < end), end]:
        past = int(np.searchsorted(spent, count + ROUNDING, side="right"))
        seen = pd.unique(np.array(run.codes, dtype=object)[:past][whole[:past]])
        best = min([goal.unsearched(policies), *losses[seen]])
        seconds = run.seconds[past - 1] if past else 0.0
        rows.append((count, seconds, best - losses.min(), goal.volume(policies.loc[seen]) / reachable))
    return pd.DataFrame(rows, columns=["evaluations", "seconds", "regret", "hypervolume"])
