"""Numbers of the study: errors per path, and how well ratios between precisions are told."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd

from experiments.cost_models.gemm.predict import MODELS, Predictions
from hwmodels.calibrate import Errors

TIE = 1.05
"""Ratio of two times up to which neither precision counts as the faster one."""


def path_errors(found: Predictions) -> pd.DataFrame:
    """A row per format and model: mean and median of |predicted / measured - 1|, and the share within 20%."""
    rows = []
    for name, mine in found.rows.groupby("gemm_dtype", sort=False):
        for model in MODELS:
            errors = Errors.of(mine[model].to_numpy(), mine["seconds"].to_numpy())
            rows.append(
                {
                    "table": found.table.name,
                    "format": name,
                    "model": model,
                    "timings": len(mine),
                    "mape": errors.mape,
                    "median": errors.median,
                    "within_20": errors.within_20,
                }
            )
    return pd.DataFrame(rows)


def pair_errors(found: Predictions) -> pd.DataFrame:
    """A row per pair of formats and model, over the shapes both were timed at.

    `sign` is how often the faster of both is told, among shapes where they differ by more than 5%; `ratio_median` and
    `ratio_mape` are of |predicted ratio / measured ratio - 1|.
    """
    rows = []
    shape = ["m", "n", "k"]
    for first, second in combinations(found.table.formats, 2):
        left, right = (found.rows[found.rows["gemm_dtype"] == name] for name in (first, second))
        both = left.merge(right, on=shape, suffixes=("_1", "_2"))
        measured = np.log((both["seconds_2"] / both["seconds_1"]).to_numpy())
        differ = np.abs(measured) > np.log(TIE)
        for model in MODELS if len(both) else ():
            predicted = np.log((both[f"{model}_2"] / both[f"{model}_1"]).to_numpy())
            off = np.abs(np.expm1(predicted - measured))
            told = np.sign(predicted[differ]) == np.sign(measured[differ])
            rows.append(
                {
                    "table": found.table.name,
                    "first": first,
                    "second": second,
                    "model": model,
                    "shapes": len(both),
                    "differ": int(differ.sum()),
                    "sign": float(told.mean()) if differ.any() else np.nan,
                    "ratio_median": float(np.median(off)),
                    "ratio_mape": float(off.mean()),
                }
            )
    return pd.DataFrame(rows)


def parameters(found: Predictions) -> pd.DataFrame:
    """A row per format: the fit to all timings."""
    return pd.DataFrame(
        {
            "table": found.table.name,
            "format": name,
            "peaks": found.table.peaks.name,
            "overhead_s": fit.overhead,
            "compute": fit.compute,
            "memory": fit.memory,
            "sharpness": fit.sharpness,
            "step_s": fit.step,
            "splits_sums": fit.splits_sums,
            "vector_overhead_s": np.nan if fit.vector_overhead is None else fit.vector_overhead,
            "cache_bytes": found.caches[name].capacity if name in found.caches else np.nan,
            "cache_speed": found.caches[name].speed if name in found.caches else np.nan,
            "sigma": fit.sigma,
            "samples": fit.samples,
        }
        for name, fit in found.fits.items()
    )


def few_errors(found: Predictions) -> pd.DataFrame:
    """A row per format: errors of fits to 20 timings, the median over seeds, and the worst median error."""
    grouped = found.few.groupby(["table", "format"], sort=False)
    return grouped.agg(
        seeds=("seed", "count"),
        mape=("mape", "median"),
        median=("median", "median"),
        within_20=("within_20", "median"),
        worst_median=("median", "max"),
    ).reset_index()
