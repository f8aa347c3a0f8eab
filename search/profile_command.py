"""The command `bitplan profile`: times real kernels, and calibrates a device file by them."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from search.errors import ConfigError, DataError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from hwmodels.calibrate import Fit
    from hwmodels.lookup import LookupTable
    from hwmodels.measure.profile import Runtime
    from hwmodels.precision import Precision
    from hwmodels.site import Site

PROFILE_HELP = "time real kernels on this machine, write a lookup table, calibrate a device file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("profile.csv"),
        metavar="TABLE",
        help="table to write, .csv or .parquet; default: profile.csv",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="device the rows are of: a device's name or file, or any name; default: what this machine calls itself",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads of an operation, each on a core of its own; default: 1",
    )
    parser.add_argument("--sites", type=int, metavar="N", help="time only N of the sites, evenly spaced")
    parser.add_argument(
        "--network",
        type=Path,
        metavar="PATH",
        help="time a network's layers: a run directory, network.json or layers.json; default: common shapes",
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        metavar="P",
        help="precisions to time, such as float int8/uint8 int4-g32; default: all that there are kernels for",
    )
    parser.add_argument("--samples", type=int, metavar="N", help="undisturbed runs of each; default: 30")
    parser.add_argument(
        "--accuracy-level",
        type=int,
        choices=(0, 4),
        default=4,
        help="of MatMulNBits: 4 (default) multiplies in int8, 0 in float",
    )
    parser.add_argument(
        "--outputs",
        choices=("integers", "floats"),
        default="integers",
        help="what int8 operations leave: integers (default) as in a chain, floats as before a sum or the end",
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the rows that TABLE has; --no-resume writes it over",
    )
    parser.add_argument(
        "--fit",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="calibrate --device by the table's rows of --threads, write its file; default: NAME.yaml beside the table",
    )
    parser.add_argument(
        "--and",
        type=Path,
        action="append",
        default=[],
        dest="others",
        metavar="TABLE",
        help="a further table to --fit, for the paths that --out has not, such as one of --outputs floats; repeatable",
    )
    parser.add_argument(
        "--passes",
        type=Path,
        metavar="TABLE",
        help="time what stands between layers, and an empty network, into this table as well, unless it is there",
    )
    parser.add_argument("--cuda", action="store_true", help="time torch's kernels on a CUDA device instead")
    parser.set_defaults(command=profile_command)


def profile_command(arguments: argparse.Namespace, console: Console) -> None:
    """Times what is missing from the table, and calibrates the device file where that is asked for.

    Raises:
        ConfigError: If an argument is wrong.
        DataError: If a file is missing, damaged or of something else, or cannot be written.
        UnsupportedError: If this machine or installation cannot time what is asked for.
    """
    from hwmodels.lookup import LookupTable
    from hwmodels.measure.profile import missing, open_table, profile
    from hwmodels.measure.timing import pinned

    device_file = _device_file(arguments)
    samples = 30 if arguments.samples is None else arguments.samples
    if samples < 1:
        raise ConfigError(f"--samples {samples} must be at least 1")
    sites, precisions = _sites(arguments), _precisions(arguments)
    runtime, processor = _runtime(arguments)
    device = Path(arguments.device).stem if arguments.device else processor
    try:
        table = open_table(arguments.out, device, runtime.version, arguments.resume)
        wanted = missing(table, runtime, sites, precisions)
        left = sum(map(len, wanted.values()))
        _print(console, f"{processor}, {runtime.version}, {_counted(runtime.threads, 'thread')}")
        _print(console, f"{len(table.timings)} timings known, {left} to take at {_counted(len(wanted), 'site')}")
        progress = ProfileBar(console) if console.is_terminal else ProfileLines(console)
        try:
            with pinned(runtime.threads):
                table = profile(arguments.out, device, runtime, sites, precisions, samples, notify=progress.step)
        except KeyboardInterrupt:
            _print(console, f"{arguments.out} has what is done; repeat the command to go on")
            raise
        finally:
            progress.close()
        _summarise(table, console)
        untold = sum(map(len, missing(table, runtime, sites, precisions).values()))
        if untold:
            _print(console, f"{untold} could not be told from the noise; repeat the command to try them again")
        _print(console, f"Wrote {arguments.out}")
        if arguments.passes is not None:
            _time_passes(arguments, device, runtime, samples, console)
        if device_file is not None:
            tables = {arguments.out: table} | {path: LookupTable.read(path) for path in arguments.others}
            _fit(tables, device_file, arguments, console)
    except ValueError as error:
        raise DataError(str(error)) from error


class ProfileLines:
    """One line per site, with the time left, for logs and batch systems."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.perf_counter()

    def step(self, done: int, total: int, what: str) -> None:
        """Reports that `done` of `total` sites are done and which one is next."""
        if done < total:
            elapsed = time.perf_counter() - self._started
            _print(
                self._console, f"[{elapsed:6.1f} s] site {done + 1} of {total}{time_left(elapsed, done, total)}: {what}"
            )

    def close(self) -> None:
        """Ends the display."""


