"""Draws the study's figures from its tables: `python experiments/interactions/figure.py`.

correlations.png: how far every predictor's ranking is from the true one. plans_NETWORK.png: what its plans lose.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from predictors import ADDITIVE, MEAN_BITS, PREDICTORS

from search.figures import style

HERE = Path(__file__).parent
NETWORKS = {
    "digits": "digits, ResNet-8",
    "resnet20": "Fashion-MNIST, ResNet-20",
    "resnet20_noised": "ResNet-20, a fifth of the\ncalibration images noised",
    "mobilenetv2": "Fashion-MNIST, MobileNetV2",
    "text": "text, Llama",
}
TRUTHS = {"divergence": "true divergence", "drop": "true drop of the metric"}
SUBSETS = {
    "all": (style.TRIAL, "o"),
    "better half": (style.FRONT, "s"),
    "slices": (style.WINNER, "D"),
}
SOURCES = {
    "auto": style.WINNER,
    "superposition": style.FRONT,
    "forward_scaled": style.SPARE_COLOURS[1],
    "backward_scaled": style.SPARE_COLOURS[4],
    "kl": style.BASELINE,
    "fisher_diagonal": style.SPARE_COLOURS[2],
    "hessian_trace": style.SPARE_COLOURS[3],
    "sqnr_db": style.TRIAL,
}
TOOLS = ("v", "^", "<", ">", "P", "X", "*", "d")
CLOSEST = 1e-3  # 1 - correlation at which the axis ends


def draw_correlations(table: pd.DataFrame, path: Path) -> None:
    """Draws 1 - Spearman's correlation, a row of panels per network, the truths side by side."""
    networks = [name for name in NETWORKS if name in set(table["network"])]
    predictors = (MEAN_BITS, *PREDICTORS)
    figure, axes = style.panels(10.0, [0.19 * len(predictors) + 0.5] * len(networks), columns=2, room=0.5)
    entries = {}
    panels = ((network, truth) for network in networks for truth in TRUTHS)
    for axis, (network, truth) in zip(axes, panels, strict=True):
        rows = table[(table["network"] == network) & (table["truth"] == truth)]
        grid = rows.pivot_table("spearman", "subset", "predictor")
        for subset, (colour, marker) in SUBSETS.items():
            errors = (1 - grid.loc[subset, list(predictors)]).clip(lower=CLOSEST)
            entries[subset] = axis.scatter(errors, range(len(predictors)), c=colour, marker=marker, s=18, zorder=3)
        axis.axhline(len(ADDITIVE) + 0.5, color=style.GRID, linewidth=1)  # above it, predictors that know interactions
        axis.set_xscale("log")
        axis.set_xlim(2, CLOSEST)
        axis.set_yticks(range(len(predictors)), [name.replace("_", " ") for name in predictors], fontsize=style.SMALL)
        axis.grid(axis="x", color=style.GRID, linewidth=0.6)
        label = f"1 - Spearman's correlation with {TRUTHS[truth]} (right is better)"
        axis.set_xlabel(label, fontsize=style.SMALL, color=style.INK)
        axis.set_title(NETWORKS[network], fontsize=style.NORMAL, color=style.INK)
    style.legend(figure, entries)
    path.write_bytes(style.png(figure))


def draw_plans(table: pd.DataFrame, path: Path) -> None:
    """Draws the drop of every source's plans over the budgets, a panel per number of evaluations and repair."""
    ours = table[table["source"].isin(list(SOURCES))]
    tools = table[~table["source"].isin([*SOURCES, *PREDICTORS])]
    markers = dict(zip(dict.fromkeys(tools["source"]), TOOLS, strict=False))
    repairs, counts = list(dict.fromkeys(ours["repair"])), sorted(set(ours["evaluations"].dropna()))
    figure, axes = style.panels(3.6 * len(counts), [3.0] * len(repairs), columns=len(counts), room=0.7)
    entries: dict[str, Any] = {}
    for axis, (repair, count) in zip(axes, ((r, c) for r in repairs for c in counts), strict=True):
        rows = ours[(ours["repair"] == repair) & (ours["evaluations"] == count)]
        for source in [name for name in SOURCES if name in set(ours["source"])]:
            part = rows[rows["source"] == source].sort_values("budget")
            width, order = (2.2, 3) if source == "auto" else (1.2, 2)
            look: dict[str, Any] = {
                "color": SOURCES[source],
                "linewidth": width,
                "zorder": order,
                "marker": "o",
                "markersize": 3,
            }
            (entries[source],) = axis.plot(part["budget"], part["drop"], **look)
        for source, marker in markers.items():
            part = tools[(tools["source"] == source) & (tools["repair"] == repair)]
            entries[source] = axis.scatter(part["budget"], part["drop"], c=style.INK, marker=marker, s=16, zorder=4)
        axis.axhline(0, color=style.INK, linewidth=0.8)
        axis.set_yscale("symlog", linthresh=0.003)
        axis.set_title(f"{count:g} evaluations, repair {repair}", fontsize=style.NORMAL, color=style.INK)
        axis.set_xlabel("average weight bits", fontsize=style.NORMAL, color=style.INK)
    low, high = table["drop"].min(), table["drop"].max()
    for axis in axes:
        axis.set_ylim(low - 0.001, 1.3 * high)
    axes[0].set_ylabel("drop of the metric (report split)", fontsize=style.NORMAL, color=style.INK)
    style.legend(figure, entries, columns=6)
    path.write_bytes(style.png(figure))


def main() -> None:
    if (HERE / "correlations.csv").is_file():
        draw_correlations(pd.read_csv(HERE / "correlations.csv"), HERE / "correlations.png")
    for path in sorted(HERE.glob("plans_*.csv")):
        draw_plans(pd.read_csv(path), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
