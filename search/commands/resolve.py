"""The command `bitplan resolve`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "answer another budget or device from a finished run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `resolve`."""
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--measure", type=int, metavar="N", help="measure up to N policies and write a plan")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write to; default: RUN/resolved/...")
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="KEY=VALUE",
        help="budget.KEY=VALUE, hardware=NAME, workload.KEY=VALUE, such as budget.size_ratio=0.1",
    )


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Answers a new question from a run's files; measures where that is asked for."""
    import re

    from search.answers import FORECASTS, resolve
    from search.errors import ConfigError
    from search.progress import BarProgress, LineProgress
    from search.report import write_report
    from search.resolve import measure, question
    from search.rundir import RunDirectory
    from search.terminal import print_resolved, print_result

    run = RunDirectory.existing(arguments.run)
    if arguments.measure is not None and arguments.measure < 1:
        raise ConfigError(f"--measure {arguments.measure} must be at least 1")
    budget, cost_model, workload, configuration = question(run, arguments.overrides)
    folder = arguments.out or run.file("resolved") / re.sub(r"[^\w.=-]+", "_", " ".join(arguments.overrides))
    count = arguments.measure or 0
    resolved = resolve(run, budget, cost_model, workload, forecasts=max(count, FORECASTS))
    print_resolved(resolved, resolved.save(folder), console)
    if count:
        progress = BarProgress(console, count) if console.is_terminal else LineProgress(console)
        try:
            result = measure(run, configuration, resolved.open[:count], folder, progress)
        finally:
            progress.close()
        write_report(result.run)
        print_result(result, console)
