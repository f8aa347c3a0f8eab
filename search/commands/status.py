"""The command `bitplan status`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "how far searches are"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `status`."""
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN_DIR", help="run directories, or folders of them")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Runs `status`."""
    raise NotImplementedError
