"""What a CPU's runtime takes for passes over tensors, and for running a network at all: what stands between layers.

Copies of one pass read one tensor, as those of a layer do in `hwmodels.measure.ort`; the tensors are small enough to be
in a cache, as within a network that runs layer by layer. The table they go into has the columns of `COLUMNS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels.calibrate import Fit, Timings, cross_fit
from hwmodels.device import Device
from hwmodels.measure.graphs import X_SCALE, X_ZERO, Drawer, Graph
from hwmodels.measure.ort import OrtRuntime
from hwmodels.measure.timing import Prepared, Seconds, measure, rounded
from hwmodels.precision import FLOAT_PRECISION
from hwmodels.quantity import rate_at
from hwmodels.table_file import Columns, csv_text, read_rows, write_rows

COLUMNS: Columns = {
    **{"device": str, "runtime": str, "operation": str, "values": int, "traffic": int, "threads": int},
    **{"p20_s": float, "p50_s": float, "p80_s": float, "samples": int, "source": str},
}
"""Columns of the table: the fields of `Pass`."""

OPERATIONS = {"QuantizeLinear": 5, "DequantizeLinear": 5, "Add": 12, "Mul": 8, "Transpose": 2}
"""Passes that are timed to the bytes they move per value: `Transpose` of integers, `Mul` by a single number."""
OF_INTEGERS, LEAVE_INTEGERS = ("DequantizeLinear", "Transpose"), ("QuantizeLinear", "Transpose")
ATTRIBUTES: dict[str, dict[str, Any]] = {"Transpose": {"perm": [0, 2, 1]}}
CHANNELS = 16
LAUNCH = "launch"
"""What running a network that does nothing is called in the table."""
SIZES = (64, 512, 2048, 6272, 12544, 25088, 50176, 100352)
"""Values of the tensors: from the last layers of small networks to the first of larger ones."""
COPIES = 16


@dataclass(frozen=True)
class Pass:
    """One pass over a tensor, timed.

    Attributes:
        device: Id of the device.
        runtime: The runtime with its version.
        operation: One of `OPERATIONS`, or `LAUNCH`.
        values: Values of the tensor.
        traffic: Bytes read and written.
        threads: Threads it ran on.
        p20_s: Percentile 20 of the seconds one pass took.
        p50_s: Their median.
        p80_s: Percentile 80.
        samples: Runs timed.
        source: Where the timing comes from.
    """

    device: str
    runtime: str
    operation: str
    values: int
    traffic: int
    threads: int
    p20_s: float
    p50_s: float
    p80_s: float
    samples: int
    source: str


def read_passes(path: Path) -> tuple[Pass, ...]:
    """Reads a table of passes.

    Raises:
        ValueError: If the file cannot be read or has other columns.
    """
    return tuple(Pass(**row) for _, row in read_rows(path, COLUMNS))


def write_passes(path: Path, passes: Sequence[Pass]) -> None:
    """Writes a table of passes, aside first, then renamed."""
    write_rows(path, COLUMNS, map(_row, passes))


def time_passes(device: str, runtime: OrtRuntime, samples: int, source: str) -> tuple[Pass, ...]:
    """Times every pass at every size, and what running nothing takes; what drowns in noise is left out."""
    found = []

    def note(operation: str, values: int, traffic: int, seconds: Seconds) -> None:
        quantiles = rounded(seconds.p20), rounded(seconds.p50), rounded(seconds.p80)
        about = device, runtime.version, operation, values, traffic, runtime.threads
        found.append(Pass(*about, *quantiles, seconds.samples, source))

    for values in SIZES:
        candidates = [_prepare(runtime, operation, values) for operation in OPERATIONS]
        for operation, seconds in zip(OPERATIONS, measure(candidates, samples), strict=True):
            if seconds is not None:
                note(operation, values, OPERATIONS[operation] * values, seconds)
    (nothing,) = measure([Prepared(FLOAT_PRECISION, LAUNCH, False, runtime.runner(draw_nothing()))], samples)
    if nothing is not None:
        note(LAUNCH, 1, 8, nothing)
    return tuple(found)


def fit_passes(passes: Sequence[Pass], device: Device) -> Fit:
    """Fits overhead and share of the bandwidth of what moves bytes alone; its errors are of sizes held out in turn."""
    rows = [one for one in passes if one.operation != LAUNCH]
    levels = [device.level(COPIES * one.traffic, one.threads) for one in rows]
    bandwidth = [rate_at(level.bandwidth, one.threads) for level, one in zip(levels, rows, strict=True)]
    timings = Timings(
        operations=np.zeros(len(rows)),
        traffic=np.array([float(one.traffic) for one in rows]),
        seconds=np.array([one.p50_s for one in rows]),
        peak=1.0,
        bandwidth=np.array(bandwidth),
    )
    found, _ = cross_fit(timings, np.array([one.values for one in rows]))
    return replace(found, compute=1.0, sharpness=1.0)  # nothing is computed: these say nothing


def digest(passes: Sequence[Pass]) -> str:
    """Digest of what a table of passes says, `sha256:...`, as `LookupTable.digest` is one."""
    header, *lines = csv_text(COLUMNS, map(_row, passes)).splitlines(keepends=True)
    return f"sha256:{hashlib.sha256(''.join([header, *sorted(lines)]).encode()).hexdigest()}"


def launch_s(passes: Sequence[Pass]) -> float:
    """Seconds that running a network takes besides its operations."""
    return next(one.p50_s for one in passes if one.operation == LAUNCH)


def draw(operation: str, values: int, count: int = COPIES) -> Graph:
    """Draws a graph of `count` copies of a pass over `values` values, and behind each what reads one of them."""
    drawer, shape = Drawer(), (1, CHANNELS, values // CHANNELS)
    for number in range(count):
        inputs = ["x", *_operands(drawer, operation, shape, number)]
        drawer.node(operation, inputs, f"y{number}", **ATTRIBUTES.get(operation, {}))
    feed = drawer.codes(shape) if operation in OF_INTEGERS else drawer.normal(shape)
    return _with_tails(drawer, [f"y{number}" for number in range(count)], feed, operation not in LEAVE_INTEGERS)


def draw_frame(operation: str, values: int, count: int = COPIES) -> Graph:
    """Draws what stands around the copies, without them."""
    drawer, shape = Drawer(), (1, CHANNELS, values // CHANNELS)
    feed = drawer.codes(shape) if operation in LEAVE_INTEGERS else drawer.normal(shape)
    return _with_tails(drawer, ["x"] * count, feed, operation not in LEAVE_INTEGERS)


def draw_nothing() -> Graph:
    """Draws a network that hands on its input."""
    drawer = Drawer()
    drawer.node("Identity", ["x"], "y")
    return drawer.model(["y"], drawer.normal((1, 1)))


def _row(one: Pass) -> tuple[Any, ...]:
    return tuple(getattr(one, name) for name in COLUMNS)


def _operands(drawer: Drawer, operation: str, shape: tuple[int, ...], number: int) -> list[str]:
    """What a copy reads besides the tensor."""
    if operation in ("QuantizeLinear", "DequantizeLinear"):
        return [drawer.constant(f"scale{number}", X_SCALE), drawer.constant(f"zero{number}", X_ZERO)]
    if operation == "Transpose":
        return []
    other = drawer.normal(shape) if operation == "Add" else np.float32(1.5)
    return [drawer.constant(f"other{number}", other)]


def _with_tails(drawer: Drawer, outputs: Sequence[str], feed: np.ndarray, is_float: bool) -> Graph:
    for number, output in enumerate(outputs):
        first = drawer.constant(f"first{number}", np.array([0, 0, 0]))
        behind = drawer.constant(f"behind{number}", np.array([1, 1, 1]))
        drawer.node("Slice", [output, first, behind], f"tail{number}")
    drawer.node("Concat", [f"tail{number}" for number in range(len(outputs))], "y", axis=1)
    return drawer.model(["y"], feed, is_float)


def _prepare(runtime: OrtRuntime, operation: str, values: int) -> Prepared:
    """Copies of a pass with the frame around them, neither optimised, which would merge the copies."""
    whole, frame = (runtime.runner(one(operation, values), is_optimized=False) for one in (draw, draw_frame))
    return Prepared(FLOAT_PRECISION, operation, False, whole, frame, COPIES)
