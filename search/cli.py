"""The command `bitplan`: search, resolve, export, verify, report, sync, hardware, profile."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from search.backends import BACKENDS
from search.errors import BitplanError
from search.hardware.commands import HARDWARE_HELP, add_hardware
from search.profile_command import PROFILE_HELP
from search.profile_command import add_arguments as add_profile

if TYPE_CHECKING:
    from rich.console import Console


COMMANDS = ("search", "resolve", "export", "verify", "report", "sync", "hardware", "profile")
DESCRIPTION = "Finds how many bits every layer of a network deserves, and writes the plan for real backends."
SEARCH_HELP = (
    "search a plan: bitplan search [group=option ...] [key=value ...] [-m] [--cfg job]; settings are Hydra overrides, "
    "such as task=fashion_mnist budget.size_ratio=0.1 strategy=tpe"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after an error the user can fix, or 130 after an interrupt."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.path.insert(0, str(Path.cwd()))  # so that task._target_=my_package.my_task is found where the user stands
    try:
        if arguments[:1] == ["search"]:
            from search.app import search_command

            search_command(arguments[1:])
            return 0
        parsed = parse(arguments)
        command: Callable[[argparse.Namespace, Console], None] = parsed.command
        from search.terminal import make_console

        command(parsed, make_console())
    except BitplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        how = " with the same run_dir" if arguments[:1] == ["search"] else ""
        print(f"interrupted; repeat the command{how} to go on", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads a command; KEY=VALUE settings may stand anywhere behind it, which argparse alone would not allow."""
    top = parser()
    parsed, rest = top.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or not hasattr(parsed, "overrides"):
        return top.parse_args(arguments)
    parsed.overrides = [*parsed.overrides, *rest]
    return parsed


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; `search` hands its arguments to Hydra before it is asked."""
    top = argparse.ArgumentParser(prog="bitplan", description=DESCRIPTION)
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("search", help=SEARCH_HELP)

    resolve = commands.add_parser("resolve", help="answer another budget or device from a finished run")
    resolve.add_argument("run", type=Path, help="run directory")
    resolve.add_argument("--measure", type=int, metavar="N", help="measure up to N policies and write a plan")
    resolve.add_argument("--out", type=Path, metavar="DIR", help="folder to write to; default: RUN/resolved/...")
    resolve.add_argument(
        "overrides",
        nargs="+",
        metavar="KEY=VALUE",
        help="budget.KEY=VALUE, hardware=NAME, workload.KEY=VALUE, such as budget.size_ratio=0.1",
    )
    resolve.set_defaults(command=resolve_command)

    export = commands.add_parser("export", help="write a plan for a backend")
    export.add_argument("plan", type=Path, help="plan.json, or a run directory that holds one")
    export.add_argument("--to", required=True, metavar="BACKEND", help=", ".join(BACKENDS))
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    export.add_argument(
        "--recalibrate", action="store_true", help="let the backend find ranges of its own in place of the plan's"
    )
    export.add_argument("--strict", action="store_true", help="refuse what the backend alters or leaves in float")
    export.add_argument("overrides", nargs="*", metavar="task.KEY=VALUE", help="task settings, such as task.root=DIR")
    export.set_defaults(command=export_command)

    verify = commands.add_parser("verify", help="run an exported plan and compare it with its promise")
    verify.add_argument("plan", type=Path, help="plan.json, or a run directory that holds one")
    verify.add_argument("--backend", required=True, help=", ".join(BACKENDS))
    verify.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the export; default: a temporary one, exported anew"
    )
    verify.add_argument("overrides", nargs="*", metavar="task.KEY=VALUE", help="task settings, such as task.root=DIR")
    verify.set_defaults(command=verify_command)

    report = commands.add_parser("report", help="write a run's report.html and figures again")
    report.add_argument("run", type=Path, help="run directory")
    report.set_defaults(command=report_command)

    sync = commands.add_parser("sync", help="rebuild the MLflow runs of a run directory")
    sync.add_argument("run", type=Path, nargs="+", help="run directories")
    sync.add_argument("--uri", help="tracking URI; default: the run's own setting")
    sync.set_defaults(command=sync_command)

    add_hardware(commands.add_parser("hardware", help=HARDWARE_HELP))
    add_profile(commands.add_parser("profile", help=PROFILE_HELP))
    return top


def resolve_command(arguments: argparse.Namespace, console: Console) -> None:
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


def export_command(arguments: argparse.Namespace, console: Console) -> None:
    """Writes a plan for a backend."""
    from search.backends import backend
    from search.deliver import deliver
    from search.plan import Plan
    from search.planned_task import planned_hardware, planned_task

    chosen, plan = backend(arguments.to), Plan.load(arguments.plan)
    task, cost_model = planned_task(plan, arguments.overrides), planned_hardware(plan)
    deliver(chosen, plan, task, arguments.out, cost_model, console, arguments.recalibrate, arguments.strict)


def verify_command(arguments: argparse.Namespace, console: Console) -> None:
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


def report_command(arguments: argparse.Namespace, console: Console) -> None:
    """Writes a run's report again."""
    from search.report import write_report
    from search.rundir import RunDirectory

    console.print(f"Wrote {write_report(RunDirectory.existing(arguments.run))}", highlight=False, soft_wrap=True)


def sync_command(arguments: argparse.Namespace, console: Console) -> None:
    """Rebuilds the MLflow runs of run directories."""
    from search.config import TrackingSettings
    from search.rundir import RunDirectory
    from search.tracking import sync

    for path in arguments.run:
        run = RunDirectory.existing(path)
        info = run.info()
        own = info["config"].get("tracking", {})
        settings = TrackingSettings(True, arguments.uri or own.get("uri"), own.get("experiment"))
        root = Path(info.get("run_root", path.parent))
        uri = sync(run, settings, root if root.is_dir() else path.parent)
        console.print(f"Synced {path} to {uri}", highlight=False, soft_wrap=True)
