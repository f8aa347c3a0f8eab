"""The Hydra application behind `bitplan search`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from search.config import config_dir, explain, make_job, register
from search.errors import ConfigError


def search_command(overrides: Sequence[str]) -> None:
    """Runs `bitplan search` with Hydra overrides and flags.

    Raises:
        BitplanError: If the configuration, the data or the budget cannot be used.
    """
    register()
    sys.argv = ["bitplan search", *overrides]
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, and the message is ours
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir().resolve()), config_name="config")(run_job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def run_job(config: Any) -> float:
    """Runs one search as Hydra composed it; returns the winner's quality on the selection split, for sweepers."""
    from search.backends import backend
    from search.cli import console
    from search.config import TrackingSettings, plain
    from search.progress import BarProgress, LineProgress
    from search.report import write_report
    from search.run import search
    from search.rundir import RunDirectory
    from search.terminal import print_export, print_result
    from search.tracking import mirror

    register()
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    terminal = console()
    job = make_job(config, run_dir)
    values = plain(config)
    exporters = [backend(name) for name in values["export"]["backends"]]
    tracking, run, root = TrackingSettings(**values["tracking"]), RunDirectory(run_dir), Path(values["run_root"])
    progress = BarProgress(terminal, job.strategy.evaluations) if terminal.is_terminal else LineProgress(terminal)
    try:
        result = search(job, progress)
    finally:
        progress.close()
    for exporter in exporters:
        print_export(exporter.export(result.plan, job.task, run_dir / "export" / exporter.name), terminal)
    write_report(run)
    print_result(result, terminal)
    warning = mirror(run, tracking, root)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return result.plan.selection.value
