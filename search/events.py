"""The log of a run, `log.jsonl`: what happened and when, one JSON object a line, for people and for machines.

Every line has

    time        seconds since 1970 by the machine's clock, which may be wrong, and may be set meanwhile
    at          the same as UTC, such as 2026-11-23T12:54:55.250Z
    clock_s     seconds by a clock that nobody sets: differences within one `host` are true, also between processes
    host        name of the machine
    process     number of the process
    level       info, warning or error
    event       what happened

and, by event:

    started, resumed    run_id, settings (a digest of those that matter), versions, machine (cpus, memory_bytes, python,
                        system); of a resumed run also `status`, how it was left, and `trials`, how many were known
    stage               name: it begins
    stage_ended         name, seconds
    step                done and total steps of the stage, every few seconds
    trial               number, digest, state, seconds, fidelity, quality and drop where measured, proposing_seconds,
                        and `known`: served from the log or the evaluation store
    notice              text: what the user was told
    warning             category, text, file, line
    clock_set           by_s: how far the clock was set, or how long the machine slept, since the line before
    worker_joined       worker; further facts as the worker gives them
    worker_lost         worker; what it was doing is done by others
    workers_out_of_reach  error: where work is posted cannot be reached, and the search goes on alone
    stopped             what `finished` says: the user asked the search to stop, and the plan is the best so far
    interrupted, failed error ("KIND: message"), kind; of what nobody expected also `traceback`; seconds, trials
    finished            digest, verdict, evaluations, trials, known, seconds (of this session), total_seconds

A line is handed to the operating system at once and not waited for: it outlives the process, though not a power cut;
the trials themselves are in `trials.jsonl`, which outlives both. A log that cannot be written costs a warning, never
the search; what it could not take is kept and written when it can be again. Lines that are cut off, or damaged, are not
read.
"""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TextIO
from uuid import uuid4

from search.errors import BitplanError, FileError, file_error, one_line
from search.progress import Progress
from search.rundir import RunDirectory, settings_digest
from search.stopping import StoppedError
from search.trials import Trial

Level = Literal["info", "warning", "error"]

VERSIONS = ("bitplan", "torch", "numpy", "scipy", "optuna", "mlflow")
"""Packages that a log names the versions of."""

KEPT_BYTES = 2**20
"""Of events that could not be written yet."""

STEPS_EVERY_S = 5.0
"""Seconds between the steps of a stage that a log holds."""

JUMP_S = 1.0
"""By how much a clock may differ from the one that nobody sets, from one event to the next."""


STOPS = (KeyboardInterrupt, SystemExit, StoppedError)
"""How a search ends that the user stopped before there was a plan."""


class LogWarning(UserWarning):
    """The log of a run cannot be written."""


