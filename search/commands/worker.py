"""The command `bitplan worker`."""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from search.job import Job

HELP = "join a search and measure for it, from any machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `worker`."""
    parser.add_argument(
        "run", type=Path, nargs="?", metavar="RUN_DIR", help="run directory of the search, on a file system both see"
    )
    parser.add_argument(
        "--study", metavar="URL", help="what the search was given as study=URL: a journal file, or a database"
    )
    parser.add_argument("--name", help="what this worker is called; default: its machine and process")
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long the search may give no sign of life before the worker leaves; default: %(default)g",
    )
    parser.add_argument("--leave-with", type=int, metavar="PROCESS", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Runs `worker`.

    Raises:
        ConfigError: If neither a run directory nor a study is named, or there is no search.
        DataError: If what is named is no run directory.
    """
    from search.workers.board import check_name
    from search.workers.opening import open_board
    from search.workers.worker import Worker

    folder = arguments.run
    if not 0 < arguments.patience < math.inf:
        raise ConfigError(f"--patience {arguments.patience:g} must be a number of seconds above 0")
    if folder is None and not arguments.study:
        raise ConfigError("name the search: bitplan worker RUN_DIR, or bitplan worker --study URL")
    if folder and not (folder / "run.json").is_file() and arguments.leave_with is None:
        raise DataError(f"{folder} is no run directory: it has no run.json; name that of a search that is running")
    name = arguments.name or re.sub(r"[^\w.-]", "-", f"{socket.gethostname()}-{os.getpid()}", flags=re.ASCII)
    try:
        check_name(name)
    except ValueError as error:
        raise ConfigError(f"--name {error}") from error
    study = arguments.study or (_study_of(folder) if folder else None)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    worker = Worker(open_board(study or folder), name, rebuilt, folder, arguments.patience, arguments.leave_with, say)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that no file is left half-written
    worker.work()


def rebuilt(config: Mapping[str, Any], folder: Path) -> Job:
    """The job of a search, made of its settings, to work for it.

    Args:
        config: The settings, as run.json has them.
        folder: What stands for the run directory and the root of all runs.

    Raises:
        ConfigError: If a value is out of range or a target cannot be built.
    """
    from omegaconf import OmegaConf

    from search.config import make_job

    own: dict[str, Any] = {"workers": 1, "study": None, "tracking": {}, "run_root": str(folder), "run_dir": str(folder)}
    return make_job(OmegaConf.create({**config, **own}), folder)


def _study_of(folder: Path) -> str | None:
    """The study through which the workers of a run join, where it has one."""
    from search.rundir import RunDirectory

    if not (folder / "run.json").is_file():
        return None
    study = RunDirectory(folder).info().get("study")
    return None if study is None else str(study)
