"""The command `bitplan worker`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "join a search and measure for it, from any machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `worker`."""
    parser.add_argument(
        "run", type=Path, nargs="?", metavar="RUN_DIR", help="run directory of the search, on a file system both see"
    )
    parser.add_argument(
        "--study",
        metavar="URL",
        help="the search's strategy.storage or study: path of a journal file, or URL of a database",
    )


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Runs `worker`."""
    raise NotImplementedError
