"""The log of a run, `log.jsonl`: what happened and when, one JSON object a line, for people and for machines."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from search.files import JsonLines
from search.progress import Progress
from search.trials import Trial


class EventLog:
    """Appends events to a run's log; each has `time` (seconds since 1970), `host`, `process` and `event`."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)

    def write(self, event: str, **facts: Any) -> None:
        """Adds one event, such as `stage`, with its facts."""
        where = {"time": round(time.time(), 3), "host": socket.gethostname(), "process": os.getpid()}
        self._lines.append({**where, "event": event, **facts})

    def read(self) -> list[dict[str, Any]]:
        """Everything that happened, in order."""
        return self._lines.read()


class LoggedProgress(Progress):
    """Writes what a search reports to its log, and hands it on."""

    def __init__(self, log: EventLog, shown: Progress) -> None:
        self._log = log
        self._shown = shown

    def stage(self, name: str) -> None:
        self._log.write("stage", name=name)
        self._shown.stage(name)

    def step(self, done: int, total: int) -> None:
        self._shown.step(done, total)

    def trial(self, trial: Trial, known: bool) -> None:
        facts = {"number": trial.number, "digest": trial.digest, "state": trial.state, "known": known}
        self._log.write("trial", **facts, seconds=trial.seconds)
        self._shown.trial(trial, known)

    def close(self) -> None:
        self._shown.close()
