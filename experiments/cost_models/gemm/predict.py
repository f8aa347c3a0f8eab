"""Predicts every timing of a table three ways, each time by models that have not seen its weight's shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.cost_models.gemm.tables import FLOAT_PATHS, PATHS, Cache, Table, timings_of
from hwmodels.calibrate import Array, Errors, Fit, Timings, fit, judged, site_folds
from hwmodels.interpolate import Interpolator

MODELS = ("raw", "calibrated", "interpolated")
FOLDS = 5
MOST = 6000
"""Timings that a fit looks at: drawn at random where there are more."""
FEW = 20
SEEDS = 5
CACHE_TIMINGS = 1500
CAPACITIES = tuple(size * 2.0**20 for size in (24, 32, 48, 64, 96, 128, 192))
SPEEDS = (1.5, 2.0, 2.5, 3.0, 4.0)
CACHE_GAIN = 0.9
"""A cache is believed in if it lowers the mean logarithmic error to this part of what it was."""
ROW_SCALE = 4.0
"""What doubling m counts against doubling n or k: the neighbours of a weight that was never timed are other weights at
the same m, which was."""

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int_]


@dataclass(frozen=True)
class Predictions:
    """Held-out predictions for one table.

    Attributes:
        table: The table.
        rows: Its rows, with the columns of `MODELS` in seconds.
        fits: For each format the fit to all of its rows, with the errors of the held-out predictions.
        caches: Formats whose timings show a cache, and which.
        few: A row per format and seed: errors of fits to 20 timings on the sites of one fold.
    """

    table: Table
    rows: pd.DataFrame
    fits: dict[str, Fit]
    caches: dict[str, Cache]
    few: pd.DataFrame


def predict(table: Table, say: Callable[[str], None] = print) -> Predictions:
    """Deals the table's sites into five parts and predicts each from the other four."""
    folds = site_folds(table.rows["site"].to_numpy(), FOLDS)
    rows = table.rows.assign(fold=np.argmax(folds, axis=0))
    caches = [find_cache(table, rows["fold"].to_numpy() != fold) for fold in range(FOLDS)]
    whole_cache = find_cache(table, np.ones(len(rows), bool))
    predicted, fits, found, few = [], {}, {}, []
    for name in table.formats:
        mine = rows[rows["gemm_dtype"] == name].reset_index(drop=True)
        fold = mine["fold"].to_numpy()
        columns = {model: np.empty(len(mine)) for model in MODELS}
        columns["raw"] = raw_seconds(table, mine, name)
        for held, cache in enumerate(caches):
            seen, unseen = np.flatnonzero(fold != held), np.flatnonzero(fold == held)
            if len(unseen):
                _, timings, fitted = fit_best(table, name, cache, seen)
                limits = fitted.predict(timings)
                columns["calibrated"][unseen] = limits[unseen]
                columns["interpolated"][unseen] = interpolate(mine, limits, seen, unseen)
                few.append(fit_few(table, name, seen, unseen, held))
        errors = Errors.of(columns["calibrated"], mine["seconds"].to_numpy())
        cache, _, fitted = fit_best(table, name, whole_cache, np.arange(len(mine)))
        fits[name] = judged(fitted, errors)
        if cache is not None:
            found[name] = cache
        predicted.append(mine.assign(**columns))
        say(f"{table.name} {name}: median {errors.median:.1%}")
    return Predictions(table, pd.concat(predicted, ignore_index=True), fits, found, pd.DataFrame(few))


def raw_seconds(table: Table, rows: pd.DataFrame, name: str) -> Array:
    """The roofline of the peaks alone, for what the product itself computes and moves."""
    recipe = PATHS[name]
    m, n, k = (rows[side].to_numpy(float) for side in ("m", "n", "k"))
    traffic = (n * k * recipe.weight_bits + m * k * recipe.input_bits + m * n * 16) / 8
    return np.asarray(np.maximum(2 * m * n * k / table.peaks.compute[recipe.compute], traffic / table.peaks.bandwidth))


def interpolate(rows: pd.DataFrame, limits: Array, seen: Rows, unseen: Rows) -> Array:
    """Seconds at `unseen` rows from the utilisation of the calibrated roofline at `seen` ones."""
    points = np.log2(rows[["m", "n", "k"]].to_numpy(float)) * [ROW_SCALE, 1.0, 1.0]
    seconds = rows["seconds"].to_numpy()
    return Interpolator(points[seen], limits[seen], seconds[seen]).predict(points[unseen], limits[unseen])


def find_cache(table: Table, seen: Mask) -> Cache | None:
    """The cache that the float timings among `seen` rows of the table ran from, if they show one."""
    name = next((name for name in FLOAT_PATHS if name in table.formats), table.formats[0])
    rows = np.flatnonzero(seen[(table.rows["gemm_dtype"] == name).to_numpy()])
    rows = np.random.default_rng(0).permutation(rows)[:CACHE_TIMINGS]
    plain = _loss(timings_of(table, name)[rows])

    def best(options: list[Cache]) -> tuple[float, Cache]:
        return min(((_loss(timings_of(table, name, one)[rows]), one) for one in options), key=lambda found: found[0])

    _, rough = best([Cache(capacity, SPEEDS[1]) for capacity in CAPACITIES])
    loss, found = best([Cache(rough.capacity, speed) for speed in SPEEDS])
    return found if loss < CACHE_GAIN * plain else None


def _loss(timings: Timings) -> float:
    return mean_log_error(fit(timings, is_plain=True), timings)


def mean_log_error(fitted: Fit, timings: Timings) -> float:
    """Mean of |log(predicted / measured)|."""
    return float(np.abs(np.log(fitted.predict(timings) / timings.seconds)).mean())


def fit_best(table: Table, name: str, cache: Cache | None, seen: Rows) -> tuple[Cache | None, Timings, Fit]:
    """Fits to `seen` rows of a format, with the cache if that fits them better; returns all of its timings too."""
    drawn = np.random.default_rng(0).permutation(seen)[:MOST]
    tried: list[tuple[float, Cache | None, Timings, Fit]] = []
    for option in (None, cache) if cache else (None,):
        timings = timings_of(table, name, option)
        fitted = fit(timings[drawn])
        tried.append((mean_log_error(fitted, timings[drawn]), option, timings, fitted))
    _, chosen, timings, fitted = min(tried, key=lambda one: one[0])
    return chosen, timings, fitted


def fit_few(table: Table, name: str, seen: Rows, unseen: Rows, seed: int) -> dict[str, object]:
    """Errors, at `unseen` rows, of a fit to 20 of the `seen` ones drawn at random."""
    timings = timings_of(table, name)
    fitted = fit(timings[np.random.default_rng(seed).choice(seen, FEW, replace=False)])
    errors = Errors.of(fitted.predict(timings[unseen]), timings.seconds[unseen])
    return {
        "table": table.name,
        "format": name,
        "seed": seed,
        "mape": errors.mape,
        "median": errors.median,
        "within_20": errors.within_20,
    }
