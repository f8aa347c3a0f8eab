"""Lookup tables: operations timed on a device, one row for each site, precision and number of threads.

A table is exchanged as CSV or Parquet with the columns of `COLUMNS`, all of them and no others. Sizes with several axes
are joined by `x`, such as `3x3`; what an operation does not have is left empty, and so is a clock that is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hwmodels.capability import LAYER_KINDS
from hwmodels.device import closest, listed
from hwmodels.network import Shape
from hwmodels.precision import ALLOWED, INTEGER_BITS, Format, Precision, Side
from hwmodels.site import Site
from hwmodels.table_file import Columns, csv_text, read_rows, write_rows

COLUMNS: Columns = {
    **dict.fromkeys(("device", "runtime", "kind"), str),
    **dict.fromkeys(("batch", "in_channels", "out_channels"), int),
    **{"kernel_size": str, "stride": str, "groups": int, "in_size": str, "out_size": str},
    **{"weight": str, "input": str, "threads": int},
    **{"p20_s": float, "p50_s": float, "p80_s": float, "samples": int},
    **{"kernel": str, "is_fallback": bool, "clock_hz": float, "source": str},
}
"""Columns of a table's file in their order: the fields of `Timing`, of its `Site` and its `Precision`."""

FLOAT_OUTPUTS = ", float outputs"
"""What the runtime of a table ends with whose layers read integers and leave floats: other kernels may run then."""

Key = tuple[Site, Precision, int]
"""What is timed once in a table: site, precision, threads."""


