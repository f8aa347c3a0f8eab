"""Intervals for the drop of a plan's quality against the float model, on the same samples."""

from __future__ import annotations

import math

import numpy as np

NORMAL_95 = 1.959963984540054  # the normal distribution's 97.5% quantile


def paired_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Returns the mean of paired differences with its 95% interval: `(mean, low, high)`.

    Differences of right-or-wrong scores (-1, 0 and 1 only) get the interval of Agresti and Min (Statistics in Medicine
    24, 2005), which adds half an observation to each cell of the 2x2 table, so that "no sample changed" still leaves
    doubt; all others get Student's t interval.

    Args:
        differences: One difference per sample, shape `(samples,)`, at least one.
    """
    count, mean = len(differences), float(np.mean(differences))
    if np.isin(differences, (-1, 0, 1)).all():
        up, down = float(np.sum(differences == 1)) + 0.5, float(np.sum(differences == -1)) + 0.5
        centre = (up - down) / (count + 2)
        half = NORMAL_95 * math.sqrt(up + down - (up - down) ** 2 / (count + 2)) / (count + 2)
        return mean, max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half))
    if count == 1:
        return mean, -math.inf, math.inf
    from scipy.stats import t

    half = float(t.ppf(0.975, count - 1)) * float(np.std(differences, ddof=1)) / math.sqrt(count)
    return mean, mean - half, mean + half
