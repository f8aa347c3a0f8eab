"""Interactions as a Gram matrix: the quadratic form of all pairs of choices, positive semidefinite by construction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from search.errors import DataError

TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class Gram:
    """A sum of outer products over samples; sums over disjoint samples add up to the sum over all of them.

    Attributes:
        total: Sum over samples of `f_i . f_j`, float64, shape `(choices, choices)`.
        count: Number of samples in it.
    """

    total: np.ndarray
    count: int

    @classmethod
    def empty(cls, choices: int) -> Gram:
        """Returns the sum over no sample."""
        return cls(np.zeros((choices, choices)), 0)

    @classmethod
    def of(cls, features: np.ndarray, count: int) -> Gram:
        """Returns the sum of outer products of features.

        Args:
            features: Every choice's features, those of all samples in a row, shape `(choices, features)`.
            count: Number of samples that they come from.
        """
        features = np.asarray(features, np.float64)
        return cls(features @ features.T, count)

    def __add__(self, other: Gram) -> Gram:
        return Gram(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> np.ndarray:
        """The mean over samples, shape `(choices, choices)`: `1/2 x' mean x` is the predicted divergence in nats.

        Raises:
            DataError: If there is no sample in it.
        """
        if not self.count:
            raise DataError("interactions of no sample; the calibration split must hold at least one")
        return self.total / self.count


def merge_grams(grams: Iterable[Gram]) -> Gram:
    """Adds up Gram matrices of disjoint samples.

    Raises:
        DataError: If there are none.
    """
    found = list(grams)
    if not found:
        raise DataError("no interactions to merge; give those of at least one shard")
    return sum(found[1:], found[0])


def scaled(interactions: np.ndarray, divergences: np.ndarray) -> np.ndarray:
    """Returns interactions under which every single choice has the divergence measured for it.

    `G_ij sqrt(4 KL_i KL_j / (G_ii G_jj))`, which is `D G D` with a diagonal `D` and so stays positive semidefinite. Its
    diagonal is exactly `2 KL_i`. A choice with `G_ii = 0` interacts with no other, and keeps `2 KL_i` alone.

    Args:
        interactions: Positive semidefinite, shape `(choices, choices)`.
        divergences: Measured divergence of each choice made alone, in nats, at least 0, shape `(choices,)`.

    Raises:
        DataError: If a divergence is negative or not finite.
    """
    divergences = np.asarray(divergences, np.float64)
    if not (np.isfinite(divergences).all() and (divergences >= 0).all()):
        raise DataError(
            f"interactions can be scaled to finite divergences of at least 0, not to {divergences.tolist()}"
        )
    diagonal = np.diagonal(interactions)
    factors = np.sqrt(np.divide(2 * divergences, diagonal, out=np.zeros_like(divergences), where=diagonal > TINY))
    result: np.ndarray = interactions * np.outer(factors, factors)
    np.fill_diagonal(result, 2 * divergences)
    return result
