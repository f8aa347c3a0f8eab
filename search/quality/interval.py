"""Intervals for the drop of a plan's quality against the float model, on the same samples."""

from __future__ import annotations

import math

import numpy as np

from search.tasks.task import Task

NORMAL_95 = 1.959963984540054  # the normal distribution's 97.5% quantile
BISECTIONS = 60


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


def worse_by(task: Task, scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How much worse each score is than its counterpart, shape `(samples,)`; negative where better."""
    worse: np.ndarray = reference - scores if task.higher_is_better else scores - reference
    return worse


def drop(task: Task, scores: np.ndarray, reference: np.ndarray) -> float:
    """How much worse the metric of `scores` is than that of `reference`; negative where better."""
    before, after = task.reduce(reference), task.reduce(scores)
    return before - after if task.higher_is_better else after - before


def drop_of_shift(task: Task, reference: np.ndarray, shift: float) -> float:
    """How much worse the metric gets if every score gets worse by `shift`."""
    return drop(task, reference - shift if task.higher_is_better else reference + shift, reference)


def shift_of_drop(task: Task, reference: np.ndarray, wanted: float) -> float:
    """How much worse every score may get until the metric is worse by `wanted`, at least 0; found by bisection."""
    low, high = 0.0, wanted
    while drop_of_shift(task, reference, high) < wanted and high < 1e12 * wanted:
        low, high = high, 2 * high
    for _ in range(BISECTIONS if high > 0 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if drop_of_shift(task, reference, middle) < wanted else (low, middle)
    return high


def drop_interval(
    task: Task, scores: np.ndarray, reference: np.ndarray, shifts: tuple[float, float] | None = None
) -> tuple[float, float, float]:
    """Returns how much worse the metric is on the same samples, with its 95% interval: `(drop, low, high)`.

    The interval is that of the mean paired difference of the scores, both ends seen through the metric: an end is the
    drop if every score of the reference were worse by that much. As a metric is an increasing function of the mean
    score, that is exact, with the reference's metric taken as it was measured; for a metric that is the mean it is the
    paired interval itself.

    Args:
        task: Its `reduce` makes the metric of scores.
        scores: One per sample, shape `(samples,)`.
        reference: The float network's, on the same samples.
        shifts: Interval of the mean difference of the scores, if it is not to be `paired_interval`.
    """
    found = drop(task, scores, reference)
    low, high = shifts or paired_interval(worse_by(task, scores, reference))[1:]
    return found, min(found, drop_of_shift(task, reference, low)), max(found, drop_of_shift(task, reference, high))
