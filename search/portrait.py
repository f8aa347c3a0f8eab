"""What a tracking server is to show of a search, put together from the run directory alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from search.budget import RATIOS
from search.errors import DataError
from search.events import EventLog
from search.rundir import UNRELATED, RunDirectory, flat
from search.storages import hidden
from search.trials import Trial, spending

if TYPE_CHECKING:
    import pandas as pd

STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
"""Status in run.json to MLflow's."""

IDENTITY = ("task", "hardware", "strategy", "seed", "metric", "model", "data_fingerprint", "budget", "budget_reference")
"""Entries of run.json that become parameters, beside the configuration."""

SHARED = ("task", "hardware", "strategy", "seed", "metric", "sweep", "git_commit")
"""Entries of run.json that become tags of a search, of the plans on its front and of their models."""

COMPARED = ("task", "hardware", "strategy", "seed", "budget")
"""Entries of run.json that become parameters of a plan: what charts compare it by."""

SERIES_COSTS = ("average_weight_bits", "weight_bytes", "latency_s")
"""Costs of trials that are drawn over the search, beside those that the budget limits."""

HYPERVOLUMES = ("hypervolume", "primary_hypervolume")
"""Columns of history.csv by which searches are compared."""

UNEXPLAINED = "its process ended without saying why"

# Limits of MLflow's REST API on the length of names, parameters and tags: https://mlflow.org/docs/latest/rest-api.html
KEY_LENGTH, PARAMETER_LENGTH, TAG_LENGTH = 250, 6000, 8000


@dataclass(frozen=True)
class Point:
    """One value of a metric that changes over the search.

    Attributes:
        key: Name of the metric.
        value: A finite number.
        time: Milliseconds since 1970, reckoned from the run directory, so that it is the same at every sync.
        step: Number of the trial, or of the evaluation where searches are to be compared.
    """

    key: str
    value: float
    time: int
    step: int


@dataclass(frozen=True)
class Portrait:
    """What is to be shown of a search, or of a plan on its front.

    Attributes:
        name: The run's name, for people.
        status: RUNNING, FINISHED, FAILED or KILLED.
        started: Milliseconds since 1970.
        ended: The same; None while it runs.
        tags: What to filter and group by.
        parameters: Identity and configuration of a search, flattened; of a plan, what charts compare it by.
        values: Metrics of which there is one value: of a search, those of the plan it chose.
        series: Metrics that change over the search.
        policy: The policy of a plan on the front.
        children: The plans on the front of a search.
    """

    name: str
    status: str
    started: int
    ended: int | None
    tags: Mapping[str, str]
    parameters: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    series: tuple[Point, ...] = ()
    policy: Mapping[str, str] = field(default_factory=dict)
    children: tuple[Portrait, ...] = ()


def portray(run: RunDirectory, trials: Iterable[Trial] | None = None) -> Portrait:
    """Puts together what is to be shown of a search and of the plans on its front.

    Args:
        run: The run.
        trials: What it tried, where that is known already.

    Raises:
        DataError: If a file of the run is damaged.
    """
    info, plan = run.info(), read_plan(run)
    status = "interrupted" if info["status"] == "running" and not run.is_claimed else info["status"]
    started, ended = _milliseconds(info["started"]), None
    if status != "running":
        ended = _milliseconds(info.get("finished") or run.file("run.json").stat().st_mtime)
    trials = run.trials() if trials is None else list(trials)
    history = run.table("history.csv")
    series = [*trial_points(trials, started, info["budget"])]
    series += best_points(trials, started, info["higher_is_better"], is_over=status == "finished")
    totals = {"evaluations": info.get("evaluations"), "wall_seconds": info.get("seconds")}
    totals["rank_correlation"] = info.get("rank_correlation")
    if history is not None and len(history):
        series += history_points(history, started)
        totals["seconds"] = history.iloc[-1]["seconds"]
    tags = {name: _text(info[name], TAG_LENGTH) for name in SHARED if info.get(name) is not None}
    tags |= {"model": info["model"]["fingerprint"], "data": info["data_fingerprint"]}
    tags["bitplan.run_id"] = info["run_id"]
    return Portrait(
        name=f"{' '.join(str(info[name]) for name in ('task', 'hardware', 'strategy'))} "
        f"{_budget(info)}seed {info['seed']}",
        status=STATUS[status],
        started=started,
        ended=ended,
        tags={**tags, **_outcome(run, info, status), **_source(run, tags), "role": "search"},
        parameters=parameters(info),
        values=dict(_known(winner_values(plan) | totals)),
        series=tuple(series),
        children=front_portraits(
            run, info, plan, tags, started, _milliseconds(info.get("finished") or info["started"])
        ),
    )


