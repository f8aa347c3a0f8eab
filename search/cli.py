"""The command `bitplan`: `search`, `hardware`, `profile`, and what `search.commands` holds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from search.commands import best, compare, export, merge, report, resolve, status, sync, verify, worker
from search.errors import BitplanError, file_error
from search.hardware.commands import HARDWARE_HELP, add_hardware
from search.profile_command import PROFILE_HELP
from search.profile_command import add_arguments as add_profile

if TYPE_CHECKING:
    from rich.console import Console


COMMANDS = {
    "resolve": resolve,
    "export": export,
    "verify": verify,
    "report": report,
    "compare": compare,
    "status": status,
    "worker": worker,
    "merge": merge,
    "sync": sync,
    "best": best,
}
NAMES = ("search", *COMMANDS, "hardware", "profile")
"""Of all commands."""

DESCRIPTION = "Finds how many bits every layer of a network deserves, and writes the plan for real backends."
SEARCH_HELP = (
    "search a plan: bitplan search [group=option ...] [key=value ...] [-m] [--cfg job]; settings are Hydra overrides, "
    "such as task=fashion_mnist budget.size_ratio=0.1 strategy=tpe"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    0 is success; 1 what a command says itself, such as `status` of runs that need a hand; 2 an error the user can fix;
    130 a stop by Ctrl-C.

    Raises:
        Interrupted: If a search was stopped in good order; it ends the process with 130 after Ctrl-C, 143 after
            SIGTERM.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.path.insert(0, str(Path.cwd()))  # so that task._target_=my_package.my_task is found where the user stands
    try:
        if arguments[:1] == ["search"]:
            from search.app import search_command

            search_command(arguments[1:])
            return 0
        parsed = parse(arguments)
        command: Callable[[argparse.Namespace, Console], int | None] = parsed.command
        from search.terminal import make_console

        return command(parsed, make_console()) or 0
    except BitplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        explained = file_error(error)
        if explained is None:
            raise
        print(f"error: {explained}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        how = " with the same run_dir" if arguments[:1] == ["search"] else ""
        print(f"interrupted; repeat the command{how} to go on", file=sys.stderr)
        return 130


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

    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.HELP)
        command.add_arguments(own)
        own.set_defaults(command=command.run)
    add_hardware(commands.add_parser("hardware", help=HARDWARE_HELP))
    add_profile(commands.add_parser("profile", help=PROFILE_HELP))
    return top
