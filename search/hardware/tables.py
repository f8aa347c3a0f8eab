"""What `bitplan hardware` prints: the list of targets, everything about one, and several compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from hwmodels.capability import Support
from hwmodels.quantity import SHAKY, Confidence, Quantity, Rate, Unit, quantities
from search.figures.hardware import spread
from search.hardware.compare import bound_shares, describe_tiers, probability
from search.terminal import plain_table
from search.units import NONE, quantity

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hwmodels import CostReport, Device, Network
    from search.hardware.compare import Compared, Listing, Option, Priced

WIDE = 140
"""Width of a terminal from which tables have all their columns, each on one line."""

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))
TINY = ((1e-9, "n"), (1e-12, "p"), (1e-15, "f"))
SYMBOLS: Mapping[Unit, str] = {"byte": "B", "byte/s": "B/s", "op/s": "op/s", "J/byte": "J/B", "1": ""}
SUPPORT_STYLE: Mapping[Support, str] = {"native": "green", "storage": "", "fallback": "yellow", "refused": "red"}
BOUNDS = ("compute", "memory", "overhead", "")


def scaled(value: Quantity, digits: int = 4) -> str:
    """A number with its unit as people read it, such as `1.35 Top/s`; the word unknown where it is not known."""
    if not value.is_known:
        return "unknown"
    if value.unit == "1":
        return f"{value.number:,.4g}" if value.number < 1e4 else f"{value.number:,.0f}"
    if value.unit == "byte":
        return quantity("weight_bytes", value.number)
    size, prefix = next((one for one in (*PREFIXES, *TINY) if value.number >= one[0]), (1.0, ""))
    return f"{value.number / size:.{digits}g} {prefix}{SYMBOLS.get(value.unit, value.unit)}"


def folding_table(title: str, columns: Iterable[str], left: int = 1) -> Table:
    """A plain table that breaks words too long for their column, so that nothing is cut off."""
    table = plain_table(title, columns, left)
    for column in table.columns:
        column.overflow = "fold"
    return table


def best(rate: Rate) -> str:
    """A rate as it is with all threads; a dash where it is not known."""
    found = quantities(rate)[-1]
    return scaled(found, 3) if found.is_known else NONE


def print_listing(listing: Listing, console: Console) -> None:
    """Prints a table of the devices, and one of the other cost models."""
    from rich.text import Text

    is_wide = console.width >= WIDE
    columns = ["name", "class", "latency", *["energy"] * is_wide, "int8 peak", "float peak", "bandwidth", "!"]
    table = folding_table("devices", [*columns, *["what it is"] * is_wide], left=3 + is_wide)
    if is_wide:
        table.columns[-1].justify = "left"
    for device in listing.devices:
        floats = device.float_compute if not device.float_compute.startswith("int") else ""  # integer-only devices
        peaks = [device.compute[name].peak if name in device.compute else None for name in ("int8", floats)]
        table.add_row(
            Text(device.id, style="bold", no_wrap=True),
            device.kind,
            tier_text(device.standing) if device.knows_time else NONE,
            *[device.energy.tier if device.energy.memory.is_known else NONE] * is_wide,
            *(NONE if peak is None else best(peak) for peak in peaks),
            best(device.memory[-1].bandwidth),
            Text(str(len(device.warnings)), style="yellow") if device.warnings else "",
            *[Text(device.name)] * is_wide,
        )
    for name, problem in listing.broken.items():
        table.add_row(
            Text(name, style="bold"), Text("not valid", style="red"), *[""] * (len(columns) - 2), Text(problem)
        )
    console.print(table)
    others = folding_table("other cost models", ["hardware=NAME", "class", "what it is"], left=3)
    for option in listing.options:
        others.add_row(Text(option.name, style="bold"), Text(option.target), Text(option.summary))
    if listing.options:
        console.print(others)
    console.print(
        "latency: the worst tier of its paths, – where it is not known. energy: index where power was not calibrated. "
        "!: warnings. `bitplan hardware show NAME` tells all.",
        style="dim",
        highlight=False,
        markup=False,
    )


def print_option(option: Option, console: Console) -> None:
    """Prints what a cost model that is no device is."""
    console.print(f"{option.name}: {option.target}", style="bold", highlight=False, markup=False)
    if option.summary:
        console.print(option.summary, highlight=False, markup=False)
    for key, value in option.settings.items():
        console.print(f"  hardware.{key}={'' if value is None else value}", highlight=False, markup=False)


def print_device(device: Device, console: Console) -> None:
    """Prints everything a device's file holds."""
    console.print(f"{device.id}: {device.name}", style="bold", highlight=False, markup=False)
    console.print(device.description, highlight=False, markup=False)
    for key in ("kind", "vendor", "runtime"):
        console.print(f"{key}: {getattr(device, key)}", highlight=False, markup=False)
    console.print(f"latency: {device.standing}; energy: {device.energy.tier}")
    print_warnings(device.warnings, console)
    is_wide = console.width >= WIDE
    console.print(_capabilities(device, is_wide))
    console.print(_numbers(device))
    console.print(_calibrations(device, is_wide))
    if device.anchors:
        console.print(_anchors(device))
    total, shaky = len(list(device.leaves())), device.shaky
    unknown = [place for place, value in device.leaves() if not value.is_known]
    console.print(
        f"{len(shaky)} of {total} numbers rest on {', '.join(SHAKY)} sources: {', '.join(shaky) or 'none'}.",
        style="yellow" if shaky else "",
        highlight=False,
        markup=False,
    )
    console.print(f"Not known: {', '.join(unknown) or 'nothing'}.", highlight=False, markup=False)


