"""Tests and intervals for the mean of a finite set that hold at every sample drawn so far, at once.

An ordinary interval is valid for one number of samples, fixed beforehand. Who looks after every sample and stops as
soon as it excludes something is wrong far more often than it says. The tests here are *e-processes*: a gambler bets
against a hypothesis, sample after sample; if it is true, the stakes do not grow on average, and the probability that
they ever reach 1 / alpha is at most alpha (Ville's inequality), however often one looks and whenever one stops.

Samples are drawn without replacement from a set whose size is known, which makes what is left ever better known: if the
whole mean is `m`, the mean of what is left before draw i is

    m_i = (population * m - (x_1 + ... + x_(i-1))) / (population - i + 1).

Nothing here knows about networks: pure functions on arrays.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import erfcx, log_ndtr, logsumexp

BETS = (0.03, 0.1, 0.25, 0.5, 0.75, 0.95)
"""Shares of the stakes that the gamblers on bounded samples bet; one can only lose all of it by betting all of it."""

NORMAL_FROM = 64
"""Unbounded samples are judged from this many on: the normal approximation needs some."""

PHANTOMS = 2
"""So many samples, as far below the mean as the farthest one seen is from it, are counted beside unbounded samples."""

TIGHTEST_AT = 128
"""The number of unbounded samples for which their test is tuned; it is valid for any."""

ROUNDING = 1e-9
"""What is left of a mean in [0, 1] is known no better than this; less is neither bet on nor held to be negative."""

BISECTIONS = 40


def betting_capital(
    samples: np.ndarray, population: int, mean: float | np.ndarray, low: float, high: float
) -> np.ndarray:
    """Returns the logarithm of the stakes after every sample, for samples that are bounded.

    The hypothesis is that the mean of the whole set is at most `mean`. With samples and mean scaled to [0, 1], the
    stakes are the average over a few gamblers, who bet a fixed share c on every sample,

        K_t = mean over c of prod over i <= t of (1 + c * (x_i / m_i - 1)),

    the diversified bets of Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (JRSS B
    2024, arXiv 2010.09686, sections 4 and 5; without replacement also arXiv 2006.04347). It is infinite from where the
    samples seen so far rule the hypothesis out by themselves.

    Args:
        samples: In random order, the last axis counts them, shape `(..., samples)`.
        population: How many there are in the whole set.
        mean: The hypothesis; one for all, or of a shape that goes with `samples`.
        low: The least a sample can be.
        high: The most a sample can be.

    Returns:
        Shape `(..., samples)`; it falls with `mean`.

    Raises:
        ValueError: If a sample is out of bounds, or there are more than in the whole set.
    """
    samples = np.asarray(samples, dtype=np.float64)
    if samples.size and not (low <= samples.min() and samples.max() <= high):
        raise ValueError(f"samples must lie within [{low}, {high}], found {samples.min()} to {samples.max()}")
    scaled = (samples - low) / (high - low)
    rest = _mean_of_rest(scaled, population, (mean - low) / (high - low))
    gain = scaled / np.maximum(rest, ROUNDING) - 1
    capitals = [np.log1p(bet * gain).cumsum(-1) for bet in BETS]
    ruled_out = np.maximum.accumulate(rest < -ROUNDING, axis=-1)
    return np.where(ruled_out, np.inf, np.logaddexp.reduce(capitals) - math.log(len(BETS)))


def normal_capital(samples: np.ndarray, population: int, mean: float | np.ndarray) -> np.ndarray:
    """Returns the logarithm of the stakes after every sample, for samples without bounds; valid for many samples.

    The hypothesis is that the mean of the whole set is at most `mean`. The stakes are those of the one-sided normal
    mixture on the martingale s_t = sum over i <= t of (x_i - m_i), in units of the standard deviation seen so far,

        K_t = 2 / sqrt(1 + r t) * exp(r s_t^2 / (2 (1 + r t))) * Phi(s_t sqrt(r / (1 + r t))),

    whose inversion is the one-sided asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas,
    "Time-uniform central limit theory and asymptotic confidence sequences" (Annals of Statistics 2024, arXiv
    2103.06476); `r` makes it tightest at `TIGHTEST_AT` samples for alpha = 0.05. It holds in the limit for samples of
    finite variance. What it misses with few samples are long tails below the mean of which nothing was seen yet; two
    corrections of ours that vanish in the limit guard against them: `PHANTOMS` and `NORMAL_FROM`, before which nothing
    is concluded. Where a few samples in a hundred carry most of the mean, it is still wrong more often than it says.

    Args:
        samples: In random order, the last axis counts them, shape `(..., samples)`.
        population: How many there are in the whole set.
        mean: The hypothesis; one for all, or of a shape that goes with `samples`.

    Returns:
        Shape `(..., samples)`; it falls with `mean`.

    Raises:
        ValueError: If there are more samples than in the whole set.
    """
    samples = np.asarray(samples, dtype=np.float64)
    count = np.arange(1, samples.shape[-1] + 1)
    drift = (samples - _mean_of_rest(samples, population, mean)).cumsum(-1)
    centred = samples - samples[..., :1]  # keeps digits where the mean is large
    middle = centred.cumsum(-1) / count
    spread = np.sqrt(np.maximum((centred**2).cumsum(-1) / count - middle**2, 0))
    top, bottom = np.maximum.accumulate(centred, axis=-1), np.minimum.accumulate(centred, axis=-1)
    drift = drift - PHANTOMS * np.maximum(top - middle, middle - bottom)
    ratio = (-2 * math.log(0.1) + math.log(1 - 2 * math.log(0.1))) / TIGHTEST_AT
    scaled = np.divide(drift, spread, out=np.zeros_like(drift), where=spread > 0) * np.sqrt(ratio / (1 + ratio * count))
    above, below = np.maximum(scaled, 0), np.minimum(scaled, 0)  # exp(z^2 / 2) Phi(z) cancels below 0
    gain = np.where(scaled < 0, np.log(erfcx(-below / math.sqrt(2)) / 2), above**2 / 2 + log_ndtr(above))
    return np.where(count < NORMAL_FROM, 0.0, math.log(2) - np.log1p(ratio * count) / 2 + gain)


def combined_capital(capitals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the logarithm of the weighted mean of several stakes, which tests that all their hypotheses are true.

    Args:
        capitals: Logarithms of stakes, shape `(hypotheses, samples)`.
        weights: Shape `(hypotheses,)`, at least 0, adding up to 1, chosen before the first sample.
    """
    total: np.ndarray = logsumexp(capitals, axis=0, b=np.asarray(weights)[:, np.newaxis])
    return total