class ProfileBar:
    """A live bar with the time left, for terminals."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bars = Progress(*columns, console=console, transient=True)
        self._bar = self._bars.add_task("starting", total=None)
        self._bars.start()

    def step(self, done: int, total: int, what: str) -> None:
        """Reports that `done` of `total` sites are done and which one is next."""
        self._bars.update(self._bar, completed=done, total=total, description=what)

    def close(self) -> None:
        """Ends the display."""
        self._bars.stop()


def time_left(elapsed: float, done: int, total: int) -> str:
    """The time left if the rest takes as long as what is done, in words; empty before anything is."""
    if not done:
        return ""
    seconds = elapsed / done * (total - done)
    return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"


def _device_file(arguments: argparse.Namespace) -> Path | None:
    """The device file to calibrate; None where that is not asked for."""
    from hwmodels.device import FOLDER, load_device

    if arguments.fit is None:
        if arguments.others:
            raise ConfigError("--and names a further table to fit to: give --fit as well")
        return None
    if not arguments.device:
        raise ConfigError("--fit needs --device: the name or file of the device to calibrate")
    try:
        load_device(arguments.device)
    except ValueError as error:
        raise ConfigError(f"--device {arguments.device}: {error}") from error
    path = Path(arguments.device)
    return path if path.suffix in (".yaml", ".yml") else FOLDER / f"{arguments.device}.yaml"


def _sites(arguments: argparse.Namespace) -> tuple[Site, ...]:
    from hwmodels.cost import Workload
    from hwmodels.measure.shapes import TIMED_KINDS, default_sites, network_sites, read_layers, spread

    sites = default_sites()
    if arguments.network is not None:
        path = arguments.network
        if path.is_dir():
            names = ("network.json", "layers.json")
            path = next((path / name for name in names if (path / name).exists()), path / names[0])
        try:
            sites = network_sites(read_layers(path), Workload())
        except ValueError as error:
            raise DataError(str(error)) from error
        if not sites:
            raise DataError(f"{path} has no layer of the kinds that are timed: {', '.join(TIMED_KINDS)}")
    if arguments.sites is None:
        return sites
    try:
        return spread(sites, arguments.sites)
    except ValueError as error:
        raise ConfigError(f"--sites {arguments.sites}: {error}") from error


def _precisions(arguments: argparse.Namespace) -> tuple[Precision, ...]:
    from hwmodels.measure.shapes import CUDA_PRECISIONS, PRECISIONS, parse_precisions

    known = CUDA_PRECISIONS if arguments.cuda else PRECISIONS
    try:
        return parse_precisions(arguments.precisions or known, known)
    except ValueError as error:
        raise ConfigError(f"--precisions: {error}") from error


def _runtime(arguments: argparse.Namespace) -> tuple[Runtime, str]:
    """What to time with, and what it runs on in words."""
    from hwmodels.measure.ort import LAST_CACHE, OrtRuntime
    from hwmodels.measure.profile import cores, last_cache_bytes, processor

    if arguments.cuda:
        from hwmodels.measure.cuda import CudaRuntime

        try:
            runtime = CudaRuntime()
        except ValueError as error:
            raise UnsupportedError(str(error)) from error
        return runtime, runtime.name
    if not 1 <= arguments.threads <= cores():
        raise ConfigError(f"--threads {arguments.threads} must be from 1 to {cores()}, the cores this process may use")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"timing CPU kernels needs {error.name}; install with `pip install 'bitplan[onnxruntime]'`"
        ) from error
    return OrtRuntime(
        arguments.threads,
        last_cache_bytes(LAST_CACHE),
        accuracy_level=arguments.accuracy_level,
        outputs=arguments.outputs,
    ), processor()


def _time_passes(arguments: argparse.Namespace, device: str, runtime: Runtime, samples: int, console: Console) -> None:
    """Times what stands between layers into a table of its own."""
    from hwmodels.measure.ort import OrtRuntime
    from hwmodels.measure.passes import time_passes, write_passes
    from hwmodels.measure.profile import processor
    from hwmodels.measure.timing import pinned

    if not isinstance(runtime, OrtRuntime):
        raise ConfigError("--passes times those of a CPU; leave out --cuda")
    if not (arguments.resume and arguments.passes.is_file()):
        with pinned(runtime.threads):
            passes = time_passes(device, runtime, samples, f"bitplan profile on {processor()}")
        write_passes(arguments.passes, passes)
        _print(console, f"Wrote {arguments.passes}")


def _fit(
    tables: Mapping[Path, LookupTable], device_file: Path, arguments: argparse.Namespace, console: Console
) -> None:
    """Calibrates a device file by the rows of tables that are of the threads asked for."""
    from hwmodels.lookup import LookupTable
    from hwmodels.measure.fit import fit_device
    from hwmodels.measure.passes import read_passes
    from search.files import write_text

    fitted = {}
    for path, table in tables.items():
        rows = tuple(one for one in table.timings if one.threads == (1 if arguments.cuda else arguments.threads))
        if rows:
            source = f"fitted to {path.name}: {table.runtime}, {rows[0].source.split(';')[0]}"
            fitted[source] = LookupTable(rows)
    passes = read_passes(arguments.passes) if arguments.passes is not None else ()
    about = f"fitted to {arguments.passes.name}: {passes[0].runtime}, {passes[0].source}" if passes else ""
    text, fits = fit_device(fitted, device_file, passes, about)
    out = arguments.out.parent / device_file.name if arguments.fit == Path() else arguments.fit
    _print_fits(fits, console)
    _print(console, f"Wrote {write_text(out, text)}")


def _print_fits(fits: Mapping[str, Fit], console: Console) -> None:
    from search.terminal import plain_table
    from search.units import quantity

    table = plain_table(
        "calibrated paths", ["path", "timings", "overhead", "of compute", "of bandwidth", "exponent", "error"]
    )
    for path, fit in fits.items():
        table.add_row(
            path,
            str(fit.samples),
            quantity("latency_s", fit.overhead),
            f"{fit.compute:.2f}",
            f"{fit.memory:.2f}",
            f"{fit.sharpness:.1f}",
            f"{fit.median_error:.0%}",
        )
    console.print(table)
    _print(console, "Errors are the medians at sites that were held out.")


def _summarise(table: LookupTable, console: Console) -> None:
    """Prints how much faster than float each precision was, and what ran as a fallback."""
    import statistics

    from hwmodels.precision import FLOAT_PRECISION
    from search.terminal import plain_table

    rows: dict[tuple[str, str], list[float]] = {}
    for timing in table.timings:
        site = timing.site
        reference = table.find(site, FLOAT_PRECISION, timing.threads)
        if reference is not None and timing.precision != FLOAT_PRECISION:
            kind = "depthwise" if site.is_depthwise else site.kind
            rows.setdefault((kind, str(timing.precision)), []).append(reference.p50_s / timing.p50_s)
    shown = plain_table("times as fast as float", ["kind", "precision", "sites", "least", "median", "most"], left=2)
    for (kind, precision), ratios in rows.items():
        numbers = (min(ratios), statistics.median(ratios), max(ratios))
        shown.add_row(kind, precision, str(len(ratios)), *(f"{ratio:.2f}" for ratio in numbers))
    if rows:
        console.print(shown)
    fallbacks = {(str(timing.precision), timing.kernel) for timing in table.timings if timing.is_fallback}
    for precision, kernel in sorted(fallbacks):
        _print(console, f"fallback: {precision} ran as {kernel}")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
