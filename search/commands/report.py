"""The command `bitplan report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "write a run's report.html and figures again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `report`."""
    parser.add_argument("run", type=Path, help="run directory")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Writes a run's report again."""
    from search.report import write_report
    from search.rundir import RunDirectory

    console.print(f"Wrote {write_report(RunDirectory.existing(arguments.run))}", highlight=False, soft_wrap=True)
