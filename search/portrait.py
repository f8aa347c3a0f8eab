"""What a tracking server is to show of a search, put together from the run directory alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from search.history import spending
from search.plan import Plan
from search.rundir import UNRELATED, RunDirectory, flat
from search.trials import Trial

if TYPE_CHECKING:
    import pandas as pd

STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
"""Status in run.json to MLflow's."""

IDENTITY = ("task", "hardware", "strategy", "seed", "metric", "model", "data_fingerprint", "budget", "budget_reference")
"""Entries of run.json that become parameters, beside the configuration."""

HYPERVOLUMES = ("hypervolume", "primary_hypervolume")
"""Columns of history.csv by which searches are compared."""

# Limits of MLflow's REST API on the length of names, parameters and tags: https://mlflow.org/docs/latest/rest-api.html
KEY_LENGTH, PARAMETER_LENGTH, TAG_LENGTH = 250, 6000, 8000


@dataclass(frozen=True)
class Point:
    """One value of a metric.

    Attributes:
        key: Name of the metric.
        value: A finite number.
        time: Milliseconds since 1970, reckoned from the run directory, so that it is the same at every sync.
        step: Number of the trial, or of the evaluation where searches are to be compared; 0 for what there is one of.
    """

    key: str
    value: float
    time: int
    step: int = 0


