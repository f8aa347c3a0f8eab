"""Draws what backends delivered beside what plans promised, and prints the README's table.

python -m experiments.fidelity.figure
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def summary(table: pd.DataFrame) -> str:
    """One line a backend and task in Markdown, the worst of its three plans."""
    lines = [
        "| backend | task | worse than simulated | agreement | header, KiB | plan's latency over float | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, task), rows in table.groupby(["backend", "task"], sort=True):
        worst = rows["worse_by"].loc[rows["worse_by"].abs().idxmax()]
        lost = f"{100 * worst / rows['simulated'].iloc[0]:.3f}%" if task == "text" else f"{100 * worst:.2f} points"
        ratio, predicted = (
            " to ".join(dict.fromkeys(f"{value:.2f}" for value in (rows[key].min(), rows[key].max())))
            for key in ("latency_ratio", "predicted_ratio")
        )
        known = predicted if name.startswith("onnxruntime") else ""
        header = f"{rows['header_bytes'].max() / 1024:.0f}" if rows["header_bytes"].min() > 0 else "–"
        cells = (name, task, lost, f"{rows['agreement'].min():.2%}", header, ratio, known)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draws three panels, a point a plan: quality lost, bytes and latency ratio, delivered over promised."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    quality, size, speed = figure.subplots(1, 3)
    tasks = list(dict.fromkeys(table["task"]))
    names = sorted(set(table["backend"]))
    for number, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        rows = table[table["backend"] == name]
        scale = np.where(rows["task"] == "text", 100 / rows["simulated"], 100.0)
        places = rows["task"].map(tasks.index) + 0.08 * (number - len(names) / 2)
        quality.scatter(places, scale * rows["worse_by"], color=colour, label=name, s=22)
        size.scatter(rows["planned_bytes"], rows["bytes_on_disk"], color=colour, label=name, s=22)
        if name.startswith("onnxruntime"):
            speed.scatter(rows["predicted_ratio"], rows["latency_ratio"], color=colour, label=name, s=22)
    for end in (-0.1, 0.1):
        quality.axhline(end, color="black", linewidth=0.6, linestyle=":")
    quality.set_xticks(range(len(tasks)), tasks)
    quality.set_ylabel("worse than simulated (points; text: % of perplexity)")
    ends = [table["planned_bytes"].min(), table["planned_bytes"].max()]
    size.plot(ends, ends, color="black", linewidth=0.6)
    size.set(xscale="log", yscale="log", xlabel="bytes planned", ylabel="bytes on disk")
    size.legend(fontsize=7)
    speed.plot([0.25, 3], [0.25, 3], color="black", linewidth=0.6)
    speed.set(xscale="log", yscale="log", xlabel="latency over float, predicted", ylabel="latency over float, measured")
    for axis in (speed.xaxis, speed.yaxis):
        axis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 3]))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    speed.legend(fontsize=7)
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    here = Path(__file__).parent
    measured = pd.read_csv(here / "fidelity.csv")
    draw(measured, here / "fidelity.png")
    print(summary(measured))
