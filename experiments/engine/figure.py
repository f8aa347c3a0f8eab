"""Draws what the engine costs against what it is allowed to: `python experiments/engine/figure.py` makes engine.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt

HERE = Path(__file__).parent


def ratios() -> list[tuple[str, float, float, bool]]:
    """Name, measured ratio, aim, and whether the aim is a floor."""
    forward = pd.read_csv(HERE / "forward.csv")
    reused = forward[forward["reuse_memory"]].set_index("policy")["ratio"]
    found = [(f"forward pass, {policy} (float passes)", ratio, 1.10, False) for policy, ratio in reused.items()]
    calibration = pd.read_csv(HERE / "calibration.csv").set_index("method")["float_passes"]
    found += [(f"calibration, {method} (float passes)", calibration[method], 3.0, False) for method in ("mse", "kl")]
    sweep = pd.read_csv(HERE / "sweep.csv")
    found.append(("single-choice sweep (forwards it stands for)", float(sweep["ratio"].iloc[-1]), 0.55, False))
    racing = pd.read_csv(HERE / "racing.csv").groupby(["task", "stream"], sort=False)["saving"].mean()
    found += [(f"racing, {task}, {stream} (saving)", saving, 3.0, True) for (task, stream), saving in racing.items()]
    return found


def main() -> None:
    """Draws every ratio relative to its aim, on a logarithmic axis."""
    rows = ratios()
    figure, axis = plt.subplots(figsize=(8.5, 0.42 * len(rows) + 1.2), layout="constrained")
    for place, (_, ratio, aim, is_floor) in enumerate(reversed(rows)):
        share = aim / ratio if is_floor else ratio / aim
        axis.barh(place, share - 1, left=1, color="#2a9d8f" if share <= 1 else "#e76f51", height=0.6)
        side = -6 if share < 1 else 6
        axis.annotate(
            f"{ratio:.2f}, aim {aim:.2f}",
            (share, place),
            (side, 0),
            textcoords="offset points",
            ha="right" if share < 1 else "left",
            va="center",
            fontsize=8,
        )
    axis.axvline(1, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)], fontsize=8)
    axis.set(xlabel="cost relative to the aim (left of 1: within it)", xlim=(0.2, 1.8))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "engine.png", dpi=140)


if __name__ == "__main__":
    main()
