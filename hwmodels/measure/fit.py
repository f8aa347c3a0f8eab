"""From a table of timings to the calibration of a device file: what each path's roofline is fitted to.

Operations and bytes are counted as `hwmodels.roofline` counts them. Weights, inputs and outputs are taken to come from
the memory level that holds everything timed in turn at a site, since between two runs of one precision all others run.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hwmodels.calibrate import Fit, Timings, cross_fit, fit
from hwmodels.calibration_file import calibrate_device
from hwmodels.capability import Capability
from hwmodels.conversion import CONVERTED_BITS
from hwmodels.device import Device, Tile, load_device
from hwmodels.lookup import LookupTable, Timing
from hwmodels.measure.ort import copies
from hwmodels.measure.shapes import weight_bytes
from hwmodels.quantity import rate_at

FOLDS = 5
BEYOND_PEAK = 1.1
"""How far a timing may lie above a peak: clocks differ from minute to minute."""
FEWEST_SITES = 12
"""Sites that a path is fitted to at least: what is left of them when a fold is held out still makes a fit."""
TILES = (
    Tile(),
    *(Tile(1, n, k, "found by fitting") for n, k in ((16, 1), (1, 16), (1, 64), (1, 512), (16, 16), (16, 64))),
)
"""Granularities that are tried: SIMD kernels compute output channels, and sums of bytes, in blocks."""


@dataclass(frozen=True)
class Counted:
    """One timing with what it took: what a fit needs of it.

    Attributes:
        timing: The timing.
        run: How the device runs it.
        traffic: Bytes moved.
        peak: Operations per second of the compute type.
        bandwidth: Bytes per second of the memory level.
    """

    timing: Timing
    run: Capability
    traffic: float
    peak: float
    bandwidth: float

    def operations(self, tile: Tile) -> float:
        """Operations, two per multiply-accumulate, padded to a tile."""
        gemm = self.timing.site.gemm
        n, k = math.ceil(gemm.n / tile.n) * tile.n, math.ceil(gemm.k / tile.k) * tile.k
        return 2.0 * math.ceil(gemm.m / tile.m) * tile.m * n * k * gemm.groups


def count(table: LookupTable, device: Device) -> dict[str, list[Counted]]:
    """The timings of each path of a device, counted.

    Raises:
        ValueError: If the device has no figures for a timing's threads, or refuses its precision, or a timing is faster
            than its peak: then the table is of another device.
    """
    together: dict[tuple[object, int], float] = defaultdict(float)
    last_cache = next((level.capacity.number for level in reversed(device.memory) if level.capacity is not None), 0.0)
    for timing in table.timings:
        run = _run(timing, device)
        each = weight_bytes(timing.site, timing.precision.weight, run)
        held = copies(timing.site, timing.precision, last_cache) * each if device.kind == "cpu" else math.inf
        together[timing.site, timing.threads] += held + _values_bytes(timing, run, device)
    paths: dict[str, list[Counted]] = defaultdict(list)
    for timing in table.timings:
        device.check_threads(timing.threads)
        run = _run(timing, device)
        level = device.level(together[timing.site, timing.threads], timing.threads)
        traffic = weight_bytes(timing.site, timing.precision.weight, run) + _values_bytes(timing, run, device)
        peak, bandwidth = device.peak(run.compute, timing.threads), rate_at(level.bandwidth, timing.threads)
        _check_peak(timing, run, peak, device)
        paths[run.path].append(Counted(timing, run, traffic, peak, bandwidth))
    return dict(paths)


def fit_paths(table: LookupTable, device: Device) -> dict[str, Fit]:
    """Fits the calibrated roofline of every path that has enough timings, its errors on sites held out in turn.

    Of `TILES` the one that fits best is taken.
    """
    fits = {}
    for path, rows in count(table, device).items():
        sites = list(dict.fromkeys(row.timing.site for row in rows))
        if len(sites) >= FEWEST_SITES:
            tile = min(_different(rows), key=lambda tile: fit(_timings(rows, tile)).mape)
            numbers = np.array([sites.index(row.timing.site) for row in rows])
            fits[path] = replace(cross_fit(_timings(rows, tile), numbers, FOLDS)[0], tile=tile)
    return fits


def _different(rows: list[Counted]) -> list[Tile]:
    """The tiles that make a difference to some of the rows, the smallest of those that make the same."""
    known: dict[tuple[float, ...], Tile] = {}
    for tile in TILES:
        known.setdefault(tuple(row.operations(tile) for row in rows), tile)
    return list(known.values())


def _timings(rows: list[Counted], tile: Tile) -> Timings:
    """What a path is fitted to; rates of different threads are brought to one by counting in seconds at the peak."""
    return Timings(
        operations=np.array([row.operations(tile) / row.peak for row in rows]),
        traffic=np.array([row.traffic for row in rows]),
        seconds=np.array([row.timing.p50_s for row in rows]),
        peak=1.0,
        bandwidth=np.array([row.bandwidth for row in rows]),
    )


def fit_device(table: LookupTable, path: Path, source: str) -> tuple[str, Mapping[str, Fit]]:
    """The text of a device file with its paths calibrated by a table, and the fits.

    Args:
        table: The timings.
        path: The device file.
        source: Where the timings come from, in words.

    Raises:
        ValueError: If the file is not valid, or no path has enough timings.
    """
    device = load_device(path)
    fits = fit_paths(table, device)
    if not fits:
        raise ValueError(f"no path of {path} has the {FEWEST_SITES} sites that a fit takes; time more")
    return calibrate_device(path, fits, table.digest, source), fits


def _run(timing: Timing, device: Device) -> Capability:
    """How the device runs what was timed."""
    run = device.capability(timing.site.kind, timing.precision, timing.site.is_depthwise)
    if run.support == "refused":
        raise ValueError(
            f"device {device.id} refuses {timing.site.kind} at {timing.precision}, which was timed: {run.note}"
        )
    return run


def _check_peak(timing: Timing, run: Capability, peak: float, device: Device) -> None:
    rate = 2 * timing.site.macs / timing.p50_s
    if rate > BEYOND_PEAK * peak:
        raise ValueError(
            f"{timing.site.kind} at {timing.precision} was timed at {rate:.3g} op/s, beyond the peak "
            f"of {run.compute} on {device.id}, {peak:.3g} op/s: the table is of another device, or the peak is wrong"
        )


def _values_bytes(timing: Timing, run: Capability, device: Device) -> float:
    """Bytes of what is read and written: an integer kernel was timed as within a chain, leaving integers."""
    site = timing.site
    output_bits = CONVERTED_BITS if run.requantizes else device.float_bits
    return (site.input_values * run.input_width(timing.precision) + site.output_values * output_bits) / 8