@dataclass(frozen=True)
class Timing:
    """One site at one precision, timed.

    Attributes:
        site: Kind and shape of the operation.
        precision: Formats of its weight and input.
        threads: Threads it ran on; 1 where there are none to choose.
        p20_s: Percentile 20 of the seconds one call took.
        p50_s: Their median, which is what cost models return.
        p80_s: Percentile 80.
        samples: Calls timed.
        kernel: What really ran, as its library calls it; empty where not known.
        is_fallback: Whether that is another kernel than the precision's own.
        device: Id of the device it was timed on.
        runtime: The runtime with its version.
        clock_hz: Clock frequency meanwhile; NaN where not known.
        source: Where the timing comes from.
    """

    site: Site
    precision: Precision
    threads: int
    p20_s: float
    p50_s: float
    p80_s: float
    samples: int
    kernel: str
    is_fallback: bool
    device: str
    runtime: str
    clock_hz: float = math.nan
    source: str = ""

    def __post_init__(self) -> None:
        _check_site(self.site)
        for name in ("p20_s", "p50_s", "p80_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: must be finite and above 0, got {getattr(self, name)}")
        if not self.p20_s <= self.p50_s <= self.p80_s:
            raise ValueError(f"p50_s: must lie between p20_s and p80_s, got {self.p20_s}, {self.p50_s}, {self.p80_s}")
        for name in ("threads", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("device", "runtime"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}: is empty; say what was timed")
        for name in ("device", "runtime", "kernel", "source"):
            if len(getattr(self, name).splitlines()) > 1:
                raise ValueError(f"{name}: must be one line, got {getattr(self, name)!r}")
        if math.isnan(self.clock_hz):
            object.__setattr__(self, "clock_hz", math.nan)  # one NaN for all, so that equal timings compare equal
        elif not 0 < self.clock_hz < math.inf:
            raise ValueError(f"clock_hz: must be finite and above 0, or empty, got {self.clock_hz}")

    @property
    def key(self) -> Key:
        """Site, precision and threads: what a table has once."""
        return self.site, self.precision, self.threads


@dataclass(frozen=True)
class LookupTable:
    """Timings of one device under one runtime, each site, precision and number of threads once.

    Attributes:
        timings: The rows.
    """

    timings: tuple[Timing, ...]

    def __post_init__(self) -> None:
        for name in ("device", "runtime"):
            found = dict.fromkeys(getattr(timing, name) for timing in self.timings)
            if len(found) > 1:
                raise ValueError(f"{name}: a table is of one, got {listed(found)}; keep a table for each")
        seen: set[Key] = set()
        for timing in self.timings:
            if timing.key in seen:
                raise ValueError(f"timed twice: {describe(*timing.key)}")
            seen.add(timing.key)

    @classmethod
    def read(cls, path: str | Path) -> LookupTable:
        """Reads a table that `write` wrote, or another program by the same columns.

        Raises:
            ValueError: If the file cannot be read, or anything in it is not as the columns say; the message names file,
                line (of Parquet the row) and column.
        """
        path = Path(path)
        timings: dict[Key, Timing] = {}
        places: dict[Key, str] = {}
        for place, row in read_rows(path, COLUMNS):
            try:
                timing = _timing(row)
                if timing.key in timings:
                    raise ValueError(f"site, weight, input and threads are those of {places[timing.key]}")
            except ValueError as error:
                raise ValueError(f"{path}, {place}: {error}") from error
            timings[timing.key], places[timing.key] = timing, place
        try:
            return cls(tuple(timings.values()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def write(self, path: str | Path) -> None:
        """Writes the table as CSV or Parquet, by the path's suffix: aside first, then renamed.

        Raises:
            ValueError: If the suffix is another one.
        """
        write_rows(Path(path), COLUMNS, map(_values, self.timings))

    @property
    def digest(self) -> str:
        """Digest of what the table says, `sha256:...`: the same whatever the order of its rows and its file's type."""
        import hashlib

        header, *lines = csv_text(COLUMNS, map(_values, self.timings)).splitlines(keepends=True)
        return f"sha256:{hashlib.sha256(''.join([header, *sorted(lines)]).encode()).hexdigest()}"

    @property
    def device(self) -> str:
        """Id of the device; empty for an empty table."""
        return self.timings[0].device if self.timings else ""

    @property
    def runtime(self) -> str:
        """The runtime with its version; empty for an empty table."""
        return self.timings[0].runtime if self.timings else ""

    def find(self, site: Site, precision: Precision, threads: int) -> Timing | None:
        """The timing of this very site, precision and number of threads; None where there is none."""
        return self._by_key.get((site, precision, threads))

    @cached_property
    def _by_key(self) -> dict[Key, Timing]:
        return {timing.key: timing for timing in self.timings}


def describe(site: Site, precision: Precision, threads: int) -> str:
    """A key in words, for messages."""
    shape = f"{site.in_channels} to {site.out_channels}"
    if site.kernel:
        shape += f", kernel {_joined(site.kernel)}, stride {_joined(site.stride)}, groups {site.groups}"
    if site.in_size:
        shape += f", {_joined(site.in_size)} to {_joined(site.out_size)}"
    return f"{site.kind} of batch {site.batch}, {shape}, at {precision} with threads={threads}"


def _check_site(site: Site) -> None:
    if site.kind not in LAYER_KINDS:
        raise ValueError(f"kind: {site.kind!r} is none{closest(site.kind, LAYER_KINDS)}; kinds: {listed(LAYER_KINDS)}")
    axes = int(site.kind[-2]) if site.kind.startswith("conv") else 0
    shapes = {"kernel_size": site.kernel, "stride": site.stride, "in_size": site.in_size, "out_size": site.out_size}
    for name, shape in shapes.items():
        if len(shape) != axes or min(shape, default=1) < 1:
            wanted = f"{axes} sizes above 0, such as {_joined((3,) * axes)}" if axes else "empty"
            raise ValueError(f"{name}: must be {wanted} for a {site.kind}, got {_joined(shape)!r}")
    for name in ("batch", "in_channels", "out_channels", "groups"):
        if getattr(site, name) < 1:
            raise ValueError(f"{name}: must be at least 1, got {getattr(site, name)}")
    if site.in_channels % site.groups or site.out_channels % site.groups:
        raise ValueError(f"groups: {site.groups} do not divide {site.in_channels} and {site.out_channels} channels")


def _values(timing: Timing) -> tuple[Any, ...]:
    """A timing as the values of its columns."""
    site = timing.site
    return (
        *(timing.device, timing.runtime, site.kind, site.batch, site.in_channels, site.out_channels),
        *(_joined(site.kernel), _joined(site.stride), site.groups, _joined(site.in_size), _joined(site.out_size)),
        *(str(timing.precision.weight), str(timing.precision.input), timing.threads),
        *(float(timing.p20_s), float(timing.p50_s), float(timing.p80_s), timing.samples),
        *(timing.kernel, timing.is_fallback, timing.clock_hz, timing.source),
    )


def _timing(row: Mapping[str, Any]) -> Timing:
    """A timing from the values of its columns."""
    site = Site(
        **{name: row[name] for name in ("kind", "batch", "in_channels", "out_channels", "groups")},
        kernel=_shape(row, "kernel_size"),
        stride=_shape(row, "stride"),
        in_size=_shape(row, "in_size"),
        out_size=_shape(row, "out_size"),
    )
    rest = ("threads", "p20_s", "p50_s", "p80_s", "samples", "kernel", "is_fallback", "device", "runtime")
    return Timing(
        site=site,
        precision=Precision(_format(row, "weight"), _format(row, "input")),
        **{name: row[name] for name in (*rest, "clock_hz", "source")},
    )


def _joined(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _shape(row: Mapping[str, Any], column: str) -> Shape:
    if not re.fullmatch(r"(\d+(x\d+)*)?", row[column]):
        raise ValueError(f"{column}: {row[column]!r} is no size such as 3x3")
    return tuple(int(size) for size in row[column].split("x")) if row[column] else ()


def _format(row: Mapping[str, Any], column: Side) -> Format:
    try:
        format = Format.parse(row[column])
        format.check(column)
    except ValueError as error:
        known = [f"{sign}int{bits}" for bits in INTEGER_BITS for sign in ("", "u")] + re.findall(r"[\w-]+", ALLOWED)
        raise ValueError(f"{column}: {error}{closest(row[column], known)}") from error
    return format
