"""A lookup table from real kernels, site by site; what the file has already is kept, so it can be taken in parts."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from hwmodels.lookup import LookupTable, Timing
from hwmodels.measure.clock import clock_hz
from hwmodels.measure.timing import Prepared, Seconds, measure, rounded
from hwmodels.precision import Precision
from hwmodels.site import Site
from hwmodels.table_file import SUFFIXES

SAMPLES = 30


class Runtime(Protocol):
    """What times operations: kernels of one library on one device."""

    @property
    def version(self) -> str:
        """The runtime with its version."""

    @property
    def threads(self) -> int:
        """Threads of an operation; 1 where there are none to choose."""

    def times(self, site: Site, precision: Precision) -> bool:
        """Whether it has a kernel for this site at this precision."""

    def prepare(self, site: Site, precision: Precision) -> Prepared:
        """Makes ready what runs a site at a precision."""


Notify = Callable[[int, int, str], None]
"""Told how many of how many sites are done, and the last one in words."""


def profile(
    path: str | Path,
    device: str,
    runtime: Runtime,
    sites: Sequence[Site],
    precisions: Sequence[Precision],
    samples: int = SAMPLES,
    is_resumed: bool = True,
    notify: Notify = lambda done, total, what: None,
) -> LookupTable:
    """Times every site at every precision that the runtime has, and writes the table anew after each site.

    The precisions of a site are timed turn by turn. A run that was stopped is taken up where it was: rows that the file
    has are kept and not timed again. What could not be told from the noise has no row; it is tried again the next time.

    Args:
        path: The table, `.csv` or `.parquet`.
        device: Id of the device, as rows are to carry it.
        runtime: What to time with.
        sites: What to time.
        precisions: At which precisions, those that the runtime has for a site.
        samples: Undisturbed runs wanted of each.
        is_resumed: Whether to keep the rows that the file has; otherwise it is written over.
        notify: Told of each site that is done.

    Raises:
        ValueError: If the file is no table or one of another device or runtime, or cannot be written.
    """
    path = Path(path)
    table = open_table(path, device, runtime.version, is_resumed)
    wanted = missing(table, runtime, sites, precisions)
    for number, (site, left) in enumerate(wanted.items()):
        notify(number, len(wanted), name(site))
        candidates = [runtime.prepare(site, precision) for precision in left]
        seconds = measure(candidates, samples)
        clock = clock_hz()
        rows = [
            _timing(site, candidate, found, device, runtime, clock)
            for candidate, found in zip(candidates, seconds, strict=True)
            if found is not None
        ]
        table = LookupTable((*table.timings, *rows))
        _write(table, path)
    notify(len(wanted), len(wanted), "done")
    return table


def missing(
    table: LookupTable, runtime: Runtime, sites: Sequence[Site], precisions: Sequence[Precision]
) -> dict[Site, list[Precision]]:
    """What a table lacks: sites to those of the precisions that the runtime has and the table has not."""
    wanted = {}
    for site in dict.fromkeys(sites):
        left = [
            precision
            for precision in precisions
            if runtime.times(site, precision) and table.find(site, precision, runtime.threads) is None
        ]
        if left:
            wanted[site] = left
    return wanted


def open_table(path: Path, device: str, runtime: str, is_resumed: bool = True) -> LookupTable:
    """The rows that a table is begun with.

    Raises:
        ValueError: If the file is no table, one of another device or runtime, or cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} has the suffix {path.suffix!r}; a table is written as {' or '.join(SUFFIXES)}")
    table = LookupTable.read(path) if is_resumed and path.exists() else LookupTable(())
    for what, found, given in (("device", table.device, device), ("runtime", table.runtime, runtime)):
        if table.timings and found != given:
            raise ValueError(f"{path} is of {what} {found!r}, this would be {given!r}; write to another file")
    _write(table, path)  # now, rather than after the first site
    return table


def _write(table: LookupTable, path: Path) -> None:
    try:
        table.write(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def _timing(site: Site, candidate: Prepared, seconds: Seconds, device: str, runtime: Runtime, clock: float) -> Timing:
    """A row of the table."""
    return Timing(
        site,
        candidate.precision,
        runtime.threads,
        rounded(seconds.p20),
        rounded(seconds.p50),
        rounded(seconds.p80),
        seconds.samples,
        candidate.kernel,
        candidate.is_fallback,
        device,
        runtime.version,
        rounded(clock),
        f"bitplan profile on {processor()}; {candidate.copies} weights in turn",
    )


def name(site: Site) -> str:
    """A site in a few words."""
    kind = "depthwise" if site.is_depthwise else site.kind
    shape = f"{site.in_channels} to {site.out_channels}"
    if not site.kernel:
        return f"{kind} {shape}, {site.batch} row{'s' if site.batch > 1 else ''}"
    kernel, size, stride = ("x".join(map(str, one)) for one in (site.kernel, site.in_size, site.stride))
    return f"{kind} {kernel} {shape} at {size}, stride {stride}"


def processor() -> str:
    """What the system calls this machine's processor, with family and model: several share a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    named = facts.get("model name") or platform.machine()
    numbers = ", ".join(f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts)
    return f"{named} ({numbers})" if numbers else named


def last_cache_bytes(default: float) -> float:
    """Bytes of this machine's last cache, where the system says."""
    try:
        sizes = [
            int(path.read_text(encoding="ascii").strip().removesuffix("K")) << 10
            for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        ]
    except (OSError, ValueError):
        return default
    return max(sizes, default=default)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
