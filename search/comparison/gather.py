"""What a comparison knows of each run, read from its directory: whole, on its way, failed, or partly damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from search.errors import DAMAGED, DataError, one_line
from search.events import EventLog
from search.figures.style import layer_kind
from search.plan import Plan
from search.rundir import RunDirectory, flat
from search.trials import spending
from search.units import COST_NAMES

if TYPE_CHECKING:
    import pandas as pd

Found = TypeVar("Found")

KILLED = "it was killed"
"""Why a run ended of which nobody could write that it did."""


@dataclass(frozen=True)
class FrontPoint:
    """A row of front.csv.

    Attributes:
        role: `float`, `uniform`, `front` or `winner`.
        name: What to call it.
        digest: The policy's digest.
        quality: Quality on the report split.
        low: Lower end of its 95% interval: the float network's quality less the drop's upper end. NaN without one, as
            for the float network, whose drop from itself is 0 whatever the samples.
        high: Upper end likewise.
        costs: The costs that are known, in SI units.
    """

    role: str
    name: str
    digest: str
    quality: float
    low: float
    high: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Growth:
    """How a search went: one entry for every trial that spent evaluations, as `search.history.history_table` has them.

    Attributes:
        evaluations: Evaluations spent by its end.
        seconds: Seconds of measuring and proposing spent by its end.
        best_loss: The least loss so far within the budget; NaN before there is one.
        hypervolume: What a front about quality and the primary cost covers; NaN where it is not defined.
    """

    evaluations: tuple[float, ...]
    seconds: tuple[float, ...]
    best_loss: tuple[float, ...]
    hypervolume: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """One search.

    Attributes:
        path: Its directory.
        run_id: Its identity, which copies share.
        task: Name of the task.
        metric: Name of the quality.
        higher_is_better: Whether more of it is better.
        model: Fingerprint of the model.
        data: Fingerprint of the data.
        hardware: Name of the device.
        strategy: Name of the strategy.
        seed: Its seed.
        budget: The limits as they were given.
        reference: What ratios of the budget refer to.
        config: Every setting by its dotted key; empty where the search was called without a configuration.
        status: `running`, `finished`, `failed` or `interrupted`; the last, too, where it was killed.
        reason: Why it failed or was interrupted; empty otherwise, and where nothing is known.
        evaluations: Evaluations spent so far; None where the run does not say.
        seconds: How long the search took; None while it is not finished.
        limits: The budget's limits on costs in SI units; empty until the search is finished.
        primary_cost: The cost that the budget is about; empty until the search is finished.
        front: The rows of front.csv; empty until the search is finished.
        growth: How it went; None until the search is finished.
        plan: The plan; None while there is none.
        kinds: What legends call the kind of each layer.
        problems: What could not be read, and why.
    """

    path: Path
    run_id: str
    task: str
    metric: str
    higher_is_better: bool
    model: str
    data: str
    hardware: str
    strategy: str
    seed: int
    budget: Mapping[str, float]
    reference: str
    config: Mapping[str, Any]
    status: str
    reason: str
    evaluations: float | None
    seconds: float | None
    limits: Mapping[str, float]
    primary_cost: str
    front: tuple[FrontPoint, ...]
    growth: Growth | None
    plan: Plan | None
    kinds: Mapping[str, str]
    problems: tuple[str, ...]

    @property
    def drop_limit(self) -> float | None:
        """The drop of quality that the budget allows; None where it limits costs alone."""
        return self.budget.get("quality_drop")

    @property
    def loss_kind(self) -> str:
        """What the search made small: `drop` of quality, or the primary cost where the budget limits the drop."""
        return "drop" if self.drop_limit is None else self.primary_cost

    @property
    def hypervolume(self) -> float | None:
        """How much of quality and the primary cost the front covers in the end; None where the run does not say."""
        known = [value for value in self.growth.hypervolume if not math.isnan(value)] if self.growth else []
        return known[-1] if known else None


@dataclass(frozen=True)
class Gathered:
    """What was found in the directories.

    Attributes:
        runs: The runs, each once.
        copies: How many directories held a further copy of one of them, as MLflow keeps among its artifacts.
        notes: On every directory whose run cannot be shown.
    """

    runs: tuple[Run, ...]
    copies: int
    notes: tuple[str, ...]


def gather(directories: Iterable[RunDirectory]) -> Gathered:
    """Reads runs; of copies of one run the first that has a report, else the one at work, else the first."""
    runs: dict[str, Run] = {}
    copies, notes = 0, []
    for directory in sorted(
        directories, key=lambda each: (not each.file("report.html").is_file(), not each.is_claimed)
    ):
        try:
            run = read_run(directory)
        except DAMAGED as error:
            notes.append(f"{directory.path} is left out: its run.json cannot be read ({_in_words(error)})")
            continue
        copies += run.run_id in runs
        runs.setdefault(run.run_id, run)
    return Gathered(tuple(runs.values()), copies, tuple(notes))


def read_run(directory: RunDirectory) -> Run:
    """Reads a run; a file beside run.json that is damaged becomes one of its problems.

    Raises:
        DataError: If run.json is damaged; or an error of `DAMAGED`.
    """
    about = directory.info()
    problems: list[str] = []

    def attempt(file: str, read: Callable[[], Found], otherwise: Found) -> Found:
        try:
            return read() if directory.file(file).is_file() else otherwise
        except DAMAGED as error:
            problems.append(f"{file} cannot be read ({_in_words(error)})")
            return otherwise

    status, reason = str(about["status"]), ""
    if status in ("failed", "interrupted"):
        reason = attempt("log.jsonl", lambda: _reason(directory), "")
    elif status == "running" and not directory.is_claimed:
        status, reason = "interrupted", KILLED
    return Run(
        path=directory.path,
        run_id=str(about["run_id"]),
        task=str(about["task"]),
        metric=str(about["metric"]),
        higher_is_better=bool(about["higher_is_better"]),
        model=str(about["model"]["fingerprint"]),
        data=str(about["data_fingerprint"]),
        hardware=str(about["hardware"]),
        strategy=str(about["strategy"]),
        seed=int(about["seed"]),
        budget=dict(about["budget"]),
        reference=str(about["budget_reference"]),
        config=flat(about.get("config") or {}),
        status=status,
        reason=reason,
        evaluations=_evaluations(directory, about, attempt),
        seconds=about.get("seconds"),
        limits=dict(about.get("limits") or {}),
        primary_cost=str(about.get("primary_cost") or ""),
        front=attempt("front.csv", lambda: _front(directory.table("front.csv"), bool(about["higher_is_better"])), ()),
        growth=attempt("history.csv", lambda: _growth(directory.table("history.csv")), None),
        plan=attempt("plan.json", lambda: _plan(directory.file("plan.json")), None),
        kinds=attempt("layers.json", lambda: {str(row["name"]): layer_kind(row) for row in directory.layers()}, {}),
        problems=tuple(problems),
    )


def _in_words(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return next(iter(one_line(error).split("; ")), "") or type(error).__name__


def _evaluations(
    directory: RunDirectory, about: Mapping[str, Any], attempt: Callable[..., float | None]
) -> float | None:
    """Evaluations spent: what the run says in the end, else what its trials add up to."""
    if about["status"] == "finished" and "evaluations" in about:
        return float(about["evaluations"])
    return attempt(
        "trials.jsonl", lambda: max((step.evaluations for step in spending(directory.trials())), default=0.0), None
    )


def _reason(directory: RunDirectory) -> str:
    """The last error that the run's log tells of."""
    errors = [row for row in EventLog(directory.file("log.jsonl")).read() if row.get("error")]
    if not errors:
        return ""
    error, kind = str(errors[-1]["error"]), errors[-1].get("kind")
    words = error.removeprefix(f"{kind}:").strip()
    return words or (str(kind) if errors[-1]["event"] == "failed" else "")


