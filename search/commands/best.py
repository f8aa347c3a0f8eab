"""The command `bitplan best`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "the best plan that MLflow knows for a task, a device and a budget"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `best`."""
    parser.add_argument("--task", required=True)
    parser.add_argument("--hardware", required=True)


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Runs `best`."""
    raise NotImplementedError
