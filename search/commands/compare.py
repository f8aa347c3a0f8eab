"""The command `bitplan compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from search.comparison.groups import Entry

HELP = "compare runs on one page that opens anywhere"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `compare`."""
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN_OR_SWEEP", help="run directories, or folders of them")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page to write; default: compare.html beside the runs"
    )


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Writes the page, and prints the best plan of every task, device and budget."""
    from search.comparison.page import write_comparison
    from search.rundir import find_runs

    found = write_comparison(find_runs(arguments.run), arguments.out)
    best = [entry for entry in found.entries if entry.is_best]
    if best:
        console.print(best_table(best))
    for note in found.notes:
        console.print(f"Mind: {note}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    count = len(found.entries)
    copies = f", copies left out: {found.copies}" if found.copies else ""
    words = f"Wrote {found.page}: {count} run{'s'[: count != 1]} compared{copies}"
    console.print(words, highlight=False, soft_wrap=True, markup=False)


def best_table(entries: list[Entry]) -> Table:
    """The given runs, a row each."""
    from rich.text import Text

    from search.terminal import VERDICT_STYLE, plain_table
    from search.units import interval, quantity

    columns = ["task", "device", "budget", "strategy", "seed", "run", "", "quality", "drop [95%]", "bits"]
    table = plain_table("the best of every task, device and budget", [*columns, "size", "latency"], left=7)
    for column in table.columns:
        column.overflow = "fold"
        column.no_wrap = column.header == "drop [95%]"
    for entry in entries:
        plan = entry.run.plan
        if plan is None:
            continue
        quality, verdict = plan.quality, plan.budget.verdict
        words = (entry.group, entry.place, entry.budget, entry.run.strategy, str(entry.run.seed), entry.name)
        table.add_row(
            *map(Text, words),
            f"[{VERDICT_STYLE[verdict]}]{verdict}[/]",
            f"{quality.value:.4f}",
            Text(interval(quality.drop, quality.drop_low, quality.drop_high, signed=True)),
            f"{plan.average_weight_bits:.2f}",
            *(
                quantity(name, plan.cost[name].value) if name in plan.cost else "–"
                for name in ("weight_bytes", "latency_s")
            ),
        )
    return table
