"""Fits the calibrated roofline to timings: the few numbers per path that a datasheet does not know.

    t = t0 + ((C / (P e_c))^p + (B / (BW e_m))^p + (s k)^p)^(1/p)

as in `hwmodels.roofline`. The fit minimises the absolute logarithm of predicted over measured time (rounded off near
zero), so that a large operation counts as much as a small one and a few odd timings count little.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from hwmodels.device import Tile
from hwmodels.roofline import join_seconds

Array = npt.NDArray[np.float64]

FEWEST = 8
"""Timings that a fit needs at least."""
SHARPEST = 20.0
"""Largest exponent that is fitted: the sum is then within 4% of the longer part."""
LOWEST_SHARE = 1e-3
"""Smallest share of a peak that is fitted."""
ROUNDING = 0.05
"""Logarithmic error below which it counts by its square: timings repeat to about this much."""
NO_TILE = Tile()
VECTOR_ROWS = 4
"""Rows up to which a product may run a kernel for vectors: TensorRT-LLM's do up to four."""
GAIN = 0.98
"""A kind of kernel with more to it is taken if it lowers the loss to this part of the simpler one's."""
MOST_STEPS = 150
"""Steps of one solve; most end after 20 to 50."""
PRECISE = {"xtol": 1e-10, "ftol": 1e-10, "gtol": 1e-10}
STARTS = ((0.5, 0.7, 1.2), (0.8, 0.8, 3.0), (0.2, 0.4, 2.0))
"""Compute share, memory share and sharpness that fits start from; the best end is kept."""


@dataclass(frozen=True)
class Timings:
    """Timings of the operations of one path.

    Attributes:
        operations: Operations of each (N), two per multiply-accumulate, padded to the path's tile.
        traffic: Bytes that each moves (N).
        seconds: What each took (N).
        peak: Operations per second of the compute type, dense.
        bandwidth: Bytes per second of the memory: one number, or that of the level each ran from (N).
        summed: Products summed into each output value (N); None leaves the term of the summed dimension out.
        rows: Rows of each product (N); None where kernels for vectors are not looked for.
    """

    operations: Array
    traffic: Array
    seconds: Array
    peak: float
    bandwidth: float | Array
    summed: Array | None = None
    rows: Array | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "peak" and value is not None and np.ndim(value) > 0:
                value = np.asarray(value, dtype=float)
                object.__setattr__(self, item.name, value)
                if value.shape != np.shape(self.operations):
                    raise ValueError(
                        f"{item.name} has shape {value.shape}, operations {np.shape(self.operations)}: give as many"
                    )
            if value is not None and not (np.isfinite(value).all() and np.min(value, initial=1) >= 0):
                raise ValueError(f"{item.name} must be finite and not negative")
        if min(np.min(self.seconds, initial=1), self.peak, np.min(self.bandwidth, initial=1)) <= 0:
            raise ValueError("seconds, peak and bandwidth must be above 0")

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, rows: npt.NDArray[Any]) -> Timings:
        """The timings at `rows`, indices or a mask."""
        bandwidth = self.bandwidth[rows] if isinstance(self.bandwidth, np.ndarray) else self.bandwidth
        summed, heights = (None if column is None else column[rows] for column in (self.summed, self.rows))
        shape = self.operations[rows], self.traffic[rows], self.seconds[rows]
        return Timings(*shape, self.peak, bandwidth, summed, heights)

    @property
    def limits(self) -> Array:
        """Seconds that the raw roofline gives each: the longer of computing and moving bytes at the peaks (N)."""
        return np.asarray(np.maximum(self.operations / self.peak, self.traffic / self.bandwidth))


def gemm_timings(
    m: Array,
    n: Array,
    k: Array,
    seconds: Array,
    *,
    weight_bits: float,
    input_bits: float,
    output_bits: float,
    peak: float,
    bandwidth: float | Array,
    groups: Array | int = 1,
    tile: Tile | None = None,
) -> Timings:
    """Timings of `groups` products of m x k by k x n each; the bits are those moved per value, scales included."""
    m, n, k = (np.asarray(size, dtype=float) for size in (m, n, k))
    tile = tile or NO_TILE
    padded = [np.ceil(size / step) * step for size, step in ((m, tile.m), (n, tile.n), (k, tile.k))]
    operations = 2.0 * padded[0] * padded[1] * padded[2] * groups
    traffic = groups * (n * k * weight_bits + m * k * input_bits + m * n * output_bits) / 8
    return Timings(operations, traffic, np.asarray(seconds, dtype=float), peak, bandwidth, k, m)


