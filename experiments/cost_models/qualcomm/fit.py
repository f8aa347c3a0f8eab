"""Fits a chip's rates to whole-network latencies, and the predictor that knows no layers.

    t = launch + passes o + passed_bytes / b + layer_bytes / w + calls o_p + operations / r_p

with p the path of the network's precision: the calibrated roofline at sharpness 1, summed over a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

SOFTNESS = 0.15
"""Relative error from which on an outlier counts linearly rather than squared."""

PRIOR_WEIGHT = 0.15
"""What a standard deviation from the prior costs, in relative errors of one network: a nudge for what is not seen."""


@dataclass(frozen=True)
class PathRates:
    """What the layers of one precision reach: seconds per call and operations per second."""

    overhead_s: float
    operations: float


@dataclass(frozen=True)
class Rates:
    """What a chip reaches.

    Attributes:
        launch_s: Seconds that running a network takes besides its operations.
        overhead_s: Seconds of starting an operation between the layers.
        bandwidth: Bytes per second of what moves between the layers.
        layer_bandwidth: Bytes per second of what layers read and write, at any precision.
        paths: Precision to what its layers reach.
    """

    launch_s: float
    overhead_s: float
    bandwidth: float
    layer_bandwidth: float
    paths: dict[str, PathRates]

    def seconds(self, rows: pd.DataFrame) -> np.ndarray:
        """Predicted latency of networks by their features and `precision`, shape `(rows,)`."""
        overhead, rate = (
            np.array([getattr(self.paths[precision], name) for precision in rows.precision])
            for name in ("overhead_s", "operations")
        )
        moving = rows.passed_bytes / self.bandwidth + rows.layer_bytes / self.layer_bandwidth
        seconds = (
            self.launch_s + rows.passes * self.overhead_s + moving + rows.calls * overhead + rows.operations / rate
        )
        return seconds.to_numpy(dtype=np.float64)


GUESS = Rates(
    launch_s=150e-6,
    overhead_s=0.5e-6,
    bandwidth=150e9,
    layer_bandwidth=60e9,
    paths={"w8a8": PathRates(1e-6, 30e12), "w8a16": PathRates(1e-6, 20e12), "float": PathRates(1e-6, 10e12)},
)
"""The prior's medians on a phone of 2024; slower and faster chips scale all of them alike."""

SHARED_SPREADS, PATH_SPREADS = (0.7, 1.5, 1.0, 0.7), (1.5, 1.0)
"""The prior's standard deviations, of logarithms: of launch, overhead and both bandwidths; of each path's two."""


def fit(rows: pd.DataFrame) -> Rates:
    """Fits rates to the `latency_s` of networks."""
    precisions = [precision for precision in GUESS.paths if precision in set(rows.precision)]
    guess = [GUESS.launch_s, GUESS.overhead_s, 1 / GUESS.bandwidth, 1 / GUESS.layer_bandwidth]
    spreads = [*SHARED_SPREADS]
    columns = [np.ones(len(rows)), rows.passes, rows.passed_bytes, rows.layer_bytes]
    for precision in precisions:
        path, mine = GUESS.paths[precision], rows.precision == precision
        columns += [mine * rows.calls, mine * rows.operations]
        guess += [path.overhead_s, 1 / path.operations]
        spreads += PATH_SPREADS
    launch, overhead, byte, layer_byte, *each = solve(columns, rows.latency_s, guess, spreads).tolist()
    pairs = zip(each[::2], each[1::2], strict=True)
    paths = {name: PathRates(start, 1 / operation) for name, (start, operation) in zip(precisions, pairs, strict=True)}
    return Rates(launch, overhead, 1 / byte, 1 / layer_byte, paths)


def solve(columns: Sequence[Any], measured: Any, guess: Sequence[float], spreads: Sequence[float]) -> np.ndarray:
    """Fits seconds per unit of each of `columns`, whose sum is the time, to what was measured.

    Least squares of log errors, soft-L1 so that outliers count less, in the logarithms of the parameters, with a weak
    prior: `guess` scaled to how fast the device is, and its standard deviations `spreads`.
    """
    from scipy.optimize import least_squares

    matrix = np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)
    target = np.log(np.asarray(measured, dtype=np.float64))
    middle = np.log(guess)
    middle = middle + np.median(target - np.log(matrix @ np.exp(middle)))

    def residuals(vector: np.ndarray) -> np.ndarray:
        return np.concatenate([np.log(matrix @ np.exp(vector)) - target, PRIOR_WEIGHT * (vector - middle) / spreads])

    return np.exp(least_squares(residuals, middle, loss="soft_l1", f_scale=SOFTNESS).x)


def regress(known: pd.DataFrame, asked: pd.DataFrame) -> np.ndarray:
    """Predicts `asked` from a regression per precision: `t = t0 + a macs + b parameters`, nothing negative.

    Relative errors are what is made small. NaN for a precision without three known networks.
    """
    from scipy.optimize import nnls

    found = np.full(len(asked), np.nan)
    for precision in asked.precision.unique():
        mine = known[known.precision == precision]
        if len(mine) < 3:
            continue
        matrix, measured = _sizes(mine), mine.latency_s.to_numpy()
        weights, _ = nnls(matrix / measured[:, None], np.ones(len(mine)))
        here = (asked.precision == precision).to_numpy()
        found[here] = _sizes(asked[here]) @ weights
    return found


def _sizes(rows: pd.DataFrame) -> np.ndarray:
    return np.stack([np.full(len(rows), 1e-3), rows.macs / 1e12, rows.parameters / 1e10], axis=1)
