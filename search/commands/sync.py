"""The command `bitplan sync`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HELP = "rebuild the MLflow runs of a run directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `sync`."""
    parser.add_argument("run", type=Path, nargs="+", help="run directories")
    parser.add_argument("--uri", help="tracking URI; default: the run's own setting")


def run(arguments: argparse.Namespace, console: Console) -> None:
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