def _plan(path: Path) -> Plan:
    """The plan without its tensors, which a comparison does not need, and which need not have been copied."""
    return Plan.model_validate(json.loads(path.read_text(encoding="utf-8")))


def _front(table: pd.DataFrame | None, higher_is_better: bool) -> tuple[FrontPoint, ...]:
    if table is None:
        return ()
    rows = [{name: value for name, value in row.items() if value == value} for row in table.to_dict("records")]
    sign = 1 if higher_is_better else -1
    float_quality = next((row["quality"] for row in rows if row["role"] == "float"), None)
    if float_quality is None:
        raise DataError("it has no row of the float network")
    points = []
    for row in rows:
        drops = {} if row["role"] == "float" else row
        ends = [float_quality - sign * drops.get(end, math.nan) for end in ("drop_low", "drop_high")]
        points.append(
            FrontPoint(
                role=str(row["role"]),
                name=str(row["name"]).removeprefix("uniform "),
                digest=str(row["digest"]),
                quality=float(row["quality"]),
                low=min(ends),
                high=max(ends),
                costs={str(name): float(row[name]) for name in COST_NAMES if name in row},
            )
        )
    return tuple(points)


def _growth(table: pd.DataFrame | None) -> Growth | None:
    if table is None:
        return None
    primary = "primary_hypervolume" if "primary_hypervolume" in table else "hypervolume"
    return Growth(*(_column(table, name) for name in ("evaluations", "seconds", "best_loss", primary)))


def _column(table: pd.DataFrame, name: str) -> tuple[float, ...]:
    return tuple(float(value) for value in table[name])
