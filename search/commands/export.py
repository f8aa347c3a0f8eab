"""The command `bitplan export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from search.backends import BACKENDS

if TYPE_CHECKING:
    from rich.console import Console

HELP = "write a plan for a backend"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `export`."""
    parser.add_argument("plan", type=Path, help="plan.json, or a run directory that holds one")
    parser.add_argument("--to", required=True, metavar="BACKEND", help=", ".join(BACKENDS))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--recalibrate", action="store_true", help="let the backend find ranges of its own in place of the plan's"
    )
    parser.add_argument("--strict", action="store_true", help="refuse what the backend alters or leaves in float")
    parser.add_argument("overrides", nargs="*", metavar="task.KEY=VALUE", help="task settings, such as task.root=DIR")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Writes a plan for a backend."""
    from search.backends import backend
    from search.deliver import deliver
    from search.plan import Plan
    from search.planned_task import planned_hardware, planned_task

    chosen, plan = backend(arguments.to), Plan.load(arguments.plan)
    task, cost_model = planned_task(plan, arguments.overrides), planned_hardware(plan)
    deliver(chosen, plan, task, arguments.out, cost_model, console, arguments.recalibrate, arguments.strict)
