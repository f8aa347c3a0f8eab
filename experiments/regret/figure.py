"""Regret over evaluations: `python experiments/regret/figure.py regret_resnet20_none.csv` draws its figure anew."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from search.figures import style

HERE = Path(__file__).parent
AIM = 0.1  # points, by 20 evaluations
COLOURS = {
    "auto": style.WINNER,
    "superposition": style.FRONT,
    "forward interactions, scaled": style.SPARE_COLOURS[1],
    "backward interactions, scaled": style.SPARE_COLOURS[4],
    "additive ILP (KL)": style.BASELINE,
    "Fisher diagonal": style.SPARE_COLOURS[2],
    "TPE": style.SPARE_COLOURS[0],
    "random": style.TRIAL,
}


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Mean regret by strategy, budget and evaluations, with the 95% interval of the mean over seeds."""
    from scipy.stats import t

    found = table.groupby(["strategy", "budget", "evaluations"], sort=False)["regret"].agg(["mean", "sem", "count"])
    half = found["sem"].fillna(0.0) * t.ppf(0.975, (found["count"] - 1).clip(lower=1))
    return found.assign(low=(found["mean"] - half).clip(lower=0), high=found["mean"] + half).reset_index()


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draws one panel per budget."""
    found = means(table)
    budgets = list(dict.fromkeys(found["budget"]))
    figure, axes = style.panels(3.1 * len(budgets), [3.2], columns=len(budgets), room=0.5)
    entries: dict[str, Any] = {}
    for axis, budget in zip(axes, budgets, strict=True):
        axis.axhspan(0, AIM, color=style.GRID, linewidth=0)
        for name, colour in COLOURS.items():
            rows = found[(found["strategy"] == name) & (found["budget"] == budget)]
            width, order = (2.2, 3) if name == "auto" else (1.3, 2)
            look: dict[str, Any] = {
                "color": colour,
                "linewidth": width,
                "zorder": order,
                "marker": "o",
                "markersize": 3.5,
            }
            (entries[name],) = axis.plot(rows["evaluations"], rows["mean"], **look)
            axis.fill_between(rows["evaluations"], rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
        axis.set_yscale("symlog", linthresh=AIM)
        axis.sharey(axes[0])
        axis.set_ylim(bottom=0)
        axis.set_xticks(sorted(set(found["evaluations"])))
        axis.set_title(f"{budget:g} average weight bits", fontsize=style.NORMAL, color=style.INK)
        axis.set_xlabel("evaluations", fontsize=style.NORMAL, color=style.INK)
    axes[0].set_ylabel("regret (points of accuracy)", fontsize=style.NORMAL, color=style.INK)
    style.legend(figure, entries, columns=4)
    path.write_bytes(style.png(figure))


def summary(table: pd.DataFrame) -> str:
    """The README's table: mean regret with its interval at every budget and number of evaluations."""
    found = means(table)
    evaluations = sorted(set(found["evaluations"]))
    lines = ["| average bits | strategy |" + "".join(f" {count} |" for count in evaluations)]
    lines.append("|---" * (2 + len(evaluations)) + "|")
    for (budget, name), rows in found.groupby(["budget", "strategy"], sort=False):
        cells = [_cell(*row) for row in rows[["mean", "low", "high", "count"]].itertuples(index=False)]
        lines.append(f"| {budget:g} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(mean: float, low: float, high: float, count: int) -> str:
    return f"{mean:.2f}" if count == 1 or low == high else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        draw(pd.read_csv(HERE / name), (HERE / name).with_suffix(".png"))