@dataclass(frozen=True)
class Portrait:
    """What is to be shown of a search, or of a plan on its front.

    Attributes:
        name: The run's name, for people.
        status: RUNNING, FINISHED, FAILED or KILLED.
        started: Milliseconds since 1970.
        ended: The same; None while it runs.
        tags: What to filter and group by.
        points: Metrics.
        parameters: Identity and configuration of a search, flattened.
        policy: The policy of a plan on the front.
        children: The plans on the front of a search.
    """

    name: str
    status: str
    started: int
    ended: int | None
    tags: Mapping[str, str]
    points: tuple[Point, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    policy: Mapping[str, str] = field(default_factory=dict)
    children: tuple[Portrait, ...] = ()


def portray(run: RunDirectory) -> Portrait:
    """Puts together what is to be shown of a search and of the plans on its front.

    Raises:
        DataError: If a file of the run is damaged.
    """
    info, plan = run.info(), run.plan()
    started, ended = _milliseconds(info["started"]), None
    if info["status"] != "running":
        ended = _milliseconds(info.get("finished") or run.file("run.json").stat().st_mtime)
    shared = ("task", "hardware", "strategy", "seed", "git_commit")
    tags = {name: _text(info[name], TAG_LENGTH) for name in shared if info.get(name) is not None}
    tags["bitplan.run_id"] = info["run_id"]
    outcome = {name: info[name] for name in ("digest", "verdict") if info.get(name)}
    if "front_costs" in info:
        outcome["front_costs"] = ", ".join(info["front_costs"])
    source = {"mlflow.source.name": "bitplan", "bitplan.run_dir": str(run.path.resolve())}
    if "git_commit" in tags:
        source["mlflow.source.git.commit"] = tags["git_commit"]
    trials, history = run.trials(), run.table("history.csv")
    points = [*trial_points(trials, started), *best_points(trials, started, info["higher_is_better"])]
    points += [Point(f"winner/{key}", value, ended or started) for key, value in _known(winner_values(plan))]
    totals = {f"search/{name}": info.get(name) for name in ("evaluations", "seconds", "rank_correlation")}
    if history is not None and len(history):
        points += history_points(history, started)
        last = history.iloc[-1]
        totals |= {"search/spent_seconds": last["seconds"], **{f"search/{key}": last[key] for key in HYPERVOLUMES}}
    points += [Point(key, value, ended or started) for key, value in _known(totals)]
    return Portrait(
        name=f"{info['task']} {info['hardware']} {info['strategy']} seed {info['seed']}",
        status=STATUS[info["status"]],
        started=started,
        ended=ended,
        tags={**tags, **outcome, **source, "role": "search"},
        points=tuple(points),
        parameters=parameters(info),
        children=front_portraits(run, tags, started, ended or started),
    )


def parameters(info: Mapping[str, Any]) -> dict[str, str]:
    """The run's identity and its configuration, flattened, in the characters and lengths MLflow allows.

    Settings that may change when a run is resumed are left out, because MLflow's parameters never change.
    """
    config = {key: value for key, value in info["config"].items() if key not in UNRELATED}
    values = flat({name: info[name] for name in IDENTITY}) | flat(config)
    return {_key(key): _text(value, PARAMETER_LENGTH) for key, value in values.items()}


def trial_points(trials: Iterable[Trial], started: int) -> Iterator[Point]:
    """The metrics and costs of every trial at the step of its number."""
    elapsed = 0.0
    for trial in trials:
        elapsed += trial.seconds + trial.proposing_seconds
        values = {"seconds": trial.seconds, "fidelity": trial.fidelity, **trial.cost}
        prefix = "stopped/" if trial.state == "stopped" else ""  # estimates, not to be drawn beside full measurements
        values |= {f"{prefix}{key}": value for key, value in trial.metrics.items()}
        for key, value in _known(values):
            yield Point(_key(key), value, started + _milliseconds(elapsed), trial.number)


def best_points(trials: Iterable[Trial], started: int, higher_is_better: bool) -> Iterator[Point]:
    """The best quality measured in full so far, at the step of the evaluation, counted from 1.

    Searches can be compared at equal evaluations: a trial over budget has a number, too, but spends none.
    """
    best = None
    for trial, evaluations, seconds in spending(trials):
        if trial.is_whole:
            best = trial.quality if best is None else (max if higher_is_better else min)(best, trial.quality)
            yield Point("best_quality", best, started + _milliseconds(seconds), math.ceil(evaluations))


def history_points(history: pd.DataFrame, started: int) -> Iterator[Point]:
    """The least loss and the hypervolumes so far, from history.csv, at the step of the evaluation, counted from 1."""
    for row in history.to_dict("records"):
        time, step = started + _milliseconds(row["seconds"]), math.ceil(row["evaluations"])
        for key, value in _known({key: row[key] for key in ("best_loss", *HYPERVOLUMES)}):
            yield Point(key, value, time, step)


def winner_values(plan: Plan | None) -> dict[str, float | None]:
    """What the plan promises: its quality on the report split, and its costs in SI units."""
    if plan is None:
        return {}
    return {
        "quality": plan.quality.value,
        "float_quality": plan.quality.float_value,
        "drop": plan.quality.drop,
        "drop_low": plan.quality.drop_low,
        "drop_high": plan.quality.drop_high,
        "selection_quality": plan.selection.value,
        "selection_drop": plan.selection.drop,
        "average_weight_bits": plan.average_weight_bits,
        "effective_bits": plan.effective_bits,
        **{name: cost.value for name, cost in plan.cost.items()},
    }


def front_portraits(run: RunDirectory, tags: Mapping[str, str], started: int, ended: int) -> tuple[Portrait, ...]:
    """One portrait per row of front.csv that a trial stands behind: the front and the winner."""
    table = run.table("front.csv")
    rows = [] if table is None else table[table["role"].isin(["front", "winner"])].to_dict("records")
    return tuple(
        Portrait(
            name=f"{'winner, ' * (row['role'] == 'winner')}{row['name']}, {row['average_weight_bits']:.2f} bits",
            status="FINISHED",
            started=started,
            ended=ended,
            tags={**tags, "trial": str(int(row["trial"])), **{key: row[key] for key in ("role", "digest", "verdict")}},
            points=tuple(Point(key, value, ended) for key, value in _known(row) if key != "trial"),
            policy=json.loads(row["policy"]),
        )
        for row in rows
    )


def _known(values: Mapping[Any, Any]) -> Iterator[tuple[str, float]]:
    """Yields the entries that are finite numbers; a tracking server has no place for an unknown value."""
    for key, value in values.items():
        if isinstance(value, (int, float)) and math.isfinite(value):
            yield str(key), float(value)


def _key(name: str) -> str:
    return re.sub(r"[^\w.\- :]", "_", name)[:KEY_LENGTH]


def _text(value: Any, length: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)
