"""The command `bitplan merge`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "put runs of several machines together"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `merge`."""
    parser.add_argument("source", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--into", type=Path, required=True, metavar="FOLDER")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Runs `merge`."""
    raise NotImplementedError