def print_comparison(compared: Sequence[Compared], network: Network, title: str, console: Console) -> None:
    """Prints a table of policies per target, and one of all targets where there are several.

    Args:
        compared: The targets.
        network: What is run on them.
        title: What it is called.
        console: Where to print.
    """
    macs, weights = (quantity("bit_ops", number) for number in (sum(one.macs for one in network), network.weight_count))
    workload = compared[0].workload
    asked = [f"batch {workload.batch}"]
    asked += [f"{key} {value}" for key in ("tokens", "context") if (value := getattr(workload, key)) is not None]
    console.print(
        f"{title}: {len(network)} layers, {weights} weights, {macs} multiply-accumulates, {', '.join(asked)}",
        style="bold",
        highlight=False,
        markup=False,
    )
    for target in compared:
        console.print(_policies(target, console.width >= WIDE))
        for row in target.rows:
            if row.refusal:
                console.print(f"{row.policy}: {row.refusal}", style="red", highlight=False, markup=False)
        print_warnings(target.warnings, console)
    if len(compared) > 1:
        console.print(_across(compared))
    console.print(
        "[…, …] holds a latency with 80% probability. P: the probability of being faster, by errors that all "
        "operations of a path share; from 16% to 84% it is a tie.",
        style="dim",
        highlight=False,
        markup=False,
    )


def print_warnings(warnings: Sequence[str], console: Console) -> None:
    """Prints what a user must know before believing the numbers."""
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, markup=False)


def tier_text(tier: str) -> Text:
    """A tier, in yellow where latencies are hardly better than guesses."""
    from rich.text import Text

    return Text(tier, style="yellow" if tier == "datasheet" else "")


def _confidence(confidence: Confidence) -> Text:
    from rich.text import Text

    shown = "dim" if confidence == "none" else "yellow" if confidence in SHAKY else "green"
    return Text(confidence if confidence != "none" else "", style=shown)


def _numbers(device: Device) -> Table:
    """Every number with its source, in sections; anchors have a table of their own."""
    from rich.text import Text

    table = folding_table("numbers", ["", "value", "", "source"], left=4)
    table.columns[1].no_wrap = table.columns[2].no_wrap = True
    leaves = [(place.split("."), value) for place, value in device.leaves()]
    for section, rows in groupby(leaves, key=lambda leaf: leaf[0][0] if len(leaf[0]) > 1 else ""):
        if section == "anchors":
            continue
        table.add_section()
        if section:
            table.add_row(Text(section, style="bold"))
        for place, value in rows:
            number = Text(scaled(value), style="" if value.is_known else "dim")
            name = Text(".".join(place[bool(section) :]))
            table.add_row(name, number, _confidence(value.confidence), _source(value))
    return table


def _source(value: Quantity) -> Text:
    from rich.text import Text

    return Text(value.source, style="dim")


def _anchors(device: Device) -> Table:
    """What was published of whole networks on the device."""
    from rich.text import Text

    table = folding_table(
        "published latencies of whole networks", ["network", "precision", "batch", "latency", "source"], left=2
    )
    table.columns[-1].justify = "left"
    for anchor in device.anchors:
        about = Text(anchor.network), Text(anchor.precision), str(anchor.batch)
        table.add_row(*about, Text(scaled(anchor.latency), no_wrap=True), _source(anchor.latency))
    return table


def _calibrations(device: Device, is_wide: bool) -> Table:
    """How near every path comes to the peaks, and what that was fitted to; a narrow table leaves out what it may."""
    from rich.text import Text

    fitted = ("overhead", "compute", "memory", "sharpness") if is_wide else ()
    table = folding_table(
        "calibration", ["path", "tier", *fitted, "sigma", "tile m n k", "held-out error", "fitted to"], left=2
    )
    table.columns[-1].justify = "left"
    for name, path in device.calibration.items():
        held_out = f"{path.holdout_error.number:.1%}" if path.holdout_error is not None else NONE
        digest = path.data.removeprefix("sha256:")[:12]
        data = f"{path.samples} timings, sha256 {digest}" if digest else "nothing"
        numbers = [scaled(getattr(path, key)) for key in (*fitted, "sigma")]
        tile = f"{path.tile.m} {path.tile.n} {path.tile.k}"
        table.add_row(Text(name), tier_text(path.tier), *numbers, tile, held_out, Text(data))
    return table