def read_plan(run: RunDirectory) -> dict[str, Any] | None:
    """What plan.json says, without its tensors; None while there is no plan.

    Raises:
        DataError: If the file is damaged.
    """
    path = run.file("plan.json")
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); repeat the run's command with run_dir={run.path}") from error


def parameters(info: Mapping[str, Any]) -> dict[str, str]:
    """The run's identity and its configuration, flattened, in the characters and lengths MLflow allows.

    Settings that may change when a run is resumed are left out, because MLflow's parameters never change.
    """
    config = {key: value for key, value in info["config"].items() if key not in UNRELATED}
    return _parameters({name: info[name] for name in IDENTITY}) | _parameters(config)


def trial_points(trials: Iterable[Trial], started: int, budget: Mapping[str, Any]) -> Iterator[Point]:
    """Quality, drop, seconds and costs of every trial at the step of its number.

    Estimates of stopped trials stand apart: they are not to be drawn beside full measurements.
    """
    costs = dict.fromkeys([*SERIES_COSTS, *(RATIOS.get(name, name) for name in budget)])
    elapsed = 0.0
    for trial in trials:
        elapsed += trial.seconds + trial.proposing_seconds
        prefix = "stopped" if trial.state == "stopped" else "trial"
        values = {f"{prefix}/{name}": trial.metrics.get(name) for name in ("quality", "drop")}
        values |= {f"{prefix}/seconds": trial.seconds} | {f"{prefix}/{name}": trial.cost.get(name) for name in costs}
        if trial.is_measured:
            for key, value in _known(values):
                yield Point(_key(key), value, started + _milliseconds(elapsed), trial.number)


def best_points(trials: Iterable[Trial], started: int, higher_is_better: bool, is_over: bool) -> Iterator[Point]:
    """The best quality measured in full so far, at the step of the evaluation, counted from 1.

    Searches can be compared at equal evaluations: a trial over budget has a number, too, but spends none.

    Args:
        trials: What was tried.
        started: When the search began, in milliseconds since 1970.
        higher_is_better: Which qualities are better.
        is_over: Whether the search is over, so that the last value is the final one.
    """
    points, best = [], None
    for trial, evaluations, seconds in spending(trials):
        if trial.is_whole:
            best = trial.quality if best is None else (max if higher_is_better else min)(best, trial.quality)
            points.append(Point("best_quality", best, started + _milliseconds(seconds), math.ceil(evaluations)))
    return corners(points, is_over)


def history_points(history: pd.DataFrame, started: int) -> Iterator[Point]:
    """The least loss and the hypervolumes so far, from history.csv, at the step of the evaluation, counted from 1."""
    rows = history.to_dict("records")
    for key in ("best_loss", *HYPERVOLUMES):
        yield from corners(
            Point(key, row[key], started + _milliseconds(row["seconds"]), math.ceil(row["evaluations"]))
            for row in rows
            if math.isfinite(row[key])
        )


def corners(points: Iterable[Point], with_last: bool = True) -> Iterator[Point]:
    """Leaves of a series what a chart of it needs: where its value changes, the point before that, and the last.

    The best of a thousand trials changes a few dozen times.

    Args:
        points: A series.
        with_last: Whether its end is to be shown, too.
    """
    points = list(points)
    for number, point in enumerate(points):
        rises = number == 0 or point.value != points[number - 1].value
        is_last = number == len(points) - 1
        if rises or (with_last if is_last else points[number + 1].value != point.value):
            yield point


