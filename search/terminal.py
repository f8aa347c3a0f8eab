"""What the command line prints: tables of the front, of exports and of verifications."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from search.budget import budget_words
from search.units import COST_NAMES, interval, quantity, significant

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from search.answers import Resolved
    from search.backends.outcome import ExportReport, Validation, Verification
    from search.backends.realize import Realized
    from search.job import Result
    from search.plan import Plan

VERDICT_STYLE = {"met": "green", "missed": "red", "undecided": "yellow"}

PAGE = 160
"""Columns of output that goes to a file."""


def make_console() -> Console:
    """The terminal, or a page wide enough for the tables where output goes to a file.

    What it prints is taken as it is: names of the user's may look like rich's markup.
    """
    from rich.console import Console

    found = Console(markup=False, emoji=False)
    return found if found.file.isatty() else Console(width=PAGE, markup=False, emoji=False)


def print_table(table: Table, console: Console) -> None:
    """Prints a table as wide as it is; where the terminal is narrower, its cells row by row, none left out."""
    from rich.measure import Measurement

    from search.progress import packed

    width = Measurement.get(console, console.options.update(width=10_000), table).maximum
    if width <= console.width or not console.file.isatty():
        console.print(table, width=max(width, console.width), crop=False)
        return
    headers = [f"{column.header}" for column in table.columns]
    console.print(f"\n{table.title}", style=table.title_style, highlight=False, soft_wrap=True)
    for row, cells in zip(table.rows, zip(*(column.cells for column in table.columns), strict=True), strict=True):
        told = [f"{name} {cell}".strip() for name, cell in zip(headers[1:], cells[1:], strict=True) if cell]
        console.print(f"{cells[0]}", style=row.style, highlight=False)
        for line in packed(told, console.width - 2):
            console.print(f"  {line}", style=row.style, highlight=False)
    console.print()


def plain_table(title: str, columns: Iterable[str], left: int = 1) -> Table:
    """An empty table whose first `left` columns are aligned left."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right")
    return table


SHOWN = ("average_weight_bits", "effective_bits", "weight_bytes", "latency_s", "energy_j")
"""Costs with columns of their own, whatever the front is about."""


def front_table(front: pd.DataFrame, plan: Plan, costs: Sequence[str] = ()) -> Table:
    """The front beside the float network and the uniform baselines, with a column for each further cost it is about."""
    from rich.text import Text

    further = [cost for cost in costs if cost not in SHOWN]
    tiers = {name: cost.tier for name, cost in plan.cost.items()}
    table = plain_table(
        f"{plan.task} on {plan.hardware}: {plan.quality.metric} on the report split ({plan.quality.samples} samples)",
        [
            "plan",
            plan.quality.metric,
            "drop vs float [95%]",
            "bits",
            "effective",
            "size",
            f"latency ({tiers['latency_s']})",
            f"energy ({tiers['energy_j']})",
            *(COST_NAMES[cost] for cost in further),
            "budget",
        ],
    )
    for row in front.to_dict("records"):
        style = "bold" if row["role"] == "winner" else ("dim" if row["role"] in ("float", "uniform") else "")
        verdict = Text(row["verdict"], style=VERDICT_STYLE[row["verdict"]])
        table.add_row(
            f"{row['name']}{' ← winner' if row['role'] == 'winner' else ''}",
            f"{row['quality']:.4f}",
            interval(row["drop"], row["drop_low"], row["drop_high"], signed=True) if row["role"] != "float" else "",
            f"{row['average_weight_bits']:.2f}",
            f"{row['effective_bits']:.2f}",
            f"{quantity('weight_bytes', row['weight_bytes'])} ({row['size_ratio']:.3f}x)",
            quantity("latency_s", row["latency_s"]),
            quantity("energy_j", row["energy_j"]),
            *(quantity(cost, row[cost]) for cost in further),
            verdict,
            style=style,
        )
    return table