class EventLog:
    """Appends events to a log; any number of processes of one machine may do so at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._waiting = b""
        self._has_warned = False
        self._offset: float | None = None
        self._mutex = threading.RLock()

    def write(self, event: str, level: Level = "info", **facts: Any) -> None:
        """Adds one event, such as `stage`, with its facts; what is not a finite number becomes null."""
        with self._mutex:
            now, clock = time.time(), time.monotonic()
            offset = now - clock
            jump = 0.0 if self._offset is None else offset - self._offset
            self._offset = offset
            lines = [_line(now, clock, "clock_set", "warning", {"by_s": round(jump, 3)})] if abs(jump) > JUMP_S else []
            fault = self._append("".join([*lines, _line(now, clock, event, level, facts)]).encode())
        if fault and not self._has_warned:
            self._has_warned = True
            text = f"{file_error(fault, self._path) or fault}; the search goes on, and its log lacks what happens now"
            warnings.warn(text, LogWarning, stacklevel=2)

    def read(self) -> list[dict[str, Any]]:
        """Everything that happened, in order."""
        return read_events(self._path)

    def close(self) -> None:
        """Closes the file; the next event opens it again."""
        with self._mutex:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _append(self, lines: bytes) -> OSError | None:
        """Writes what waits, then new lines; what cannot be written waits, as far as there is room."""
        if len(self._waiting) + len(lines) <= KEPT_BYTES:
            self._waiting += lines
        try:
            if self._file is None:
                self._file = self._open()
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            return error
        return None

    def _open(self) -> int:
        """Opens the file, behind a line that a kill cut off."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            self._waiting = b"\n" + self._waiting
        return file


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """Everything that a log tells of, in order, without damaged lines; nothing where there is no log."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


class LoggedProgress(Progress):
    """Writes what a search reports to its log, and hands it on.

    Attributes:
        log: The log, for events of other kinds.
        trials: How many trials there were.
        known: How many of them were known before.
        is_stopped: Whether the user asked the search to stop, which ends it early with a plan; to be set by who knows.
    """

    def __init__(self, log: EventLog, shown: Progress) -> None:
        self.trials = self.known = 0
        self.is_stopped = False
        self.log = log
        self._shown = shown
        self._stage: tuple[str, float] | None = None
        self._stepped = -math.inf  # when a step was last logged

    def stage(self, name: str) -> None:
        self.end_stage()
        self._stage = name, time.monotonic()
        self.log.write("stage", name=name)
        self._shown.stage(name)

    def step(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._stepped >= STEPS_EVERY_S:
            self.log.write("step", done=done, total=total)
            self._stepped = now
        self._shown.step(done, total)

    def trial(self, trial: Trial, known: bool) -> None:
        self.trials += 1
        self.known += known
        self.log.write(
            "trial",
            number=trial.number,
            digest=trial.digest,
            state=trial.state,
            known=known,
            fidelity=trial.fidelity,
            quality=trial.metrics.get("quality"),
            drop=trial.metrics.get("drop"),
            seconds=trial.seconds,
            proposing_seconds=trial.proposing_seconds,
        )
        self._shown.trial(trial, known)

    def workers(self, count: int) -> None:
        self._shown.workers(count)

    def notice(self, text: str) -> None:
        self.log.write("notice", text=text)
        self._shown.notice(text)

    def close(self) -> None:
        self.end_stage()
        self._shown.close()

    def end_stage(self) -> None:
        """Ends the stage at hand; the next one does so, too."""
        if self._stage:
            name, began = self._stage
            self.log.write("stage_ended", name=name, seconds=round(time.monotonic() - began, 3))
            self._stage = None


@contextmanager
def recorded(run: RunDirectory, about: Mapping[str, Any], shown: Progress) -> Iterator[LoggedProgress]:
    """Keeps the record of one session of a run while the block runs: its status in run.json, and its log.

    Durations are by a clock that nobody sets. A run's `seconds` add up over its sessions, and it never ends before it
    started, whatever the clocks of the machines it ran on say.

    Args:
        run: The run's directory, claimed; what of it is there is gone on with.
        about: Entries of run.json: what is run, with its `config`.
        shown: Where the user sees how far it is.

    Raises:
        FileError: If the operating system refuses a file in the block: says how to go on when that is put right.
    """
    started, began = time.time(), time.monotonic()
    earlier = run.info() if run.file("run.json").is_file() else {}
    info: dict[str, Any] = {"run_id": uuid4().hex, "started": started} | earlier | dict(about)
    run.update(**info | {"status": "running"})
    log = EventLog(run.file("log.jsonl"))
    progress = LoggedProgress(log, shown)
    facts: dict[str, Any] = {"run_id": info["run_id"], "settings": settings_digest(info["config"])}
    if earlier:
        known = len(run.trials())
        facts |= {"status": earlier["status"], "trials": known}
        shown.notice(_greeting(earlier["status"], known))
    log.write("resumed" if earlier else "started", **facts, versions=_versions(), machine=_machine())

    def ended(status: str) -> dict[str, Any]:
        progress.end_stage()
        seconds = time.monotonic() - began
        now = run.info()  # a run.json that is gone is not made up
        total = now.get("seconds", 0.0) + seconds
        run.update(status=status, finished=max(now["started"], started + seconds), seconds=total)
        return {"trials": progress.trials, "known": progress.known, "seconds": round(seconds, 3)}

    try:
        with warnings_logged(log):
            yield progress
        totals = ended("interrupted" if progress.is_stopped else "finished")
        found: dict[str, Any] = {name: run.info().get(name) for name in ("digest", "verdict", "evaluations")}
        event = "stopped" if progress.is_stopped else "finished"
        log.write(event, **found, **totals, total_seconds=round(run.info()["seconds"], 3))
    except BaseException as error:
        status = "interrupted" if isinstance(error, STOPS) else "failed"
        try:
            totals = ended(status)
        except BitplanError as fault:  # what led here is the better story
            totals = {"not_in_run_json": one_line(fault)}
        with suppress(LogWarning):  # likewise, where warnings are errors
            log.write(status, "error", **_story(error), **totals)
        refused = file_error(error) if isinstance(error, OSError) else error
        if not isinstance(refused, FileError):
            raise
        raise FileError(
            f"{refused}. Nothing measured before is lost: when that is done, repeat the search with "
            f"run_dir={run.path} to go on"
        ) from error
    finally:
        log.close()


@contextmanager
def warnings_logged(log: EventLog) -> Iterator[None]:
    """Writes the warnings that Python shows while the block runs to a log, too."""
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        log.write("warning", "warning", category=category.__name__, text=str(message), file=filename, line=lineno)
        shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown


def _line(now: float, clock: float, event: str, level: Level, facts: Mapping[str, Any]) -> str:
    at = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    about = {"time": round(now, 3), "at": at, "clock_s": round(clock, 6), "host": socket.gethostname()}
    row = {**about, "process": os.getpid(), "level": level, "event": event, **facts}
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False, default=str) + "\n"


def _greeting(status: str, known: int) -> str:
    trials = "1 trial" if known == 1 else f"{known} trials"
    if status == "finished":
        return f"this run finished before: its {trials} are known, and nothing is measured again"
    return f"going on with an earlier run: {trials} known"


def _story(error: BaseException) -> dict[str, Any]:
    """What a log says of an error; where it came from, too, unless it is for the user to put right."""
    story = {"error": f"{type(error).__name__}: {one_line(error)}", "kind": type(error).__name__}
    if not isinstance(error, (BitplanError, *STOPS)):
        story["traceback"] = "".join(traceback.format_exception(error))
    return story


def _versions() -> dict[str, str]:
    return {name: version(name) for name in VERSIONS}


def usable_cores() -> int:
    """How many cores this process may use, which a batch system may make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine() -> dict[str, Any]:
    return {
        "cpus": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "system": platform.platform(),
    }