@dataclass(frozen=True)
class Fit:
    """The calibrated roofline of one path, and how well it fits.

    Attributes:
        overhead: Seconds to start one operation (t0).
        compute: Share of the compute peak that is reached (e_c), in (0, 1].
        memory: Share of the bandwidth that is reached (e_m), in (0, 1].
        sharpness: Exponent (p) that joins the parts, at least 1.
        step: Seconds per product summed (s): the accumulations of one output value follow each other, which shows
            where outputs are too few to fill the device.
        splits_sums: Whether `step` is per square root of the products summed, as where kernels split long sums.
        vector_overhead: Seconds to start a product of at most `VECTOR_ROWS` rows, which then takes no steps; None
            where that is no other kernel.
        sigma: Standard deviation of the logarithm of measured over predicted time; of held-out timings if `held_out`.
        median_error: Median of |predicted / measured - 1|.
        mape: Mean of it.
        samples: Timings that it was fitted to.
        held_out: Whether the errors are of timings that the fit had not seen.
        tile: Granularity that operations were padded to.
    """

    overhead: float
    compute: float
    memory: float
    sharpness: float
    step: float = 0.0
    splits_sums: bool = False
    vector_overhead: float | None = None
    sigma: float = 0.0
    median_error: float = 0.0
    mape: float = 0.0
    samples: int = 0
    held_out: bool = False
    tile: Tile = NO_TILE

    def predict(self, timings: Timings) -> Array:
        """Seconds of each operation (N); the measured ones are not looked at."""
        compute_s = timings.operations / (timings.peak * self.compute)
        memory_s = timings.traffic / (timings.bandwidth * self.memory)
        overhead: float | Array = self.overhead
        steps = _steps(timings, self.splits_sums, self.vector_overhead is not None) * self.step
        if self.vector_overhead is not None and timings.rows is not None:
            overhead = np.where(timings.rows <= VECTOR_ROWS, self.vector_overhead, overhead)
        joined = join_seconds(join_seconds(compute_s, steps, self.sharpness), memory_s, self.sharpness)
        return np.asarray(overhead + joined)


@dataclass(frozen=True)
class Errors:
    """How far predictions lie from measurements: |predicted / measured - 1|."""

    mape: float
    median: float
    within_20: float
    sigma: float

    @classmethod
    def of(cls, predicted: Array, measured: Array) -> Errors:
        """The errors of predictions (N); sigma is the root mean square of the logarithm of their ratio."""
        off = np.abs(predicted / measured - 1)
        logs = np.log(measured / predicted)
        return cls(
            float(off.mean()), float(np.median(off)), float((off < 0.2).mean()), float(np.sqrt((logs**2).mean()))
        )


def fit(timings: Timings, tile: Tile | None = None, is_plain: bool = False) -> Fit:
    """Fits the calibrated roofline to the timings of one path; its errors are of these timings.

    Deterministic: least squares of the logarithm under a soft absolute loss, from several starting points, the best end
    of which is kept. Kinds of kernel are tried in turn; a less simple one must lower the loss by `GAIN` to be taken.

    Args:
        timings: What to fit to.
        tile: Granularity that operations were padded to, to be noted.
        is_plain: Whether to leave out split sums and kernels for vectors.

    Raises:
        ValueError: If there are fewer than `FEWEST` timings.
    """
    if len(timings) < FEWEST:
        raise ValueError(f"a fit takes at least {FEWEST} timings, got {len(timings)}")
    kinds = [(False, False)]
    if timings.summed is not None and not is_plain:
        kinds.append((True, False))
        if timings.rows is not None and _has_vectors(timings.rows):
            kinds += [(False, True), (True, True)]
    loss, found = _fit_kind(timings, *kinds[0])
    for kind in kinds[1:]:
        other_loss, other = _fit_kind(timings, *kind)
        if other_loss < GAIN * loss:
            loss, found = other_loss, other
    errors = Errors.of(found.predict(timings), timings.seconds)
    return replace(
        found,
        sigma=errors.sigma,
        median_error=errors.median,
        mape=errors.mape,
        samples=len(timings),
        tile=tile or NO_TILE,
    )