def mean_interval(
    samples: np.ndarray, population: int, alpha: float, bounds: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Returns an interval for the mean of the whole set that may be computed after any sample: `(low, high)`.

    The probability that such an interval ever misses the mean, over all numbers of samples, is at most `alpha`: each
    end is where the stakes, `betting_capital` with bounds and else `normal_capital`, reach 2 / alpha.

    Args:
        samples: Those seen so far, in random order, shape `(samples,)`.
        population: How many there are in the whole set.
        alpha: Probability of a miss, in (0, 1).
        bounds: The least and the most a sample can be, where known.
    """
    low = _lower_end(samples, population, alpha / 2, bounds)
    mirrored = None if bounds is None else (-bounds[1], -bounds[0])
    high = -_lower_end(-samples, population, alpha / 2, mirrored)
    mean = float(np.mean(samples))
    return min(low, mean), max(high, mean)


def _lower_end(samples: np.ndarray, population: int, alpha: float, bounds: tuple[float, float] | None) -> float:
    """The largest mean that is ruled out; the lower bound, or minus infinity, where none is."""
    if bounds is None:
        centre, reach = float(np.mean(samples)), 100 * float(np.std(samples))
        bottom, top = centre - reach, centre + reach

        def is_ruled_out(mean: float) -> bool:
            return bool(normal_capital(samples, population, mean).max() >= -math.log(alpha))
    else:
        bottom, top = bounds

        def is_ruled_out(mean: float) -> bool:
            return bool(betting_capital(samples, population, mean, *bounds).max() >= -math.log(alpha))

    if not is_ruled_out(bottom):
        return -math.inf if bounds is None else bottom
    for _ in range(BISECTIONS):
        middle = (bottom + top) / 2
        bottom, top = (middle, top) if is_ruled_out(middle) else (bottom, middle)
    return bottom


def _mean_of_rest(samples: np.ndarray, population: int, mean: float | np.ndarray) -> np.ndarray:
    """The mean of what is left before every draw, if the whole mean is `mean`."""
    if samples.shape[-1] > population:
        raise ValueError(f"{samples.shape[-1]} samples cannot be drawn from {population} without replacement")
    left = population - np.arange(samples.shape[-1])
    rest: np.ndarray = (population * mean - (samples.cumsum(-1) - samples)) / left
    return rest
