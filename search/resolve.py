"""Asking a finished run again from the command line, and measuring what it answers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hwmodels import CostModel, Workload
from search.answers import pricing_of
from search.budget import Budget
from search.config import build, compose, explain, make_job
from search.errors import ConfigError
from search.job import Job, Result, settings
from search.planning import identity
from search.policy import Policy
from search.progress import Progress
from search.run import search
from search.rundir import RunDirectory
from search.sensitivity.scoring import TABLE
from search.strategies.listed import Listed
from search.trials import TrialLog

GROUPS = ("budget", "hardware", "workload")
"""What may be asked anew; everything else is what the run measured."""


def question(run: RunDirectory, overrides: Sequence[str]) -> tuple[Budget, CostModel, Workload, Any]:
    """Reads what is asked: budget, device and workload, and the whole configuration with them put in.

    Args:
        run: Its own budget, device and workload hold where none is named.
        overrides: Hydra overrides of `GROUPS`.

    Raises:
        ConfigError: If something else is overridden, or neither the run nor the question has a budget.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for override in overrides:
        group = override.partition("=")[0].split(".")[0]
        if group not in GROUPS or "=" not in override or override.startswith("workload="):
            raise ConfigError(
                f"{override!r}: a finished run can be asked for another budget.KEY=VALUE, hardware=NAME or "
                "workload.KEY=VALUE; everything else needs a new search"
            )
    held = run.info()["config"]
    if isinstance(held["hardware"], str) and not any(override.startswith("hardware") for override in overrides):
        overrides = [f"hardware={held['hardware']}", *overrides]  # a run made from Python names its device only
    try:
        composed = compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    asked = {override.partition("=")[0].split(".")[0] for override in overrides}
    merged = OmegaConf.create(dict(held))
    for group in asked - {"workload"}:
        merged[group] = composed[group]
    if "workload" in asked:  # one key at a time, so that the run's other ones hold
        paths = [override.partition("=")[0] for override in overrides if override.startswith("workload.")]
        given = {path.removeprefix("workload."): OmegaConf.select(composed, path) for path in paths}
        merged["workload"] = held["workload"] | given
    budget: dict[str, Any] = OmegaConf.to_container(merged.budget, resolve=True)  # type: ignore[assignment]
    workload: dict[str, Any] = OmegaConf.to_container(merged.workload, resolve=True)  # type: ignore[assignment]
    wanted = settings(Budget, budget, "budget")
    if not wanted.given():
        raise ConfigError("name the budget to answer, such as budget.size_ratio=0.1; the run had none")
    return (
        wanted,
        build(merged.hardware, CostModel, "hardware"),
        settings(Workload, workload, "workload"),
        merged,
    )


def measure(
    run: RunDirectory, configuration: Any, policies: Sequence[Policy], folder: Path, progress: Progress | None = None
) -> Result:
    """Measures policies under a new budget, in a run directory of its own, beside what the run measured already.

    Args:
        run: The run.
        configuration: What `question` returned.
        policies: What is measured.
        folder: The new run directory.
        progress: Where to show how far it is.

    Raises:
        ConfigError: If the run was made from Python, or the task's model or data are no longer those of the run.
    """
    if not isinstance(run.info()["config"].get("task"), Mapping):
        raise ConfigError("this run was made from Python and names no task; call search.find_plan with its run_dir")
    if "loop_repair" in run.info():
        configuration.quantizer.repair = run.info()["loop_repair"]["repair"]
    job = replace(make_job(configuration, folder), strategy=Listed(policies, max(len(policies), 1)))
    facts, held = identity(job), run.info()
    for key, name in (("model", "model"), ("data_fingerprint", "data")):
        if facts[key] != held[key]:
            raise ConfigError(f"the task's {name} is not what {run.path} was made with; scores do not apply")
    if not (folder / "trials.jsonl").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(run.file(TABLE), folder / TABLE)
        _carry_over(run, job, folder)
    return search(job, progress)


def _carry_over(run: RunDirectory, job: Job, folder: Path) -> None:
    """Writes the run's measurements to the new log, at the prices that hold now, where they keep the budget."""
    pricing = pricing_of(run, job.cost_model, job.workload)
    limits = job.budget.limits(pricing.reference(job.budget.reference))
    log = TrialLog(folder / "trials.jsonl")
    for trial in run.trials():
        costs = pricing.costs(trial.policy)
        if trial.state == "complete" and all(costs[name] <= limit for name, limit in limits.items()):
            cost = {name: value if value == value else None for name, value in costs.items()}
            log.append(replace(trial, number=len(log.trials), cost=cost))
