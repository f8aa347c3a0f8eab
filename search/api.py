"""The program from Python: find a plan, write it for a backend, check what the backend makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from hwmodels import CostModel, Workload
from search.backends import backend
from search.backends.outcome import ExportReport, Validation, Verification
from search.budget import Budget
from search.config import named_hardware, named_strategy
from search.errors import ConfigError
from search.job import ExportSettings, Job, RecoverSettings, Settings, SpaceSettings, settings
from search.plan import Plan
from search.progress import Progress
from search.quality.racing import Racing
from search.quantize.settings import QuantizerSettings
from search.report import write_report
from search.run import search
from search.rundir import RunDirectory
from search.sensitivity.settings import SensitivitySettings
from search.strategies.base import Strategy
from search.tasks.function import FunctionTask
from search.tasks.task import Split, Task


def find_plan(
    model: nn.Module | Task,
    example_input: Any = None,
    calibration: Iterable[Any] | None = None,
    evaluate: Callable[[nn.Module, Split], float] | None = None,
    *,
    hardware: str | CostModel = "zen5",
    budget: Budget | Mapping[str, float] | None = None,
    strategy: str | Mapping[str, Any] | Strategy = "auto",
    space: SpaceSettings | Mapping[str, Any] | None = None,
    quantizer: QuantizerSettings | Mapping[str, str] | None = None,
    sensitivity: SensitivitySettings | Mapping[str, Any] | None = None,
    workload: Workload | None = None,
    racing: Mapping[str, Any] | Racing | None = None,
    recover: Sequence[Any] | Mapping[str, Any] | RecoverSettings = (),
    backends: Sequence[str] | Mapping[str, Any] | ExportSettings = (),
    seed: int = 0,
    run_dir: str | Path | None = None,
    progress: Progress | None = None,
    **task_settings: Any,
) -> Plan:
    """Finds the best plan for a model within a budget; the model itself is not altered.

    Args:
        model: The trained model, or a whole Task, which then brings data and metric along.
        example_input: One batch of inputs: a tensor, a tuple of positional or a mapping of keyword inputs.
        calibration: Batches of inputs in the same form, for ranges and sensitivities.
        evaluate: Returns the quality of a model on the `selection` or the `report` split.
        hardware: A device of `bitplan hardware`, the path of a device file, an option of `configs/hardware` such as
            `storage` for bytes only, or a cost model.
        budget: Limits, such as `{"size_ratio": 0.14}`; see `search.budget.Budget`. Default: none.
        strategy: A name of `configs/strategy`, such as `auto` or `haq`; a mapping with that `name` and some of its
            settings, such as `{"name": "tpe", "evaluations": 200}`; or a strategy.
        space: Formats, pins and ties; see `search.job.SpaceSettings`.
        quantizer: How ranges are chosen; see `search.quantize.simulate.QuantizerSettings`.
        sensitivity: What is scored before policies are measured; see
            `search.sensitivity.settings.SensitivitySettings`.
        workload: Batch and threads that costs are predicted for.
        racing: Races policies against better ones, such as `{"tolerance": 0.01}`; see `search.quality.racing.Racing`.
            Default: all are measured in full.
        recover: Repairs applied to the winner, such as `["gptq", {"finetune": {"steps": 200}}]`, or what
            `search.job.RecoverSettings` holds.
        backends: What the plan is for, such as `["onnxruntime"]`: the search keeps to what they store as planned, and
            `search.export` then writes it; or what `search.job.ExportSettings` holds.
        seed: Seed of the strategy.
        run_dir: Where the run's files go; name an earlier one to resume it. Default: a new folder in `runs/`.
        progress: Where to show how far it is.
        task_settings: `name`, `metric`, `higher_is_better` and `divergence` of `search.tasks.function.FunctionTask`.

    Raises:
        BitplanError: If the settings, the data or the model cannot be used, or the budget cannot be met.
    """
    if isinstance(model, Task):
        task: Task = model
    elif calibration is None or evaluate is None:
        raise ConfigError("find_plan needs `calibration` and `evaluate` beside a model, or a Task, which has both")
    else:
        task = FunctionTask(model, example_input, calibration, evaluate, **task_settings)
    job = Job(
        task=task,
        cost_model=hardware if isinstance(hardware, CostModel) else named_hardware(hardware),
        strategy=_strategy(strategy),
        budget=_settings(Budget, budget, "budget"),
        run_dir=Path(run_dir or f"runs/{datetime.now():%Y-%m-%d/%H-%M-%S-%f}"),
        space=_settings(SpaceSettings, space, "space"),
        quantizer=_settings(QuantizerSettings, _measured(quantizer), "quantizer"),
        sensitivity=_settings(SensitivitySettings, sensitivity, "sensitivity"),
        workload=workload or Workload(),
        racing=None if racing is None else _settings(Racing, racing, "racing"),
        recover=_settings(
            RecoverSettings, {"steps": list(recover)} if isinstance(recover, Sequence) else recover, "recover"
        ),
        export=_settings(
            ExportSettings, {"backends": list(backends)} if isinstance(backends, Sequence) else backends, "export"
        ),
        seed=seed,
    )
    result = search(_with_config(job), progress)
    write_report(RunDirectory(job.run_dir))
    return result.plan


def export(
    plan: Plan,
    to: str,
    model: nn.Module | Task,
    out: str | Path,
    example_input: Any = None,
    recalibrate: bool = False,
    strict: bool = False,
) -> ExportReport:
    """Writes a plan for a backend.

    Args:
        plan: The plan.
        to: Name of the backend: one of `search.backends.BACKENDS`.
        model: The float model the plan was made for, or its Task.
        out: Folder to write to: a new or empty one, or an earlier export.
        example_input: One batch of inputs; not needed with a Task.
        recalibrate: Whether the backend finds ranges of its own in place of the plan's.
        strict: Whether to refuse what the backend alters or leaves in float.

    Raises:
        BitplanError: If the model is another, or the backend cannot express the plan.
    """
    task = model if isinstance(model, Task) else _unjudged(model, example_input)
    plan.check(task.model)
    return backend(to).export(plan, task, Path(out), recalibrate, strict)


def verify(plan: Plan, backend_name: str, task: Task, out: str | Path) -> Verification | Validation:
    """Checks what `export` wrote to `out`.

    A backend that runs here runs it over the task's report split in a fresh process, beside the plan's promise; of
    others, the real package reads it.
    """
    plan.check(task.model)
    return backend(backend_name, "verify").verify(plan, task, Path(out))


def _unjudged(model: nn.Module, example_input: Any) -> Task:
    if example_input is None:
        raise ConfigError("exporting a bare model needs `example_input`, one batch of inputs")

    def refuse(model: nn.Module, split: Split) -> float:
        raise ConfigError("this task only exports; pass a Task to measure quality")

    return FunctionTask(model, example_input, [example_input], refuse)


def _strategy(strategy: str | Mapping[str, Any] | Strategy) -> Strategy:
    if isinstance(strategy, Strategy):
        return strategy
    given = {"name": strategy} if isinstance(strategy, str) else dict(strategy)
    return named_strategy(str(given.pop("name", "auto")), given)


def _settings(kind: type[Settings], given: Settings | Mapping[str, Any] | None, key: str) -> Settings:
    return given if isinstance(given, kind) else settings(kind, given or {}, key)  # type: ignore[arg-type]


def _measured(quantizer: QuantizerSettings | Mapping[str, Any] | None) -> QuantizerSettings | Mapping[str, Any]:
    """Settings of the quantizer whose repair is chosen by measuring unless the user says which."""
    return quantizer if isinstance(quantizer, QuantizerSettings) else {"repair": "auto"} | dict(quantizer or {})


def _settings_of(strategy: Strategy) -> dict[str, Any]:
    """What a strategy was built with, as JSON holds it."""
    plain = (bool, int, float, str, list, tuple, dict, type(None))
    builders = [vars(kind)["__init__"] for kind in type(strategy).__mro__ if "__init__" in vars(kind)]
    names = {name for builder in builders for name in signature(builder).parameters}
    held = {key: value for key, value in vars(strategy).items() if key in names}
    return {key: value if isinstance(value, plain) else repr(value) for key, value in held.items()}


def _with_config(job: Job) -> Job:
    """Records the settings, so that resuming with others is noticed."""
    config = {
        "hardware": job.cost_model.name,
        "strategy": {"name": job.strategy.name, **_settings_of(job.strategy)},
        "budget": asdict(job.budget),
        "space": asdict(job.space),
        "quantizer": asdict(job.quantizer),
        "sensitivity": asdict(job.sensitivity),
        "workload": asdict(job.workload),
        "racing": asdict(job.racing) if job.racing else None,
        "recover": asdict(job.recover),
        "export": asdict(job.export),
        "seed": job.seed,
        "model": type(job.task.model).__name__,
    }
    return replace(job, config=config)
