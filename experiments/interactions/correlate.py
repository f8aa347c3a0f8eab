"""How well predictions rank policies: Spearman's and Kendall's correlation with the truth.

    python experiments/interactions/correlate.py

Writes correlations.csv from all policies_*.csv and prints the README's table.
Over all policies, over the better half (by true divergence), and within slices of equal average bits. Intervals of
Spearman's are 95% of 1,000 resamples of the policies.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from policies import SLICES
from predictors import MEAN_BITS, PREDICTORS
from scipy.stats import kendalltau, rankdata, spearmanr

from search.files import write_text

HERE = Path(__file__).parent
TRUTHS = ("divergence", "drop")
SHOWN = ("all", "better half", "slices")
RESAMPLES = 1000


def subsets(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yields the sets of policies that are looked at, by name."""
    yield "all", rows
    yield "better half", rows[rows["true_divergence"] <= rows["true_divergence"].median()]
    for bits in SLICES:
        yield f"slice {bits:g}", rows[(rows["group"] == "slice") & (rows["wanted_bits"] == bits)]


def correlations(rows: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """One row per subset, truth and predictor; `slices` is the mean over all slices."""
    rng = np.random.default_rng(seed)
    found: list[dict[str, Any]] = []
    for name, part in subsets(rows):
        draws = rng.integers(len(part), size=(RESAMPLES, len(part)))
        for truth in TRUTHS:
            for predictor in (*PREDICTORS, MEAN_BITS):
                x, y = part[predictor].to_numpy(), part[f"true_{truth}"].to_numpy()
                low, high = np.nanpercentile(_spearman(x[draws], y[draws]), [2.5, 97.5])
                found.append(
                    {
                        "subset": name,
                        "policies": len(part),
                        "truth": truth,
                        "predictor": predictor,
                        "spearman": spearmanr(x, y).statistic,
                        "low": low,
                        "high": high,
                        "kendall": kendalltau(x, y).statistic,
                    }
                )
    table = pd.DataFrame(found)
    slices = table[table["subset"].str.startswith("slice")]
    kept = {"policies": "sum", "spearman": "mean", "kendall": "mean"}
    pooled = slices.groupby(["truth", "predictor"], sort=False).agg(kept).reset_index()
    pooled["subset"] = "slices"
    return pd.concat([table, pooled])


def _spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation of every row, NaN where one side is all alike."""
    ranks = [rankdata(values, axis=1) for values in (x, y)]
    a, b = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        found: np.ndarray = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return found


def main() -> None:
    tables = []
    for path in sorted(HERE.glob("policies_*.csv")):
        network = path.stem.removeprefix("policies_")
        tables.append(correlations(pd.read_csv(path)).assign(network=network))
    table = pd.concat(tables)
    table = table[["network", *(name for name in table if name != "network")]]
    write_text(HERE / "correlations.csv", table.to_csv(index=False, float_format="%.4f", lineterminator="\n"))
    for name, rows in table.groupby("network", sort=False):
        print(f"\n{name}\n\n{markdown(rows)}")


def markdown(rows: pd.DataFrame) -> str:
    """Spearman's correlations of one network: a row per predictor, a column per subset and truth."""
    grid = rows.pivot_table("spearman", "predictor", ["truth", "subset"], sort=False)
    grid = grid[[(truth, subset) for truth in TRUTHS for subset in SHOWN]]
    best = grid.max().to_numpy()
    lines = ["| predictor | " + " | ".join(map(", ".join, grid.columns)) + " |"]
    lines.append("|---" * (len(grid.columns) + 1) + "|")
    for predictor, values in zip(grid.index, grid.to_numpy(), strict=True):
        cells = [f"**{v:.3f}**" if v == b else f"{v:.3f}" for v, b in zip(values, best, strict=True)]
        lines.append(f"| {predictor} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
