"""The command `bitplan merge`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "put runs of several machines together, with what they measured"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `merge`."""
    parser.add_argument(
        "source", type=Path, nargs="+", metavar="SOURCE", help="run roots, sweeps or run directories; only read"
    )
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="run root to merge into")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Merges folders and prints what was done.

    Raises:
        DataError: If something was left out because two places contradict each other.
    """
    from search.errors import DataError
    from search.merging import merge
    from search.terminal import plain_table
    from search.units import quantity

    done = merge(arguments.source, arguments.into, arguments.dry_run)
    would = "would be " if arguments.dry_run else ""
    table = plain_table(f"{would}merged into {arguments.into}".capitalize(), ["what", "count"])
    for name, count in (
        ("runs new", done.new),
        ("runs updated", done.updated),
        ("runs the same", done.same),
        ("evaluations added", done.evaluations),
        ("sensitivity tables added", done.tables),
        ("workers' shards added", done.shards),
        ("refused", len(done.refused)),
    ):
        table.add_row(name, str(count))
    table.add_row("copied", quantity("weight_bytes", float(done.bytes)))
    console.print(table)
    for path in done.left:
        console.print(f"Left out {path}: `bitplan sync` rebuilds what it shows", highlight=False, soft_wrap=True)
    if done.refused:
        raise DataError("; ".join(done.refused))
