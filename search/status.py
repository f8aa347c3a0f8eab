"""How far runs are, read off their directories while they go on: light, and forgiving towards files in the making.

State is what run.json says, but for a run that says `running`: its process is asked for by the run's claim, and where
that cannot tell (another machine, no locks), the last sign of life decides: an event of the log, a file that changed,
or a worker's beat. Clocks of machines differ, so ages are what they seem to be from here.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from search.claims import CLAIM, SILENCE_S, is_claimed
from search.errors import DAMAGED, BitplanError, DataError, one_line
from search.events import read_events
from search.headway import Goal, Headway, duration
from search.policy import Policy
from search.rundir import MOVE_AWAY, RunDirectory
from search.trials import Trial

RunState = Literal["running", "finished", "interrupted", "failed", "dead", "damaged"]
STATES: tuple[RunState, ...] = ("running", "finished", "interrupted", "failed", "dead", "damaged")
"""At work; done; stopped by the user; ended by an error; says that it is running, but is not; its files are no use."""

NEEDY = ("interrupted", "failed", "dead", "damaged")
"""States of runs that are not done and will not go on by themselves."""

PATIENCE_S, PATIENCE = 900.0, 10
"""A run that shows no sign of life is taken for dead after so long, or after so many times its longest silence."""

SKEW_S = 5.0
"""By how much a sign of life may lie in the future before clocks are said to differ."""

SILENT_S = 10.0
"""Seconds without a beat after which a worker is called silent."""

NOBODY = Policy({})


@dataclass(frozen=True)
class WorkerStatus:
    """A worker of a search, as it says itself.

    Attributes:
        name: What it is called.
        doing: What it does now, in words.
        done: Pieces of work it has done; None where it does not say.
        beat_s: Seconds since it was last heard of.
    """

    name: str
    doing: str
    done: int | None
    beat_s: float


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        path: The run directory.
        state: What becomes of it; see `STATES`.
        about: Task, hardware, strategy, seed and the like, as far as the run says.
        stage: The stage it is in, or was in when it ended; None where it has not begun.
        stage_s: Seconds since that began; None when it is not running.
        steps: Done and total steps of the stage, where they are counted and it is not policies that are measured.
        evaluations: Evaluations done.
        allowance: Evaluations it may spend; None where the run does not say.
        trials: Policies tried, those over budget counted.
        best: The best trial so far: its number, quality, drop and primary cost; None while there is none.
        best_text: The same in words.
        evaluations_per_s: How fast it measures now; None when it does not.
        left_s: Seconds until all evaluations are spent, or the stage's steps done; None where that cannot be told.
        workers: Those who work for it.
        sign_s: Seconds since the last sign of life; None where there was none.
        error: What ended it, or went wrong last; None where nothing did.
        notes: What is worth knowing, such as damaged files.
    """

    path: Path
    state: RunState
    about: Mapping[str, Any]
    stage: str | None = None
    stage_s: float | None = None
    steps: tuple[float, float] | None = None
    evaluations: float = 0.0
    allowance: float | None = None
    trials: int = 0
    best: Mapping[str, Any] | None = None
    best_text: str = ""
    evaluations_per_s: float | None = None
    left_s: float | None = None
    workers: tuple[WorkerStatus, ...] = ()
    sign_s: float | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The status as JSON holds it."""
        row = asdict(self)
        del row["best_text"]
        return {**row, "path": str(self.path)}


def read_status(run: RunDirectory, now: float | None = None) -> RunStatus:
    """Reads how far a run is; one whose files are no use is `damaged`, and says why.

    Args:
        run: Its directory.
        now: Seconds since 1970; by default the time it is.
    """
    try:
        return _read(run, run.info(), time.time() if now is None else now)
    except DAMAGED as error:
        return RunStatus(run.path, "damaged", {}, error=_why(error))


def _read(run: RunDirectory, info: Mapping[str, Any], now: float) -> RunStatus:
    """Reads how far a run is.

    Raises:
        Exception: Any of `DAMAGED`, where its files are no use.
    """
    config = _mapping(run, info, "config")
    strategy = _mapping(run, config, "config.strategy")
    budget = _mapping(run, info, "budget")
    _number(run, info, "seconds")
    _number(run, budget, "budget.quality_drop")
    allowance = _number(run, strategy, "config.strategy.evaluations")
    seconds = _number(run, strategy, "config.strategy.seconds")
    goal = Goal.of(budget, f"{info.get('metric') or 'quality'}")
    names = ("task", "hardware", "strategy", "seed", "metric", "budget", "digest", "verdict", "seconds", "stopped")
    about = {name: info[name] for name in names if info.get(name) is not None}
    events = [event for event in read_events(run.file("log.jsonl")) if _is_number(event.get("time", 0.0))]
    rows, damaged = _rows(run.file("trials.jsonl"))
    notes = [f"{damaged} damaged lines of trials.jsonl are left out"] if damaged else []

    clock = Replay(now)
    overall, headway = (Headway(allowance, goal, seconds, clock) for _ in range(2))
    trials = {}
    for row in rows:
        trial = _trial(row, goal)
        if trial is None:
            notes.append("a line of trials.jsonl is no trial and left out")
            continue
        trials[trial.number] = trial
        overall.trial(trial, known=True)
    session = _last_session(events)
    for event in session:
        clock.now = event.get("time", clock.now)
        with suppress(*DAMAGED):  # of an event that is not what its name says
            _replay(headway, event, trials)
    clock.now = now

    signs = [event["time"] for event in events[-1:] if "time" in event] + _touched(run)
    sign_s = now - max(signs) if signs else None
    if sign_s is not None and sign_s < -SKEW_S:
        notes.append(f"clocks differ: the last sign of life lies {-sign_s:.0f} s in the future")
    state, why = _state(run, f"{info.get('status')}", events, sign_s)
    is_running = state == "running"
    workers = tuple(_workers(run, now)) if is_running else ()
    best = overall.best
    steps = (headway.done, headway.total) if headway.total is not None and not headway.is_measuring else None
    return RunStatus(
        path=run.path,
        state=state,
        about=about,
        stage=headway.stage_name if session else None,
        stage_s=max(headway.stage_s, 0.0) if is_running and session else None,
        steps=steps,
        evaluations=max(overall.evaluations, headway.evaluations),
        allowance=allowance,
        trials=len(rows),
        best=None
        if best is None
        else {
            "trial": best.number,
            "quality": best.quality,
            "drop": best.drop,
            goal.primary_cost: best.cost.get(goal.primary_cost),
        },
        best_text="" if best is None else ", ".join(goal.describe(best)),
        evaluations_per_s=headway.speed if is_running and headway.is_measuring else None,
        left_s=headway.left_s if is_running else None,
        workers=workers,
        sign_s=None if sign_s is None else max(sign_s, 0.0),
        error=why or _error(session),
        notes=tuple(dict.fromkeys(notes)),
    )


def _why(error: Exception) -> str:
    """Why the files of a run are no use, on one line."""
    if isinstance(error, (BitplanError, OSError)):
        return one_line(error)
    said = f"it has no {error}" if isinstance(error, KeyError) else one_line(error) or type(error).__name__
    return f"a file of it is damaged ({said}); {MOVE_AWAY}"


def _mapping(run: RunDirectory, holder: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object in run.json of that dotted name, whose last part `holder` holds; empty where there is none.

    Raises:
        DataError: If it is something else.
    """
    value = holder.get(name.rpartition(".")[2])
    if value is not None and not isinstance(value, Mapping):
        raise DataError(f"run.json of {run.path} is damaged: {name} is {value!r}, and should be an object; {MOVE_AWAY}")
    return value or {}


