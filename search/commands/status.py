"""The command `bitplan status`."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from search.status import RunStatus

HELP = "how far searches are"
EPILOG = (
    "exit codes: 0 all runs go on or are finished, 1 some were interrupted, failed, or are dead or damaged, 2 error"
)

STYLES = {"running": "cyan", "finished": "green", "interrupted": "yellow"}
"""Of states; all others are red."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `status`."""
    parser.epilog = EPILOG
    parser.add_argument("run", type=Path, nargs="+", metavar="RUN_DIR", help="run directories, or folders of them")
    parser.add_argument("--json", action="store_true", help="a list of objects for machines, with --watch one a line")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=2.0,
        metavar="SECONDS",
        help="look again every so many seconds (default 2) until no run goes on",
    )


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Says how far runs are; returns 0, or 1 where some need a hand."""
    from search.errors import ConfigError
    from search.status import NEEDY

    if arguments.watch is not None and not 0 < arguments.watch < math.inf:
        raise ConfigError(f"--watch {arguments.watch:g} must be a number of seconds above 0")
    if arguments.watch is None:
        found = _read(arguments.run)
        _print_json(found) if arguments.json else _print(found, console)
    else:
        found = _watch(arguments, console)
    return int(any(status.state in NEEDY for status in found))


def _read(paths: Sequence[Path]) -> list[RunStatus]:
    from search.rundir import find_runs
    from search.status import read_status

    return [read_status(run) for run in find_runs(paths)]


def _watch(arguments: argparse.Namespace, console: Console) -> list[RunStatus]:
    """Shows how far runs are until none goes on: redrawn on a terminal, elsewhere a line for whatever changes."""
    if arguments.json:
        return _last(arguments, _print_json)
    if console.is_interactive and console.file.isatty():
        from rich.live import Live

        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            return _last(arguments, lambda found: live.update(_shown(found), refresh=True))
    told: dict[Path, str] = {}

    def tell(found: Sequence[RunStatus]) -> None:
        for status in found:
            line = " · ".join([f"{status.path} {status.state}", *_facts(status)])
            if told.get(status.path) != line:
                told[status.path] = line
                console.print(f"[{time.strftime('%H:%M:%S')}] {line}", highlight=False, markup=False, soft_wrap=True)

    return _last(arguments, tell)


def _last(arguments: argparse.Namespace, show: Callable[[Sequence[RunStatus]], None]) -> list[RunStatus]:
    """Reads and shows until no run goes on; returns what was read last."""
    while True:
        found = _read(arguments.run)
        show(found)
        if not any(status.state == "running" for status in found):
            return found
        time.sleep(arguments.watch)


def _print_json(found: Sequence[RunStatus]) -> None:
    import json

    print(json.dumps([status.to_dict() for status in found], allow_nan=False), flush=True)


def _print(found: Sequence[RunStatus], console: Console) -> None:
    from search.terminal import print_table

    if len(found) == 1:
        console.print(_panel(found[0]))
    else:
        print_table(_table(found), console)
        console.print(_totals(found), highlight=False)


def _shown(found: Sequence[RunStatus]) -> RenderableType:
    from rich.console import Group

    return _panel(found[0]) if len(found) == 1 else Group(_table(found), _totals(found))


def _totals(found: Sequence[RunStatus]) -> str:
    from search.status import totals

    return f"{len(found)} runs: {', '.join(f'{count} {state}' for state, count in totals(found).items())}"


def _facts(status: RunStatus) -> Iterator[str]:
    """What changes while a run goes on, in words."""
    from search.headway import amount, duration
    from search.units import significant

    if status.stage and status.state != "finished":
        yield status.stage + (f" {amount(*status.steps)}" if status.steps else "")
    if status.evaluations or status.state == "running":
        yield f"{amount(status.evaluations, status.allowance)} evaluations"
    if status.best_text:
        yield f"best {status.best_text}"
    if status.evaluations_per_s is not None:
        yield f"{significant(status.evaluations_per_s, 2)} evaluations/s"
    if status.left_s is not None:
        yield f"about {duration(status.left_s)} left"
    if len(status.workers) > 1:
        yield f"{len(status.workers)} workers"
    if status.error and status.state != "finished":
        yield status.error


def _panel(status: RunStatus) -> RenderableType:
    """Everything about one run."""
    from rich.table import Table
    from rich.text import Text

    from search.headway import amount, duration
    from search.units import significant

    about = status.about
    rows = [("run", Text(f"{status.path}", style="bold", overflow="fold"))]
    what = " on ".join(f"{about[name]}" for name in ("task", "hardware") if name in about)
    how = ", ".join(f"{name} {about[name]}" for name in ("strategy", "seed") if name in about)
    rows.append(("search", Text(", ".join(filter(None, [what, how])))))
    rows.append(("state", Text(status.state, style=STYLES.get(status.state, "red"))))
    if status.stage and status.state != "finished":
        since = f", for {duration(status.stage_s)}" if status.stage_s is not None else ""
        steps = f" {amount(*status.steps)}" if status.steps else ""
        rows.append(("stage", Text(f"{status.stage}{steps}{since}")))
    tried = f", {status.trials} polic{'y' if status.trials == 1 else 'ies'} tried"
    rows.append(("done", Text(f"{amount(status.evaluations, status.allowance)} evaluations{tried}")))
    if status.best and status.best_text:
        rows.append(("best", Text(f"{status.best_text} (trial {status.best['trial']})")))
    if status.evaluations_per_s is not None:
        rows.append(("speed", Text(f"{significant(status.evaluations_per_s, 2)} evaluations/s")))
    if status.left_s is not None:
        rows.append(("left", Text(f"about {duration(status.left_s)}")))
    for number, worker in enumerate(status.workers):
        done = "" if worker.done is None else f", {worker.done} done"
        rows.append(("workers" if not number else "", Text(f"{worker.name} {worker.doing}{done}")))
    if status.state == "finished" and "seconds" in about:
        rows.append(("took", Text(duration(about["seconds"]))))
    if status.sign_s is not None:
        rows.append(("last sign of life", Text(f"{duration(status.sign_s)} ago")))
    if "stopped" in about:
        rows.append(("stopped", Text(f"{about['stopped']}")))
    if status.error:
        rows.append(("last error", Text(status.error, overflow="fold")))
    rows += [("mind", Text(note, style="yellow")) for note in status.notes]
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for name, value in rows:
        grid.add_row(name, value)
    return grid


def _briefly(best: Mapping[str, Any]) -> str:
    """The best trial without the names of its numbers."""
    from search.units import COST_NAMES, quantity

    costs = [quantity(name, best[name]) for name in COST_NAMES if name in best]
    return ", ".join([f"{best['quality']:.4f}", f"drop {best['drop']:+.4f}".replace("-", "−"), *costs])


def _table(found: Sequence[RunStatus]) -> Table:
    """A line for each run."""
    from rich.text import Text

    from search.headway import amount, duration
    from search.terminal import plain_table
    from search.units import NONE

    top = Path(os.path.commonpath([status.path for status in found]))
    table = plain_table(f"runs in {top}", ["run", "search", "state", "stage", "evaluations", "best so far", "left"], 4)
    for column in table.columns:
        column.overflow = "fold"
    for status in found:
        stage = NONE if status.state == "finished" or not status.stage else status.stage
        about = [f"{status.about[name]}" for name in ("task", "hardware", "strategy") if name in status.about]
        seed = [f"seed {status.about['seed']}"] if "seed" in status.about else []
        table.add_row(
            Text(f"{status.path.relative_to(top)}"),
            " ".join([*about, *seed]),
            Text(status.state, style=STYLES.get(status.state, "red")),
            Text(status.error or stage) if status.state in ("failed", "dead", "damaged") else stage,
            amount(status.evaluations, status.allowance),
            _briefly(status.best) if status.best else NONE,
            NONE if status.left_s is None else duration(status.left_s),
        )
    return table