def winner_values(plan: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the plan promises: its quality on the report split, and its costs in SI units and as shares of float's."""
    if plan is None:
        return {}
    quality = plan["quality"]
    values = {
        "quality": quality["value"],
        "float_quality": quality["float_value"],
        "selection_quality": plan["selection"]["value"],
        "selection_drop": _selection_drop(plan, plan["selection"]["value"]),
        **{name: quality[name] for name in ("drop", "drop_low", "drop_high")},
        **{name: plan[name] for name in ("average_weight_bits", "effective_bits")},
        **{name: cost["value"] for name, cost in plan["cost"].items()},
    }
    return plan_values(values, plan)


def plan_values(values: Mapping[str, Any], plan: Mapping[str, Any] | None) -> dict[str, Any]:
    """Adds to what is known of a plan what budgets are about.

    That is its shares of the float network's costs, and `certain_drop`: the most that the drop may be by its 95%
    interval, or the drop itself where there is none.

    Args:
        values: Quality and costs of the plan.
        plan: The search's chosen plan, which knows the float network's costs.
    """
    found = {name: value for name, value in values.items() if _is_known(value)}
    for ratio, cost in RATIOS.items():
        reference = plan["cost"].get(cost, {}).get("reference") if plan else None
        if reference and cost in found:
            found[ratio] = found[cost] / reference
    if "drop" in found:
        found["certain_drop"] = found.get("drop_high", found["drop"])
    return found


def front_portraits(
    run: RunDirectory,
    info: Mapping[str, Any],
    plan: Mapping[str, Any] | None,
    tags: Mapping[str, str],
    started: int,
    ended: int,
) -> tuple[Portrait, ...]:
    """One portrait per row of front.csv that a trial stands behind: the front, and the winner with all its repairs."""
    table = run.table("front.csv")
    rows = [] if table is None else table[table["role"].isin(["front", "winner"])].to_dict("records")
    own = {"budget": _budget(info).strip(), "workload": _workload(plan)} if plan else {}
    return tuple(
        Portrait(
            name=f"{'winner, ' * (row['role'] == 'winner')}{row['name']}, {row['average_weight_bits']:.2f} bits",
            status="FINISHED",
            started=started,
            ended=ended,
            tags={
                **tags,
                **own,
                "bitplan.run_dir": str(run.path.resolve()),
                "trial": str(int(row["trial"])),
                **{key: row[key] for key in ("role", "digest", "verdict")},
            },
            parameters=_parameters({name: info[name] for name in COMPARED}),
            values=dict(_known(_member_values(row, plan))),
            policy=json.loads(row["policy"]),
        )
        for row in rows
    )


def _member_values(row: Mapping[Any, Any], plan: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is known of a row of front.csv; of the winner's, what the plan promises after all repairs."""
    values = {str(name): value for name, value in row.items() if name not in ("trial", "predicted_loss", "samples")}
    if plan and _is_known(values.get("selection_quality")):
        values["selection_drop"] = _selection_drop(plan, values["selection_quality"])
    return plan_values(values, plan) | (winner_values(plan) if row["role"] == "winner" else {})


def _selection_drop(plan: Mapping[str, Any], quality: float) -> float:
    """How much worse a quality on the selection split is than the float network's there."""
    chosen = plan["selection"]
    worse: float = chosen["float_value"] - quality
    return worse if chosen["higher_is_better"] else -worse


def _outcome(run: RunDirectory, info: Mapping[str, Any], status: str) -> dict[str, str]:
    """What came of a search: the chosen plan's digest and verdict, or why it ended without one."""
    found = {name: str(info[name]) for name in ("digest", "verdict") if info.get(name)}
    if _budget(info):
        found["budget"] = _budget(info).strip()
    if "front_costs" in info:
        found["front_costs"] = ", ".join(info["front_costs"])
    if status in ("failed", "interrupted"):
        found["error"] = _text(_reason(run, info["status"]), TAG_LENGTH)
    return found


def _reason(run: RunDirectory, status: str) -> str:
    """Why a search ended early, by the last that its log says of such an end; `status` is what run.json says."""
    kinds = {"failed": ("failed",), "interrupted": ("interrupted", "stopped")}.get(status, ())
    events = EventLog(run.file("log.jsonl")).read() if run.file("log.jsonl").is_file() else []
    ends = [event for event in events if event["event"] in kinds]
    if ends and ends[-1]["event"] == "stopped":
        return "stopped early"
    return str(ends[-1].get("error", UNEXPLAINED)) if ends else UNEXPLAINED


def _source(run: RunDirectory, tags: Mapping[str, str]) -> dict[str, str]:
    found = {"mlflow.source.name": "bitplan", "bitplan.run_dir": str(run.path.resolve())}
    return found | ({"mlflow.source.git.commit": tags["git_commit"]} if "git_commit" in tags else {})


def _budget(info: Mapping[str, Any]) -> str:
    """The limits as a part of a name, such as `size_ratio=0.14 `; empty where there are none."""
    given, reference = info["budget"], info["budget_reference"]
    said = f"reference={reference} " * (reference != "float" and not RATIOS.keys().isdisjoint(given))
    return "".join(f"{name}={limit:g} " for name, limit in given.items()) + said


def _workload(plan: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in plan["workload"].items())


def _parameters(tree: Mapping[str, Any]) -> dict[str, str]:
    return {
        _key(key): _text(hidden(value) if isinstance(value, str) else value, PARAMETER_LENGTH)
        for key, value in flat(tree).items()
    }


def _known(values: Mapping[Any, Any]) -> Iterator[tuple[str, float]]:
    """Yields the entries that are finite numbers; a tracking server has no place for an unknown value."""
    for key, value in values.items():
        if _is_known(value):
            yield str(key), float(value)


def _is_known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _key(name: str) -> str:
    return re.sub(r"[^\w.\- :/]", "_", name)[:KEY_LENGTH]


def _text(value: Any, length: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