def _number(run: RunDirectory, holder: Mapping[str, Any], name: str) -> float | None:
    """The number in run.json of that dotted name, whose last part `holder` holds; None where there is none.

    Raises:
        DataError: If it is something else.
    """
    value = holder.get(name.rpartition(".")[2])
    if value is not None and not _is_number(value):
        raise DataError(f"run.json of {run.path} is damaged: {name} is {value!r}, and should be a number; {MOVE_AWAY}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def totals(statuses: Iterable[RunStatus]) -> dict[RunState, int]:
    """How many runs are in each state, without those in which there is none."""
    counted = Counter(status.state for status in statuses)
    return {state: counted[state] for state in STATES if counted[state]}


class Replay:
    """A clock that shows what it is told."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a log, and how many of its lines are damaged; one that is being written is neither."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return [], 0
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows, len(lines) - len(rows)


def _trial(row: Mapping[str, Any], goal: Goal) -> Trial | None:
    """A trial without its policy, which takes long to read; None where the row is none."""
    with suppress(*DAMAGED):
        known = {name: row[name] for name in ("fidelity", "metrics", "cost", "seconds", "state")}
        proposing = row.get("proposing_seconds", 0.0)
        trial = Trial(number=int(row["number"]), policy=NOBODY, proposing_seconds=proposing, **known)
        Headway(None, goal).trial(trial, known=True)
        if trial.is_whole:
            goal.describe(trial)
        return trial
    return None


def _last_session(events: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The events since the run was started or resumed last."""
    starts = [at for at, event in enumerate(events) if event["event"] in ("started", "resumed")]
    return events[starts[-1] :] if starts else events


def _replay(headway: Headway, event: Mapping[str, Any], trials: Mapping[int, Trial]) -> None:
    """Tells an account what a log tells."""
    kind = event["event"]
    if kind == "stage":
        headway.stage(f"{event.get('name')}")
    elif kind == "step" and _is_number(event["done"]) and _is_number(event["total"]):
        headway.step(event["done"], event["total"])
    elif kind == "trial" and event.get("number") in trials:
        headway.trial(trials[event["number"]], bool(event.get("known")))


def _state(
    run: RunDirectory, said: str, events: Sequence[Mapping[str, Any]], sign_s: float | None
) -> tuple[RunState, str | None]:
    """The state of a run, and why it is taken for dead."""
    if said in ("finished", "interrupted", "failed"):
        return said, None  # type: ignore[return-value]
    if said != "running":
        return "damaged", f"run.json says status {said!r}"
    claim = run.file(CLAIM)
    if is_claimed(run.path):
        if claim.exists() and time.time() - claim.stat().st_mtime > 2 * SILENCE_S:
            return "dead", "it says that it is running, but its process no longer beats"
        return "running", None
    host, process = (events[-1].get(name) for name in ("host", "process")) if events else (None, None)
    if host in (None, socket.gethostname()):
        return "dead", f"it says that it is running, but its process{f' {process}' if process else ''} is gone"
    times = [event["time"] for event in events if "time" in event]
    longest = max((after - before for before, after in pairwise(times)), default=0.0)
    if sign_s is None or sign_s > max(PATIENCE_S, PATIENCE * longest):
        return "dead", f"it says that it is running on {host}, but shows no sign of life"
    return "running", None


def _error(session: Sequence[Mapping[str, Any]]) -> str | None:
    """What went wrong last in a session of a run: what ended it, else the last warning."""
    for kinds in (("failed", "interrupted"), ("warning",)):
        for event in reversed(session):
            said = event.get("error") or event.get("text")
            if event["event"] in kinds and said:
                return f"{said}"
    return None


def _touched(run: RunDirectory) -> list[float]:
    """When files changed that a search touches while it is at work."""
    paths = [run.file(name) for name in ("log.jsonl", "trials.jsonl", "report.jsonl", "scoring", CLAIM)]
    paths += run.path.glob("workers/*/beats")
    return [path.stat().st_mtime for path in paths if path.exists()]


def _in_words(key: str) -> str:
    """What a piece of work is, by its key on the board."""
    kind, _, rest = key.partition("-")
    return f"measures {rest.rpartition('-')[2]}" if kind == "measure" else "scores choices"


def _workers(run: RunDirectory, now: float) -> Iterable[WorkerStatus]:
    """Those who work through the run's own board, and what each has claimed."""
    claimed: dict[str, list[str]] = {}
    for path in sorted(run.path.glob("workers/*/claimed/*~*~*")):
        _, key, worker = path.name.split("~", 2)  # a worker of another version may have a ~ in its name
        claimed.setdefault(worker, []).append(key)
    for path in sorted(run.path.glob("workers/*/beats/[!.]*")):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            facts = dict(said.get("facts") or {})
            beat_s = max(now - path.stat().st_mtime, 0.0)
        except DAMAGED:
            yield WorkerStatus(path.name, "says nothing that can be read", None, 0.0)
            continue
        doing = ", ".join(_in_words(key) for key in claimed.get(path.name, []))
        if not doing:
            is_search = facts.get("role") == "search"
            doing = "searches" if is_search else "waits for work" if facts.get("is_ready") else "gets ready"
        if beat_s >= SILENT_S:
            doing = f"silent for {duration(beat_s)}"
        yield WorkerStatus(path.name, doing, facts.get("done"), beat_s)
