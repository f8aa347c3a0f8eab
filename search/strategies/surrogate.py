"""What measurements teach about forecasts: a regression on several predictors, and a Gaussian process on the rest.

The regression gives every predictor a weight that is not negative (a forecast of more loss never counts for less);
while there are few measurements, all predictors count alike. What it misses is taken to be alike for policies that
agree in most decisions, with a kernel that falls with the number of decisions in which two policies differ. Candidates
are compared by their expected improvement (Jones et al., "Efficient Global Optimization of Expensive Black-Box
Functions", 1998, equation 15).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from scipy.stats import norm

RIDGE = 1.0  # measurements that the belief in all predictors alike weighs as much as
NOISE = 0.05  # share of the residuals' variance that is peculiar to a policy
DOUBT = 0.1  # least standard deviation of residuals, in standard deviations of the losses
REACH = 0.15  # share of the decisions over which residuals lose all but 1/e of their likeness


@dataclass(frozen=True)
class Surrogate:
    """A posterior over the loss of policies, after some were measured.

    Attributes:
        points: The measured points, shape `(measured, decisions)`.
        centre: Mean of every predictor's forecasts for them, shape `(predictors,)`.
        spread: Their standard deviations, likewise.
        weights: The regression's intercept and weights, shape `(1 + predictors,)`.
        pull: What every measured residual contributes per unit of likeness, shape `(measured,)`.
        precision: Inverse of the residuals' covariance, over their variance, shape `(measured, measured)`.
        deviation: Standard deviation of the residuals.
    """

    points: np.ndarray
    centre: np.ndarray
    spread: np.ndarray
    weights: np.ndarray
    pull: np.ndarray
    precision: np.ndarray
    deviation: float

    @classmethod
    def fit(cls, points: np.ndarray, forecasts: np.ndarray, losses: np.ndarray) -> Surrogate:
        """Learns from measurements.

        Args:
            points: Points measured, shape `(measured, decisions)`, at least one.
            forecasts: What each predictor foretold, shape `(measured, predictors)`.
            losses: What was measured, shape `(measured,)`.
        """
        count, predictors = forecasts.shape
        centre, spread = forecasts.mean(0), forecasts.std(0)
        spread = np.where(spread > 0, spread, np.maximum(np.abs(centre), 1e-12))
        scaled = (forecasts - centre) / spread
        scale = float(losses.std()) or float(np.abs(losses).max()) or 1.0
        alike = scale / predictors
        design = np.concatenate([scaled, np.sqrt(RIDGE) * np.eye(predictors)])
        wanted = np.concatenate([losses - losses.mean(), np.full(predictors, np.sqrt(RIDGE) * alike)])
        slopes, _ = nnls(design, wanted)
        weights = np.concatenate([[losses.mean()], slopes])
        residuals = losses - weights[0] - scaled @ slopes
        deviation = max(float(np.sqrt(np.mean(residuals**2))), DOUBT * scale)
        precision = np.linalg.inv(likeness(points, points) + NOISE * np.eye(count))
        return cls(points, centre, spread, weights, precision @ residuals, precision, deviation)

    def posterior(self, points: np.ndarray, forecasts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the loss of other points, each of shape `(policies,)`."""
        alike = likeness(points, self.points)
        trend = self.weights[0] + ((forecasts - self.centre) / self.spread) @ self.weights[1:]
        explained = np.einsum("ij,jk,ik->i", alike, self.precision, alike)
        return trend + alike @ self.pull, self.deviation * np.sqrt(np.clip(1 + NOISE - explained, 1e-12, None))


def likeness(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The kernel: 1 where two points agree, falling with the number of decisions in which they differ."""
    differing = (first[:, None, :] != second[None, :, :]).sum(-1)
    kernel: np.ndarray = np.exp(-differing / max(REACH * first.shape[1], 1.0))
    return kernel


def expected_improvement(mean: np.ndarray, deviation: np.ndarray, best: float) -> np.ndarray:
    """By how much each candidate is expected to lie below `best`, counting those above as zero."""
    ahead = (best - mean) / deviation
    gain: np.ndarray = deviation * (ahead * norm.cdf(ahead) + norm.pdf(ahead))
    return gain


def chance_below(mean: np.ndarray, deviation: np.ndarray, limit: float) -> np.ndarray:
    """The chance that each candidate lies at or below a limit."""
    chance: np.ndarray = norm.cdf((limit - mean) / deviation)
    return chance
