"""Draws what backends delivered beside what plans promised, and prints the README's table.

python -m experiments.fidelity.figure
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
    for colour, (name, rows) in zip(COLOURS, table.groupby("backend", sort=False), strict=False):
        scale = np.where(rows["task"] == "text", 100 / rows["simulated"], 100.0)
        quality.scatter(rows["task"], scale * rows["worse_by"], color=colour, label=name, alpha=0.8)
        size.scatter(rows["planned_bytes"], rows["bytes_on_disk"], color=colour, alpha=0.8)
        if str(name).startswith("onnxruntime"):
            speed.scatter(rows["predicted_ratio"], rows["latency_ratio"], color=colour, alpha=0.8, label=name)
    for end in (-0.1, 0.1):
        quality.axhline(end, color="black", linewidth=0.6, linestyle=":")
    quality.set_ylabel("worse than simulated (points; text: % of perplexity)")
    quality.legend(fontsize=7)
    ends = [table["planned_bytes"].min(), table["planned_bytes"].max()]
    size.plot(ends, ends, color="black", linewidth=0.6)
    size.set(xscale="log", yscale="log", xlabel="bytes planned", ylabel="bytes on disk")
    top = 1.1 * float(table[["predicted_ratio", "latency_ratio"]].max().max())
    speed.plot([0, top], [0, top], color="black", linewidth=0.6)
    speed.set(xlabel="latency over float, predicted", ylabel="latency over float, measured")
    if speed.collections:
        speed.legend(fontsize=7)
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    here = Path(__file__).parent
    measured = pd.read_csv(here / "fidelity.csv")
    draw(measured, here / "fidelity.png")
    print(summary(measured))
