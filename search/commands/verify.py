"""The command `bitplan verify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from search.backends import BACKENDS

if TYPE_CHECKING:
    from rich.console import Console

HELP = "run an exported plan and compare it with its promise"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `verify`."""
    parser.add_argument("plan", type=Path, help="plan.json, or a run directory that holds one")
    parser.add_argument("--backend", required=True, help=", ".join(BACKENDS))
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the export; default: a temporary one, exported anew"
    )
    parser.add_argument("overrides", nargs="*", metavar="task.KEY=VALUE", help="task settings, such as task.root=DIR")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Checks an exported plan: runs it and compares it with its promise, or has the real package read it."""
    from tempfile import TemporaryDirectory

    from search.backends import backend
    from search.plan import Plan
    from search.planned_task import planned_task
    from search.terminal import print_verification

    chosen, plan = backend(arguments.backend, "verify"), Plan.load(arguments.plan)
    task = planned_task(plan, arguments.overrides)
    with TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary) / "export"
        if not arguments.out:
            chosen.export(plan, task, folder)
        print_verification(chosen.verify(plan, task, folder), console)
