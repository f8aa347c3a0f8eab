"""Regret and hypervolume against evaluations and seconds: medians over seeds with quartiles, a row for each family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from goals import BITS, DROPS, FRONT, Goal
from summary import at
from trajectories import GRID

from search.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAMILIES: dict[str, dict[str, str]] = {
    "solver and agents": {
        "auto (20)": style.WINNER,
        "auto (40)": "#f0a050",
        "auto (40), front": "#994455",
        "auto (100), front": "#cc99bb",
        "rl (100)": style.FRONT,
        "rl (100), no demonstrations": "#66b2e0",
        "haq (600)": style.BASELINE,
    },
    "Optuna": {
        "tpe": "#882255",
        "gp": "#d55e00",
        "cmaes": "#0072b2",
        "qmc": "#8c8c8c",
        "nsga2": "#117733",
        "nsga2, front": "#66b97c",
        "nsga3": "#997700",
        "nsga3, front": "#ddbb55",
    },
    "classics": {
        "evolution": "#0072b2",
        "greedy": "#aa4499",
        "uniform": "#333333",
        "random": "#8c8c8c",
    },
    "single predictors": {
        "forward interactions": "#0072b2",
        "backward interactions": "#66b2e0",
        "superposition": "#d55e00",
        "additive KL": "#009e73",
        "Fisher diagonal": "#997700",
    },
}
"""Contenders row by row, and their colours."""

LINEAR = {"regret": 0.1, "missing": 0.01}
"""Below which scales are linear."""

TOP = {"regret": 6.0, "missing": 1.0}
ROW = 1.75  # inches that a row of panels is high


def draw_all(table: pd.DataFrame, path: Path) -> None:
    """Draws all figures beside the table's `path`."""
    for goals, across, value, ending in (
        (BITS, "evaluations", "regret", ""),
        (BITS, "seconds", "regret", "_seconds"),
        (DROPS, "evaluations", "regret", "_drops"),
        ((*BITS, FRONT), "evaluations", "missing", "_hypervolume"),
    ):
        known = [goal for goal in goals if goal.name in set(table["goal"])]
        if known:
            draw(table, known, across, value, path.with_name(f"{path.stem}{ending}.png"))


def draw(table: pd.DataFrame, goals: Sequence[Goal], across: str, value: str, path: Path) -> None:
    """Draws one panel for every family and goal: its members in colour before all others in grey.

    Args:
        table: The study's table.
        goals: One column each.
        across: What is on the horizontal axis: `evaluations`, or `seconds`, medians at the same evaluations.
        value: What is on the vertical one: `regret`, or `missing`, the share of hypervolume that is not reached.
        path: Where to write.
    """
    table = table.assign(missing=1 - table["hypervolume"])
    found = {goal: lines(table, goal, across, value) for goal in goals}
    families = {
        family: members
        for family, members in FAMILIES.items()
        if any(name in found[goal] for goal in goals for name in members)
    }
    width = 2.35 * len(goals) + 2.1
    figure, axes = style.panels(width, [ROW] * len(families), columns=len(goals), room=0.3)
    for row, (family, members) in enumerate(families.items()):
        for column, goal in enumerate(goals):
            axis = axes[row * len(goals) + column]
            for name, line in found[goal].items():
                if name not in members:
                    axis.plot(line[across], line["median"], color="#d8d8d8", linewidth=0.8, zorder=1)
            for name, colour in members.items():
                if name in found[goal]:
                    highlight(axis, found[goal][name], across, colour)
            scale(axis, across, value)
            axis.tick_params(labelbottom=row == len(families) - 1, labelleft=column == 0)
            if row == 0:
                axis.set_title(_title(goal), fontsize=style.NORMAL, color=style.INK)
        axes[row * len(goals)].set_ylabel(_label(value, goals[0]), fontsize=style.SMALL, color=style.INK)
        handles = style.swatches({name: colour for name, colour in members.items() if _is_anywhere(name, found)})
        axes[(row + 1) * len(goals) - 1].legend(
            list(handles.values()),
            list(handles),
            title=family,
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            fontsize=style.SMALL,
            title_fontsize=style.NORMAL,
            alignment="left",
            frameon=False,
            labelcolor=style.INK,
            handlelength=1.0,
            handleheight=0.5,
        )
    figure.supxlabel(
        across if across == "evaluations" else "seconds: evaluating, proposing, scoring",
        fontsize=style.NORMAL,
        color=style.INK,
    )
    path.write_bytes(style.png(figure))


def lines(table: pd.DataFrame, goal: Goal, across: str, value: str) -> dict[str, pd.DataFrame]:
    """Median and quartiles of every strategy over seeds along its evaluations, to the median of its ends."""
    mine = table[table["goal"] == goal.name]
    found = {}
    for name, rows in mine.groupby("strategy", sort=False):
        end = float(rows.groupby("seed")["evaluations"].max().median())
        counts = [*(count for count in GRID if count < end), end]
        values = at(rows, counts, value)
        line = values.quantile([0.25, 0.5, 0.75]).T.set_axis(["low", "median", "high"], axis=1)
        line["evaluations"] = counts
        line["seconds"] = at(rows, counts, "seconds").median().to_numpy()
        found[str(name)] = line
    return found


def highlight(axis: Axes, line: pd.DataFrame, across: str, colour: str) -> None:
    """Draws a contender: its median, its quartiles as a band, a dot where it ends."""
    look: dict[str, Any] = {"color": colour, "linewidth": 1.5, "zorder": 3, "solid_capstyle": "round"}
    axis.plot(line[across], line["median"], **look)
    axis.fill_between(line[across], line["low"], line["high"], color=colour, alpha=0.13, linewidth=0, zorder=2)
    last = line.iloc[-1]
    axis.plot([last[across]], [last["median"]], "o", color=colour, markersize=3.2, zorder=4, clip_on=False)


def scale(axis: Axes, across: str, value: str) -> None:
    """Sets the scales: logarithmic, near 0 linear."""
    axis.set_xscale("log")
    if across == "evaluations":
        axis.set_xlim(1, GRID[-1])
        axis.set_xticks([1, 10, 100, 600], ["1", "10", "100", "600"])
    else:
        axis.set_xticks([10, 100, 1000], ["10", "100", "1,000"])
    axis.minorticks_off()
    smallest, top = LINEAR[value], TOP[value]
    axis.set_yscale("symlog", linthresh=smallest, linscale=0.7)
    axis.set_ylim(0, top)
    ticks = [tick for tick in (0, 0.01, 0.1, 1) if tick == 0 or smallest <= tick <= top]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _title(goal: Goal) -> str:
    if goal.bits is not None:
        return f"at most {goal.bits:g} bits"
    return "no budget" if goal.drop is None else f"drop at most {goal.name}"


def _label(value: str, goal: Goal) -> str:
    if value == "missing":
        return "hypervolume missing"
    return "regret (points)" if goal.drop is None else "regret (bits)"


def _is_anywhere(name: str, found: dict[Goal, dict[str, pd.DataFrame]]) -> bool:
    return any(name in lines for lines in found.values())
