"""The command `bitplan sync`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "rebuild the MLflow runs of run directories"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `sync`."""
    parser.add_argument("run", type=Path, nargs="+", help="run directories, or folders of them, copied ones, too")
    parser.add_argument("--uri", help="tracking URI; default: the run's own setting")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Rebuilds the MLflow runs of run directories; one that is damaged does not keep the others from it."""
    from search.errors import DAMAGED, DataError, one_line
    from search.rundir import RunDirectory, find_runs
    from search.tracking.mirror import sync
    from search.tracking.settings import TrackingSettings
    from search.tracking.store import TrackingError

    def rebuild(run: RunDirectory) -> str:
        info = run.info()
        own = info["config"].get("tracking", {})
        settings = TrackingSettings(uri=arguments.uri or own.get("uri"), experiment=own.get("experiment"))
        root = Path(info.get("run_root", run.path.parent))
        return sync(run, settings, root if root.is_dir() else run.path.parent)

    damaged = []
    for run in find_runs(arguments.run):
        try:
            console.print(f"Synced {run.path} to {rebuild(run)}", highlight=False, soft_wrap=True)
        except TrackingError:
            raise  # the others would not get there either
        except DAMAGED as error:
            said = f"a file of it has no {error}" if isinstance(error, KeyError) else one_line(error)
            damaged.append(f"{run.path}: {said or type(error).__name__}")
    if damaged:
        raise DataError(f"not synced: {'; '.join(damaged)}")
