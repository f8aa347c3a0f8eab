"""Times between measured ones: what is interpolated is how much of its limit an operation reaches.

    t(x) = limit(x) / u(x)

where the limit is what a roofline says, and u, the utilisation, is read off the nearest measured operations: sizes
enter as logarithms and u as one, as in AIConfigurator (github.com/ai-dynamo/aiconfigurator), which weights neighbours
by inverse distance; a plane through the neighbours halves the error. Utilisation varies far less than time does.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

Array = npt.NDArray[np.float64]
Scheme = Literal["plane", "mean"]

RIDGE = 0.01
"""Weight, against the spread of the neighbours, that keeps the plane flat where they lie in a line."""
REACH = 1.1
"""Distance at which weights vanish, in that of the farthest neighbour."""
SAME = 1e-9
"""Distance below which two points are one."""


class Interpolator:
    """Utilisation between measured operations.

    Points may have any number of dimensions, each the logarithm of a size. A point that was measured gets what was
    measured (the geometric mean where that was done several times). No utilisation leaves the range of the neighbours
    it is read from, so that beyond the measured sizes it is that of the boundary.
    """

    def __init__(
        self,
        points: Array,
        limits: Array,
        seconds: Array,
        neighbours: int = 8,
        scheme: Scheme = "plane",
    ) -> None:
        """Takes what was measured.

        Args:
            points: Logarithms of the sizes (N, D), scaled so that a step in one direction means as much as in another.
            limits: Seconds by the roofline, raw or calibrated (N).
            seconds: What was measured (N).
            neighbours: Measured points that an utilisation is read from.
            scheme: `plane` fits one through the neighbours, the near ones weighing more; `mean` takes their mean
                weighted by inverse squared distance.

        Raises:
            ValueError: If shapes do not agree, nothing was measured, or something is not above 0.
        """
        points = np.asarray(points, dtype=float)
        limits, seconds = np.asarray(limits, dtype=float), np.asarray(seconds, dtype=float)
        if points.ndim != 2 or not len(points) == len(limits) == len(seconds):
            raise ValueError(
                f"points must be (N, D) with N limits and seconds, got {points.shape}, {limits.shape}, {seconds.shape}"
            )
        if not len(points) or min(limits.min(), seconds.min()) <= 0 or not np.isfinite(points).all():
            raise ValueError("there must be points, all finite, with limits and seconds above 0")
        if scheme not in ("plane", "mean"):
            raise ValueError(f"scheme {scheme!r} is unknown; allowed: plane, mean")
        if neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, got {neighbours}")
        self.points, self.limits, self.seconds = points, limits, seconds
        self.neighbours, self.scheme = neighbours, scheme

    @cached_property
    def _measured(self) -> tuple[cKDTree, Array, Array]:
        """A tree of the different points, the points, and their log utilisation."""
        from scipy.spatial import cKDTree

        places, number = np.unique(self.points, axis=0, return_inverse=True)
        count = np.bincount(number.ravel())
        logs = np.bincount(number.ravel(), np.log(self.limits / self.seconds)) / count
        return cKDTree(places), places, logs

    def utilisation(self, points: Array) -> Array:
        """Utilisation at points (M, D): (M)."""
        tree, places, logs = self._measured
        points = np.asarray(points, dtype=float)
        if points.ndim != 2 or points.shape[1] != places.shape[1]:
            raise ValueError(f"points must be (M, {places.shape[1]}), got {points.shape}")
        if not len(points):
            return np.empty(0)
        count = min(self.neighbours, len(places))
        distance, nearest = (found.reshape(len(points), count) for found in tree.query(points, count))
        around = logs[nearest]
        if self.scheme == "mean":
            weights = 1 / np.maximum(distance, SAME) ** 2
            found = (around * weights).sum(axis=1) / weights.sum(axis=1)
        else:
            found = _plane(places[nearest] - points[:, None], distance, around)
        found = np.clip(found, around.min(axis=1), around.max(axis=1))
        return np.asarray(np.exp(np.where(distance[:, 0] < SAME, around[:, 0], found)))

    def predict(self, points: Array, limits: Array) -> Array:
        """Seconds at points (M, D) whose roofline is `limits` (M)."""
        return np.asarray(np.asarray(limits, dtype=float) / self.utilisation(points))

    def held_out(self, sites: npt.NDArray[Any], folds: int = 5, seed: int = 0) -> Array:
        """Seconds (N) of every measured operation, read from the others with its whole site left out.

        Args:
            sites: What must be left out together, such as the number of the layer's shape (N).
            folds: Parts the sites are dealt into; each is predicted from the others.
            seed: Of the dealing.
        """
        from hwmodels.calibrate import site_folds

        predicted = np.empty(len(self.points))
        for held in site_folds(sites, folds, seed):
            seen = ~held
            part = Interpolator(self.points[seen], self.limits[seen], self.seconds[seen], self.neighbours, self.scheme)
            predicted[held] = part.predict(self.points[held], self.limits[held])
        return predicted

    def holdout_error(self, sites: npt.NDArray[Any], folds: int = 5, seed: int = 0) -> float:
        """Median of |predicted / measured - 1| with whole sites left out; arguments as of `held_out`."""
        return float(np.median(np.abs(self.held_out(sites, folds, seed) / self.seconds - 1)))


def _plane(offsets: Array, distance: Array, values: Array) -> Array:
    """Values (M) at the origin of planes through neighbours at offsets (M, K, D), weighted by the tricube."""
    reach = REACH * np.maximum(distance[:, -1:], SAME)
    weights = (1 - (distance / reach) ** 3) ** 3
    weights /= weights.sum(axis=1, keepdims=True)
    centre = np.einsum("mk,mkd->md", weights, offsets)
    middle = np.einsum("mk,mk->m", weights, values)
    spread = offsets - centre[:, None]
    moments = np.einsum("mkd,mk,mke->mde", spread, weights, spread)
    flat = RIDGE * np.trace(moments, axis1=1, axis2=2) + SAME
    moments += flat[:, None, None] * np.eye(offsets.shape[2])
    products = np.einsum("mkd,mk,mk->md", spread, weights, values - middle[:, None])
    slopes = np.linalg.solve(moments, products[..., None])[..., 0]
    return np.asarray(middle - np.einsum("md,md->m", slopes, centre))