def print_result(result: Result, console: Console) -> None:
    """Prints what a search found and which files it wrote."""
    from rich.text import Text

    plan, run = result.plan, result.run
    costs = run.info().get("front_costs", [])
    print_table(front_table(result.front, plan, costs if len(costs) > 1 else ()), console)
    budget = budget_words(plan.budget.limits, plan.budget.reference)
    style, quality = VERDICT_STYLE[plan.budget.verdict], plan.quality
    drop = interval(quality.drop, quality.drop_low, quality.drop_high, signed=True)
    size = quantity("weight_bytes", plan.cost["weight_bytes"].value)
    told = (
        f" by plan {plan.digest}: {quality.metric} {quality.value:.4f} (float {quality.float_value:.4f}, drop {drop}) "
        f"at {plan.average_weight_bits:.2f} bits per weight, {size}"
    )
    verdict = (plan.budget.verdict, f"{style} bold")
    console.print(Text.assemble(f"Budget ({budget}): ", verdict, told), soft_wrap=True)
    if quality.drop_low is None:
        console.print("The task gives one number per evaluation, so drops have no interval.", highlight=False)
    correlation = run.info().get("rank_correlation")
    if correlation is not None:
        low = " (low: trust the measurements, not the prediction)" if correlation < 0.5 else ""
        console.print(f"Rank correlation of predicted loss and measured drop: {correlation:.2f}{low}", highlight=False)
    found = run.info().get("rank_correlations", {})
    if found:
        each = "; ".join(f"{name} {each['spearman']:.2f}, {each['kendall']:.2f}" for name, each in found.items())
        console.print(f"Spearman, Kendall of every predictor: {each}", highlight=False, soft_wrap=True)
    latency = plan.cost["latency_s"]
    if latency.low is not None:
        console.print(
            f"Latency {quantity('latency_s', latency.value)}, with 80% probability between "
            f"{quantity('latency_s', latency.low)} and {quantity('latency_s', latency.high)} ({latency.tier})",
            highlight=False,
            soft_wrap=True,
        )
    for caution in plan.cautions:
        console.print(f"Mind: {caution}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    console.print(f"Costs: {plan.cost_source}", style="dim", highlight=False, soft_wrap=True)
    names = (
        "plan.json",
        "plan.safetensors",
        "report.html",
        "figures",
        "front.csv",
        "history.csv",
        "trials.jsonl",
        "layers.json",
    )
    written = [name for name in names if run.file(name).exists()]
    console.print(f"Wrote {run.path}: {', '.join(written)}", highlight=False, soft_wrap=True, markup=False)
    stopped = run.info().get("stopped")
    if stopped:
        print_stopped(stopped, run.path, console)


def print_stopped(what: str, run_dir: Path, console: Console) -> None:
    """Says that a search was stopped before its end, and how to go on with it."""
    text = f"{what[0].upper()}{what[1:]}; repeat the command with run_dir={run_dir} to go on."
    console.print(text, style="yellow", highlight=False, soft_wrap=True, markup=False)


def print_resolved(resolved: Resolved, path: Path, console: Console) -> None:
    """Prints what a run answers to a new question, and which numbers were measured."""
    costs = list(dict.fromkeys([*resolved.limits, "weight_bytes", "average_weight_bits"]))
    table = plain_table("policies within the budget", ["policy", "drop", "", *(COST_NAMES[name] for name in costs)])
    for answer in resolved.answers:
        kind = "measured" if answer.is_measured else f"predicted ± {significant(answer.deviation, 2)}"
        numbers = [quantity(name, answer.costs[name]) for name in costs]
        table.add_row(answer.policy.digest, f"{answer.drop:+.4f}".replace("-", "−"), kind, *numbers)
    print_table(table, console)
    console.print(
        "Drops are on the selection split; predicted ones follow from what the run measured: --measure N measures.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Wrote {path}", highlight=False, soft_wrap=True, markup=False)


def print_export(report: ExportReport, console: Console) -> None:
    """Prints what became of every layer."""
    table = plain_table(
        f"export to {report.backend}", ["layer", "precision", "weight", "input", "compute", "note"], left=6
    )
    for layer in report.layers:
        table.add_row(layer.name, layer.precision, layer.weight, layer.input, layer.compute or "–", layer.note)
    console.print(table)
    console.print(f"Wrote {', '.join(map(str, report.files))}", highlight=False, soft_wrap=True, markup=False)


def print_realized(plan: Plan, realized: Realized, backend: str, console: Console) -> None:
    """Prints what an altered plan is worth and costs as the backend runs it, beside the plan's promise."""
    table = plain_table(f"the plan as {backend} runs it, simulated", ["what", "runs", "plan"])
    table.add_row(plan.quality.metric, f"{realized.quality.value:.4f}", f"{plan.quality.value:.4f}")
    for name, planned in plan.cost.items():
        runs = realized.cost.get(name, math.nan)
        if planned.value is not None and not math.isnan(runs):
            table.add_row(name, quantity(name, runs), quantity(name, planned.value))
    print_table(table, console)


def print_verification(found: Verification | Validation, console: Console) -> None:
    """Prints what an exported plan delivered beside what it promised, or who read it and what was checked."""
    from search.backends.outcome import Validation

    if isinstance(found, Validation):
        console.print(f"{found.backend}: {found.proof} by {found.by}", highlight=False, markup=False)
        for check in found.checks:
            console.print(f"  {check}", highlight=False, markup=False)
        for fault in (fault for layer in found.layers for fault in layer.faults):
            console.print(f"  {fault}", highlight=False, markup=False)
        return
    table = plain_table(f"{found.backend} on {found.samples} report samples", ["what", "delivered", "promised"])
    promised = _interval(found.promised, found.promised_low, found.promised_high)
    table.add_row("quality", _interval(found.quality, found.low, found.high), promised)
    table.add_row("agreement with the simulation", f"{found.agreement:.2%}", "")
    table.add_row("largest output difference", f"{found.largest_difference:.3g}", "")
    planned = quantity("weight_bytes", found.planned_bytes)
    other = quantity("weight_bytes", found.other_bytes)
    table.add_row("bytes on disk", quantity("weight_bytes", found.bytes_on_disk), f"{planned} and {other} of others")
    for latency in found.latencies:
        median, low, high = (quantity("latency_s", s) for s in (latency.median_s, latency.low_s, latency.high_s))
        is_predicted = latency.name == "plan" and found.predicted_s is not None
        predicted = f"{quantity('latency_s', found.predicted_s)} on {found.hardware}" if is_predicted else ""
        table.add_row(f"latency of {latency.name}, batch {latency.batch}", f"{median} [{low}, {high}]", predicted)
    print_table(table, console)
    why = f": {'; '.join(found.shortfalls)}" if found.shortfalls else ""
    console.print(f"Verdict: {found.verdict}{why}", highlight=False, soft_wrap=True, markup=False)


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.4f}" if low is None or high is None else f"{value:.4f} [{low:.4f}, {high:.4f}]"
