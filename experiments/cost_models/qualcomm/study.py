"""Leave-one-network-out predictions, and their errors: of latencies, and of ratios of precisions."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .fit import fit, regress
from .networks import ANCHORS
from .timings import PAIRS

PREDICTORS = ("roofline", "regression")
TELLING = 0.05
"""Relative difference from which on it counts which of two precisions was said to be faster."""


def join(timings: pd.DataFrame, features: pd.DataFrame, chip: str, runtime: str) -> pd.DataFrame:
    """One chip's latencies of the networks that are written down, with their features."""
    mine = timings[(timings.chip == chip) & (timings.runtime == runtime) & ~timings.model.isin(ANCHORS)]
    return mine.merge(features, on=["model", "precision"]).sort_values(["model", "precision"], ignore_index=True)


def leave_one_out(rows: pd.DataFrame) -> pd.DataFrame:
    """Predicts each network from all others: a column in seconds for each of `PREDICTORS`."""
    rows = rows.assign(**{f"{name}_s": np.nan for name in PREDICTORS})
    for model in rows.model.unique():
        out = rows.model == model
        known, asked = rows[~out], rows[out]
        asked = asked[asked.precision.isin(set(known.precision))]
        rows.loc[asked.index, "roofline_s"] = fit(known).seconds(asked)
        rows.loc[asked.index, "regression_s"] = regress(known, asked)
    return rows


def latency_errors(predicted: pd.DataFrame) -> pd.DataFrame:
    """Relative errors per precision and predictor: mean, median, and the share within 20%."""
    found = []
    for precision, rows in predicted.groupby("precision", sort=False):
        for predictor in PREDICTORS:
            errors = (rows[f"{predictor}_s"] / rows.latency_s - 1).abs()
            numbers = len(errors), errors.mean(), errors.median(), (errors <= 0.2).mean()
            found.append((precision, predictor, *numbers))
    return pd.DataFrame(found, columns=["precision", "predictor", "networks", "mape", "median", "within_20"])


def ratios(predicted: pd.DataFrame) -> pd.DataFrame:
    """Ratios of two precisions of each network, measured and predicted.

    `constant` is the median of the other networks' measured ratios: what knowing the chip and nothing of the network
    gives.
    """
    found = []
    for slow, fast in PAIRS:
        table = predicted.pivot(index="model", columns="precision")
        if not {slow, fast} <= set(predicted.precision):
            continue
        pair = {
            name: (table[column, slow] / table[column, fast]).dropna()
            for name, column in (("measured", "latency_s"), *((name, f"{name}_s") for name in PREDICTORS))
        }
        for model, measured in pair["measured"].items():
            others = pair["measured"].drop(model)
            constant = others.median() if len(others) else np.nan
            guesses = [pair[name].get(model, np.nan) for name in PREDICTORS]
            found.append((f"{slow}/{fast}", model, measured, *guesses, constant))
    return pd.DataFrame(found, columns=["ratio", "model", "measured", *PREDICTORS, "constant"])


def ratio_errors(found: pd.DataFrame) -> pd.DataFrame:
    """Errors of ratios per pair and predictor, and how often the faster precision was named.

    `sign` counts only ratios that differ from 1 by more than 5%; `order` is Spearman's rank correlation of predicted
    and measured ratios over networks: whether it is known who gains most.
    """
    rows = []
    for pair, some in found.groupby("ratio", sort=False):
        telling = (some.measured - 1).abs() > TELLING
        for predictor in (*PREDICTORS, "constant"):
            guess = some[predictor]
            errors = (guess / some.measured - 1).abs()
            right = ((guess > 1) == (some.measured > 1))[telling & guess.notna()]
            order = np.nan if predictor == "constant" or len(some) < 4 else guess.rank().corr(some.measured.rank())
            rows.append((pair, predictor, len(some), errors.mean(), errors.median(), right.mean(), order))
    return pd.DataFrame(rows, columns=["ratio", "predictor", "networks", "mape", "median", "sign", "order"])
