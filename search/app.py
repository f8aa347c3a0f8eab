"""The Hydra application behind `bitplan search`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from search.config import (
    TrackingSettings,
    config_dir,
    explain,
    make_job,
    plain,
    register,
    spelt_out,
)
from search.errors import BitplanError, ConfigError
from search.job import settings
from search.rundir import RunDirectory
from search.tracking import mirror


def search_command(overrides: Sequence[str]) -> None:
    """Runs `bitplan search` with Hydra overrides and flags.

    Raises:
        BitplanError: If the configuration, the data or the budget cannot be used.
    """
    refused: list[BitplanError] = []

    def job(config: Any) -> float | None:
        try:
            return run_job(config)
        except BitplanError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # Hydra then names the job that failed
            refused.append(error)
            return None

    register()
    sys.argv = ["bitplan search", *spelt_out(overrides)]
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, and the message is ours
    try:
        hydra.main(version_base="1.3", config_path=str(config_dir().resolve()), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
    if refused:
        raise refused[0]


def run_job(config: Any) -> float:
    """Runs one search as Hydra composed it; returns the winner's quality on the selection split, for sweepers."""
    from search.backends import backend
    from search.deliver import deliver
    from search.pricing import placed
    from search.progress import BarProgress, LineProgress
    from search.report import write_report
    from search.run import search
    from search.terminal import make_console, print_result

    register()
    job, values, terminal = make_job(config, Path(HydraConfig.get().runtime.output_dir)), plain(config), make_console()
    exporters = [backend(name) for name in job.export.backends]
    tracking = settings(TrackingSettings, values["tracking"], "tracking")
    progress = BarProgress(terminal, job.strategy.evaluations) if terminal.is_terminal else LineProgress(terminal)
    with Mirrored(job.run_dir, tracking, Path(values["run_root"])) as mirrored:
        try:
            result = search(job, progress, mirrored.start)
        finally:
            progress.close()
        write_report(result.run)
        print_result(result, terminal)
        for exporter in exporters:
            folder = job.run_dir / "export" / exporter.name
            cost_model = placed(job.cost_model, job.quantizer.placement)
            deliver(exporter, result.plan, job.task, folder, cost_model, terminal, job.export.recalibrate)
    return result.plan.selection.value


class Mirrored:
    """Mirrors a run to MLflow beside the search, from its start, and once more when the block ends, however it ends."""

    def __init__(self, run_dir: Path, tracking: TrackingSettings, run_root: Path) -> None:
        self._run = RunDirectory(run_dir)
        self._tracking = tracking
        self._root = run_root.resolve()
        self._first: Thread | None = None

    def start(self, run: RunDirectory) -> None:
        """Begins to mirror, beside what follows: the first contact takes seconds."""
        run.update(run_root=str(self._root))
        if self._tracking.enabled:
            self._first = Thread(target=mirror, args=(run, self._tracking, self._root), daemon=True)
            self._first.start()

    def __enter__(self) -> Mirrored:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._first is None:
            return
        self._first.join()
        warning = mirror(self._run, self._tracking, self._root)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