def _capabilities(device: Device, is_wide: bool) -> Table:
    """What runs how; a narrow table has what is matched in one column, and what runs in another."""
    from rich.text import Text

    title = "capabilities: the first line that matches holds"
    names = ["kinds", "weights", "inputs", "support", "computes in", "held bits", "note"]
    table = folding_table(title, names if is_wide else ["what", "how", "note"], left=len(names))
    for one in device.capabilities:
        patterns = ["any" if found == "*" else " ".join(found) for found in (one.kinds, one.weights, one.inputs)]
        held = [one.held_weight_bits, one.held_input_bits]
        bits = "" if held == [None, None] else " / ".join(NONE if wide is None else str(wide) for wide in held)
        compute = f"{one.compute} ({one.path})" if one.path != one.compute else one.compute
        notes = [one.note, f"kernel {one.kernel}" * bool(one.kernel), "requantizes" * one.requantizes]
        note = Text("; ".join(filter(None, [*notes, f"{one.extra_kernels} kernels more" * bool(one.extra_kernels)])))
        note.stylize("dim")
        support = Text(one.support, style=SUPPORT_STYLE[one.support])
        if is_wide:
            table.add_row(*map(Text, patterns), support, compute or NONE, bits, note)
            continue
        how = Text("\n").join([support, *map(Text, filter(None, (compute, f"held {bits}" * bool(bits))))])
        table.add_row(Text(f"{patterns[0]}\n{patterns[1]}\n/ {patterns[2]}"), how, note, end_section=True)
    return table


def _policies(target: Compared, is_wide: bool) -> Table:
    """What every policy costs on one target; a narrow table breaks intervals off."""
    from rich.text import Text

    def fit(text: str) -> Text:
        return Text(text if is_wide else text.replace(" [", "\n[").replace("/", "/\n").replace(" (", "\n("))

    reports = [row.report for row in target.rows if row.report is not None]
    tiers = reports[0].tiers if reports else {}
    are_mixed = any("," in describe_tiers(report) for report in reports)
    device = target.device
    threads = f", {target.workload.threads} threads" if device is not None and device.threads else ""
    names = ["policy", f"latency ({tiers.get('latency_s', 'not known')})", "vs float (P)"]
    names += [f"energy ({tiers.get('energy_j', 'not known')})", "size", "runs in"]
    names += ["compute/memory/overhead/other %", *["tiers"] * are_mixed]
    title = f"{target.model.name}{f': {device.name}' if device is not None else ''}{threads}"
    table = folding_table(title, [fit(name).plain for name in names])
    for column in table.columns:
        column.no_wrap = column.header not in ("runs in", "tiers")
        column.min_width = 0 if column.no_wrap else 9
    for row in target.rows:
        if row.report is None:
            table.add_row(fit(row.policy), Text("not run", style="red"))
            continue
        faster = f" ({_percent(row.faster)})" if math.isfinite(row.faster) else ""
        table.add_row(
            fit(row.policy),
            fit(_latency(row)),
            fit(f"{row.speedup:.2f}x{faster}" if math.isfinite(row.speedup) else ""),
            quantity("energy_j", row.report.total.energy_j, 2),
            quantity("weight_bytes", row.report.total.weight_bytes),
            _runs(row.report),
            _bounds(row.report),
            *[describe_tiers(row.report)] * are_mixed,
        )
    return table


def _across(compared: Sequence[Compared]) -> Table:
    """Latencies of every policy on every target, with the probability of being faster than on the first."""
    from rich.text import Text

    policies = [row.policy for row in compared[0].rows]
    table = folding_table("latency by target", [f"(P against {compared[0].model.name})", *policies])
    for number, target in enumerate(compared):
        cells = []
        for row, first in zip(target.rows, compared[0].rows, strict=True):
            faster = probability(row, first) if number else math.nan
            time = _latency(row).partition(" [")[0] if row.report is not None else "not run"
            cells.append(Text(time if math.isnan(faster) else f"{time} ({_percent(faster)})"))
        table.add_row(Text(target.model.name), *cells)
    return table


def _latency(row: Priced) -> str:
    """A latency with its interval."""
    assert row.report is not None
    low, high = row.interval or (math.nan, math.nan)
    return spread(row.report.total.latency_s, low, high, row.report.tiers.get("latency_s", ""))


def _runs(report: CostReport) -> str:
    """The types that the layers compute in, with what falls short of a kernel of their own."""
    runs = dict.fromkeys((layer.compute, layer.support) for layer in report.layers.values())
    words = (f"{compute} {support if support != 'native' else ''}".strip() for compute, support in runs)
    return ", ".join(filter(None, words)) or NONE


def _bounds(report: CostReport) -> str:
    """Shares of the latency in layers limited by computing, by memory, by overhead, and of everything else."""
    shares = bound_shares(report)
    return "/".join(f"{100 * shares.get(bound, 0.0):.0f}" for bound in BOUNDS) if shares else NONE


def _percent(probability: float) -> str:
    """A probability, nothing where it is not known."""
    return "" if math.isnan(probability) else f"{probability:.0%}"
