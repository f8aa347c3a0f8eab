"""The command `bitplan compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "compare runs on one page that opens anywhere"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `compare`."""
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN_OR_SWEEP", help="run directories, or folders of them")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page to write; default: compare.html beside the runs"
    )


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Runs `compare`."""
    raise NotImplementedError
