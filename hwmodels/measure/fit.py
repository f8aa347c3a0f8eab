"""From a table of timings to the calibration of a device file: what each path's roofline is fitted to.

Operations and bytes are counted as `hwmodels.roofline` counts them. Weights, inputs and outputs are taken to come from
the memory level that holds everything timed in turn at a site, since between two runs of one precision all others run.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hwmodels.calibrate import Fit, Timings, cross_fit, fit
from hwmodels.calibration_file import calibrate_device
from hwmodels.capability import Capability
from hwmodels.conversion import CONVERTED_BITS
from hwmodels.device import Device, Tile, load_device
from hwmodels.lookup import FLOAT_OUTPUTS, LookupTable, Timing
from hwmodels.measure.ort import copies
from hwmodels.measure.passes import Pass, digest, fit_passes, launch_s
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
    *(
        Tile(m, n, k, "found by fitting")
        for m, n, k in ((16, 1, 1), (16, 16, 16), (64, 1, 1), (128, 1, 1), (256, 1, 1))
    ),
)
"""Granularities that are tried: SIMD kernels compute output channels, and sums of bytes, in blocks; and kernels that
take rows in blocks, or start anew for each group of a convolution, take as long for a few rows as for more."""


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


def fit_device(
    tables: Mapping[str, LookupTable], path: Path, passes: Sequence[Pass] = (), passes_source: str = ""
) -> tuple[str, Mapping[str, Fit]]:
    """The text of a device file with its paths calibrated by tables, and the fits.

    Args:
        tables: Source of the timings, in words, to the timings; a path is fitted to the first table that has enough.
        path: The device file.
        passes: Timings of what stands between layers: the path of the device's float type, which that is charged by,
            is fitted to them, and the launch of a network taken from them.
        passes_source: Their source, in words.

    Raises:
        ValueError: If the file is not valid, or no path has enough timings.
    """
    device, text = load_device(path), path.read_text(encoding="utf-8")
    found: dict[str, Fit] = {}
    for source, table in tables.items():
        fits = {name: one for name, one in fit_paths(table, device).items() if name not in found}
        found |= fits
        text = calibrate_device(text, fits, table.digest, source)
    if not found:
        raise ValueError(f"no path of {path} has the {FEWEST_SITES} sites that a fit takes; time more")
    if passes:
        found[device.float_compute] = between = fit_passes(passes, device)
        text = calibrate_device(text, {device.float_compute: between}, digest(passes), passes_source)
        text = with_launch(text, launch_s(passes), passes_source)
    return text, found


def with_launch(text: str, seconds: float, source: str) -> str:
    """The text of a device file with another launch of a network."""
    quoted = json.dumps(f"measured, a network that hands on its input: {source}", ensure_ascii=False)
    line = f"launch: {{value: {seconds * 1e6:.2f}e-6, unit: s, source: {quoted}, confidence: measured}}"
    return re.sub(r"(?m)^launch: .*$", lambda _: line, text)


def leaves_floats(timing: Timing) -> bool:
    """Whether a timing is of an operation that leaves floats, whatever it reads."""
    return timing.runtime.endswith(FLOAT_OUTPUTS)


def _run(timing: Timing, device: Device) -> Capability:
    """How the device runs what was timed."""
    site = timing.site
    run = device.capability(site.kind, timing.precision, site.is_depthwise, leaves_floats(timing))
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
    """Bytes of what is read and written: an integer kernel was timed leaving integers unless the table says floats."""
    site = timing.site
    output_bits = CONVERTED_BITS if run.requantizes and not leaves_floats(timing) else device.float_bits
    return (site.input_values * run.input_width(timing.precision) + site.output_values * output_bits) / 8
