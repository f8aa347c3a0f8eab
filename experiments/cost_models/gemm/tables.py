"""Tables of measured matrix products: what their columns mean, and the peaks of the device they were timed on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hwmodels.calibrate import Array, Timings, gemm_timings
from hwmodels.device import Device, list_devices, listed, load_device, read_yaml
from hwmodels.quantity import rate_at

COLUMNS = ("gemm_dtype", "m", "n", "k", "latency")
FLOAT_PATHS = ("bfloat16", "float16")
BUFFERS = 6
"""Sets of weights that the tables' collector runs through in turn: what a cache holds of each other call's weights."""


@dataclass(frozen=True)
class Recipe:
    """What one `gemm_dtype` computes and moves.

    Attributes:
        compute: Compute type that the multiplications run in.
        weight_bits: Bits per weight, scales included.
        input_bits: Bits per input that the kernel reads, scales included.
        conversion_bits: Bits moved per input to quantize it, where the timing includes that: the float input is read,
            the quantized one written.
        path: Key of the calibration in a device file.
    """

    compute: str
    weight_bits: float
    input_bits: float
    conversion_bits: float = 0.0
    path: str = ""


PATHS: dict[str, Recipe] = {
    "bfloat16": Recipe("bf16", 16, 16, path="bf16_gemm"),
    "float16": Recipe("fp16", 16, 16, path="fp16_gemm"),
    "sq": Recipe("int8", 8, 8, path="sq"),
    "int8_wo": Recipe("bf16", 8, 16, path="int8_wo"),
    "int4_wo": Recipe("bf16", 4, 16, path="int4_wo"),
    "fp8": Recipe("fp8", 8, 8, 16 + 8, path="fp8"),
    "fp8_static": Recipe("fp8", 8, 8, path="fp8_static"),
    "fp8_ootb": Recipe("fp8", 8, 8, path="fp8_ootb"),
    "fp8_block": Recipe("fp8", 8 + 32 / 128**2, 8 + 32 / 128, 16 + 8 + 32 / 128, path="fp8_block"),
    "nvfp4": Recipe("fp4", 4.5, 4.5, 16 + 4.5, path="nvfp4"),  # e4m3 scales of blocks of 16
}
"""Formats of the tables. fp8, fp8_block and nvfp4 are timed with the pass that quantizes their float input.

The path of a device's float type prices convolutions and what stands between layers; matrix products have another."""
OUTPUT_BITS = 16


