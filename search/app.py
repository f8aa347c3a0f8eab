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
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from search.config import (
    config_dir,
    explain,
    make_job,
    plain,
    register,
    spelt_out,
)
from search.errors import BitplanError, ConfigError
from search.job import settings
from search.sweep import launcher_missing, summarized
from search.terminal import make_console
from search.tracking.live import Mirrored, sweep_name
from search.tracking.settings import TrackingSettings


def search_command(overrides: Sequence[str]) -> None:
    """Runs `bitplan search` with Hydra overrides and flags.

    Raises:
        BitplanError: If the configuration, the data or the budget cannot be used, or jobs of a sweep failed.
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
    install_launchers()
    sys.argv = ["bitplan search", *spelt_out(overrides)]
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing, and the message is ours
    try:
        with summarized(make_console()):
            hydra.main(version_base="1.3", config_path=str(config_dir().resolve()), config_name="config")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(launcher_missing(str(error)) or explain(error)) from error
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
    if refused:
        raise refused[0]


def install_launchers() -> None:
    """Has Hydra launch Slurm jobs as sweeps need it, where its plug-in is installed."""
    try:
        from search.slurm import install
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("hydra_plugins"):
            raise
    else:
        install()


def run_job(config: Any) -> float:
    """Runs one search as Hydra composed it; returns the winner's quality on the selection split, for sweepers.

    Raises:
        Interrupted: If a signal stopped it; its files are in good order then.
    """
    from search.backends import backend
    from search.deliver import deliver
    from search.headway import Goal
    from search.pricing import placed
    from search.progress import make_progress
    from search.report import write_report
    from search.run import search
    from search.stopping import Interrupted, Stop, StoppedError, listening
    from search.terminal import print_result, print_stopped

    register()
    job, values, terminal = make_job(config, Path(HydraConfig.get().runtime.output_dir)), plain(config), make_console()
    exporters = [backend(name) for name in job.export.backends]
    tracking = settings(TrackingSettings, values["tracking"], "tracking")
    goal = Goal.of(job.budget.given(), job.task.metric)
    progress = make_progress(terminal, job.strategy.evaluations, goal, job.strategy.seconds)
    run_root, stop = Path(values["run_root"]), Stop()
    mirrored = Mirrored(job.run_dir, tracking, run_root, sweep_name(HydraConfig.get(), run_root))
    try:
        with listening(stop, progress.notice), mirrored:
            try:
                result = search(job, progress, mirrored.start, stop)
            finally:
                progress.close()
            write_report(result.run)
            print_result(result, terminal)
            for exporter in [] if stop.is_asked else exporters:
                folder = job.run_dir / "export" / exporter.name
                cost_model = placed(job.cost_model, job.quantizer.placement)
                deliver(exporter, result.plan, job.task, folder, cost_model, terminal, job.export.recalibrate)
    except (StoppedError, KeyboardInterrupt) as error:
        why = f"{error}" or "the search was stopped at once, and nothing measured is lost"
        print_stopped(why, job.run_dir, terminal)
        raise Interrupted(stop.exit_code) from None
    if stop.is_asked:
        raise Interrupted(stop.exit_code)
    return result.plan.selection.value