def _has_vectors(rows: Array) -> bool:
    """Whether there are timings enough on both sides of `VECTOR_ROWS` to tell two kernels apart."""
    few = int((rows <= VECTOR_ROWS).sum())
    return min(few, len(rows) - few) >= 5 * FEWEST


def _fit_kind(timings: Timings, splits_sums: bool, has_vectors: bool) -> tuple[float, Fit]:
    """Loss and parameters of one kind of kernel."""
    from scipy.optimize import least_squares

    log_seconds = np.log(timings.seconds)
    typical, shortest = float(np.median(timings.seconds)), float(timings.seconds.min())
    steps = _steps(timings, splits_sums, has_vectors)
    # The scale of a step: more than that and the sum alone would take longer than any operation did.
    longest = float((timings.seconds / np.maximum(steps, 1)).max())

    def unpack(scaled: Array) -> Fit:
        overhead, compute, memory, sharpness, step, vector = scaled
        return Fit(
            overhead=float(overhead) * typical,
            compute=float(np.exp(compute)),
            memory=float(np.exp(memory)),
            sharpness=float(np.exp(sharpness)),
            step=float(step) ** 2 * longest if steps.any() else 0.0,
            splits_sums=splits_sums,
            vector_overhead=float(vector) * typical if has_vectors else None,
        )

    def residuals(free: Array) -> Array:
        return np.asarray(np.log(unpack(spread(free)).predict(timings)) - log_seconds)

    used = np.array([True, True, True, True, bool(steps.any()), has_vectors])

    def spread(free: Array) -> Array:
        scaled = np.zeros(len(used))
        scaled[used] = free
        return scaled

    least, start_s = np.log(LOWEST_SHARE), 0.7 * shortest / typical
    low = np.array([0.0, least, least, 0.0, 0.0, 0.0])[used]
    high = np.array([1.0, 0.0, 0.0, np.log(SHARPEST), 1.0, 1.0])[used]
    best = None
    for compute, memory, sharpness in STARTS:
        start = np.array([start_s, np.log(compute), np.log(memory), np.log(sharpness), 0.1, start_s])[used]
        end = least_squares(
            residuals, start, bounds=(low, high), loss="soft_l1", f_scale=ROUNDING, max_nfev=MOST_STEPS, **PRECISE
        )
        if best is None or end.cost < best.cost:
            best = end
    assert best is not None
    return float(best.cost), unpack(spread(best.x))


def _steps(timings: Timings, splits_sums: bool, has_vectors: bool) -> Array:
    """Steps (N) of which each takes the fitted seconds."""
    if timings.summed is None:
        return np.zeros(len(timings))
    steps = np.sqrt(timings.summed) if splits_sums else timings.summed
    return np.where(timings.rows <= VECTOR_ROWS, 0.0, steps) if has_vectors and timings.rows is not None else steps


def cross_fit(timings: Timings, site: npt.NDArray[Any], folds: int = 5, seed: int = 0) -> tuple[Fit, Array]:
    """Fits to all timings; the errors, and the predictions returned (N), are of sites held out in turn."""
    predicted = np.empty(len(timings))
    for held in site_folds(site, folds, seed):
        predicted[held] = fit(timings[~held]).predict(timings[held])
    errors = Errors.of(predicted, timings.seconds)
    return judged(fit(timings), errors), predicted


def judged(fit: Fit, errors: Errors) -> Fit:
    """The fit with the errors it made on timings that were held out."""
    return replace(fit, sigma=errors.sigma, median_error=errors.median, mape=errors.mape, held_out=True)


def site_folds(site: npt.NDArray[Any], folds: int = 5, seed: int = 0) -> list[npt.NDArray[np.bool_]]:
    """Masks (N) that hold out each site's rows together, every row in one of `folds` masks.

    Raises:
        ValueError: If there are fewer sites than folds.
    """
    _, number = np.unique(site, return_inverse=True)
    sites = int(number.max(initial=-1)) + 1
    if sites < folds:
        raise ValueError(f"{folds} folds need as many sites, got {sites}")
    fold = np.random.default_rng(seed).permutation(sites) % folds
    return [fold[number] == index for index in range(folds)]