@dataclass(frozen=True)
class Peaks:
    """What the device reaches on paper.

    Attributes:
        name: Where the numbers are from: a device, a file, or the table itself.
        compute: Compute type to operations per second, dense.
        bandwidth: Bytes per second of the main memory.
    """

    name: str
    compute: Mapping[str, float]
    bandwidth: float

    @classmethod
    def of_device(cls, device: Device) -> Peaks:
        """The peaks of a device file."""
        compute = {name: rate_at(peak.peak, 1) for name, peak in device.compute.items()}
        return cls(device.id, _with_fp16(compute), rate_at(device.memory[-1].bandwidth, 1))

    @classmethod
    def of_file(cls, path: Path) -> Peaks:
        """The peaks of a YAML file: a whole device, or just `compute: {bf16: 312e12, ...}` and `bandwidth: 2e12`.

        Raises:
            ValueError: If it is neither.
        """
        content = read_yaml(path)
        if isinstance(content, dict) and "schema" in content:
            return cls.of_device(load_device(path))
        try:
            compute = {str(name): float(value) for name, value in content["compute"].items()}
            return cls(path.name, _with_fp16(compute), float(content["bandwidth"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} must be a device file, or give compute (a mapping of compute types to operations per second) "
                f"and bandwidth (bytes per second): {error!r}"
            ) from error


def _with_fp16(compute: Mapping[str, float]) -> dict[str, float]:
    """Tensor cores multiply both 16-bit floats at one rate: each stands in for the other where one is not given."""
    known = {name: value for name, value in compute.items() if math.isfinite(value)}
    sixteen = known.get("bf16", known.get("fp16"))
    return known if sixteen is None else {"bf16": sixteen, "fp16": sixteen} | known


@dataclass(frozen=True)
class Table:
    """One measured table.

    Attributes:
        name: Stem of its file.
        digest: `sha256:...` of the file.
        rows: Columns `gemm_dtype, m, n, k, seconds, site`, a row per shape and format.
        peaks: Of the device.
        device: The shipped device that it was timed on, None where there is none.
        skipped: Formats that nothing is known about.
    """

    name: str
    digest: str
    rows: pd.DataFrame
    peaks: Peaks
    device: str | None = None
    skipped: tuple[str, ...] = ()

    @property
    def formats(self) -> list[str]:
        """Formats in the order of `PATHS`."""
        return [name for name in PATHS if (self.rows["gemm_dtype"] == name).any()]

    def of(self, name: str) -> pd.DataFrame:
        """Rows of one format."""
        return self.rows[self.rows["gemm_dtype"] == name].reset_index(drop=True)


def table_files(folder: Path) -> list[Path]:
    """The tables of a folder, `*.parquet`, or the one that is given.

    Raises:
        ValueError: If there is none.
    """
    files = [folder] if folder.suffix == ".parquet" else sorted(folder.glob("*.parquet"))
    if not files:
        raise ValueError(f"{folder} has no *.parquet")
    return files


def read_table(file: Path, peaks: Path | None = None) -> Table:
    """Reads one table.

    Several kernels that were timed for one shape and format count as the fastest of them, which is what a runtime that
    tunes itself would run.

    Args:
        file: The table.
        peaks: YAML file with the device's peaks, where the package does not know it or other numbers are wanted.

    Raises:
        ValueError: If a column is missing, or no format is known.
    """
    frame = pd.read_parquet(file)
    missing = [name for name in COLUMNS if name not in frame]
    if missing:
        raise ValueError(f"{file} has no column {missing[0]}; a table has {listed(COLUMNS)}, got {listed(frame)}")
    frame = frame[frame["latency"] > 0]
    rows = frame.groupby(["gemm_dtype", "m", "n", "k"], as_index=False)["latency"].min()
    skipped = tuple(sorted(set(rows["gemm_dtype"]) - set(PATHS)))
    rows = rows[rows["gemm_dtype"].isin(list(PATHS))].reset_index(drop=True)
    if rows.empty:
        raise ValueError(f"{file} has only formats that are not known: {listed(skipped)}; known: {listed(PATHS)}")
    rows["seconds"] = rows["latency"] / 1e3
    rows["site"] = rows.groupby(["n", "k"]).ngroup()
    digest = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    names = " ".join([file.stem, *map(str, frame["device"].unique() if "device" in frame else ())])
    device = known_device(names)
    return Table(file.stem, digest, rows, _peaks(device, rows, peaks), device, skipped)


def _peaks(device: str | None, rows: pd.DataFrame, given: Path | None) -> Peaks:
    """Peaks given, else those of the device, else the best rates of the table itself."""
    if given is not None:
        found = Peaks.of_file(given)
    elif device is not None:
        found = Peaks.of_device(load_device(device))
    else:
        return observed_peaks(rows)
    if not math.isfinite(found.bandwidth):
        found = Peaks(f"{found.name}, bandwidth from the table", found.compute, observed_peaks(rows).bandwidth)
    wanted = {PATHS[name].compute for name in rows["gemm_dtype"].unique()}
    absent = sorted(wanted - set(found.compute))
    if not absent:
        return found
    observed = observed_peaks(rows)
    lacking = {name: observed.compute[name] for name in absent}
    return Peaks(f"{found.name}, {listed(lacking)} from the table", {**found.compute, **lacking}, found.bandwidth)


def known_device(names: str) -> str | None:
    """The shipped device that a table is named after: each part of its name, or all but the memory, occurs there."""
    words = set(names.lower().replace("_", " ").replace("-", " ").split())

    def parts(device: str) -> list[str]:
        return [part for part in device.split("_") if not part.removesuffix("gb").isdigit()]

    fitting = [device for device in list_devices() if set(parts(device)) <= words]
    return max(fitting, key=lambda device: len(parts(device)), default=None)


def observed_peaks(rows: pd.DataFrame) -> Peaks:
    """The best rates among a table's own timings: below a datasheet's, and all there is for an unknown device."""
    compute: dict[str, float] = {}
    bandwidth = 0.0
    for name, path in PATHS.items():
        mine = rows[rows["gemm_dtype"] == name]
        if len(mine):
            size = mine["m"].to_numpy(float), mine["n"].to_numpy(float), mine["k"].to_numpy(float)
            seconds = mine["seconds"].to_numpy(float)
            best = float((2 * size[0] * size[1] * size[2] / seconds).max())
            compute[path.compute] = max(best, compute.get(path.compute, 0.0))
            large = size[1] * size[2] * path.weight_bits / 8 > 0.5e9  # no cache holds these
            if large.any():
                bandwidth = max(bandwidth, float((_traffic(size, path) / seconds)[large].max()))
    if not bandwidth:
        raise ValueError("the device is not known and the table has no weight above 0.5 GB to see its bandwidth by")
    return Peaks("best rates of the table", compute, bandwidth)


def _traffic(size: tuple[Array, Array, Array], path: Recipe) -> Array:
    m, n, k = size
    inputs = path.input_bits + path.conversion_bits
    return np.asarray((n * k * path.weight_bits + m * k * inputs + m * n * OUTPUT_BITS) / 8)


@dataclass(frozen=True)
class Cache:
    """A cache that benchmarks run from: how many bytes it holds, and how much faster than the main memory it is."""

    capacity: float
    speed: float

    def holds(self, rows: pd.DataFrame, path: Recipe) -> Array:
        """Mask (N) of the shapes whose weights, `BUFFERS` times, stay there with inputs and outputs."""
        m, n, k = (rows[name].to_numpy(float) for name in ("m", "n", "k"))
        weights = n * k * path.weight_bits / 8
        return np.asarray((BUFFERS - 1) * weights + _traffic((m, n, k), path) <= self.capacity)


def timings_of(table: Table, name: str, cache: Cache | None = None) -> Timings:
    """The timings of one format; those that ran from a cache see its bandwidth."""
    rows, path = table.of(name), PATHS[name]
    bandwidth: float | Array = table.peaks.bandwidth
    if cache is not None:
        bandwidth = np.where(cache.holds(rows, path), bandwidth * cache.speed, bandwidth)
    return gemm_timings(
        rows["m"].to_numpy(float),
        rows["n"].to_numpy(float),
        rows["k"].to_numpy(float),
        rows["seconds"].to_numpy(float),
        weight_bits=path.weight_bits,
        input_bits=path.input_bits + path.conversion_bits,
        output_bits=OUTPUT_BITS,
        peak=table.peaks.compute[path.compute],
        bandwidth=bandwidth,
    )
