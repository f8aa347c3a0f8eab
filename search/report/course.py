"""The course of a run, read from its log of events: which stages took how long, who worked, and what happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search.units import significant

ABOUT = ("time", "at", "clock_s", "host", "process", "level", "event", "versions", "machine", "traceback")
"""What an event says beside its own particulars, or at too great length."""

ROUTINE = ("stage", "stage_ended", "step", "trial")
"""Events that every run has in plenty."""


@dataclass(frozen=True)
class Course:
    """How a run went.

    Attributes:
        seconds: Seconds of each stage, over all processes, in the order in which stages were first entered.
        trials: Trials that the log knows of.
        workers: Processes that wrote to the log, as pairs of host and process.
        resumed: How often the run was taken up again.
        events: Everything that happened but stages, their steps and trials, in order.
    """

    seconds: Mapping[str, float]
    trials: int
    workers: tuple[tuple[str, int], ...]
    resumed: int
    events: tuple[Mapping[str, Any], ...]

    @property
    def summary(self) -> str:
        """The run in one or two sentences."""
        hosts = list(dict.fromkeys(host for host, _ in self.workers))
        who = f"{len(self.workers)} processes" if len(self.workers) > 1 else "One process"
        where = f"{len(hosts)} hosts" if len(hosts) > 1 else hosts[0]
        text = f"{who} on {where} worked for {significant(sum(self.seconds.values()))} seconds and logged "
        text += "one trial." if self.trials == 1 else f"{self.trials:,} trials."
        if self.resumed:
            text += f" The run was resumed {'once' if self.resumed == 1 else f'{self.resumed} times'}."
        return text


def read_course(events: Sequence[Mapping[str, Any]]) -> Course | None:
    """Makes sense of the events of log.jsonl; None where there are none.

    A stage that was cut off, by a kill or a power cut, lasted until the last that was heard of its process.
    """
    if not events:
        return None
    seconds: dict[str, float] = {}
    cut: dict[tuple[str, int], tuple[str, float, float]] = {}  # by process: its stage, its begin, and the last heard
    for event in events:
        worker = (event["host"], event["process"])
        if event["event"] in ("stage", "started", "resumed"):
            _add(seconds, cut.pop(worker, None))
        if event["event"] == "stage":
            seconds.setdefault(event["name"], 0.0)
            cut[worker] = event["name"], event["clock_s"], event["clock_s"]
        elif event["event"] == "stage_ended":
            cut.pop(worker, None)
            seconds[event["name"]] = seconds.get(event["name"], 0.0) + event["seconds"]
        elif worker in cut:
            cut[worker] = *cut[worker][:2], event["clock_s"]
    for stage in cut.values():
        _add(seconds, stage)
    return Course(
        seconds=seconds,
        trials=sum(event["event"] == "trial" for event in events),
        workers=tuple(dict.fromkeys((event["host"], event["process"]) for event in events)),
        resumed=sum(event["event"] == "resumed" for event in events),
        events=tuple(event for event in events if event["event"] not in ROUTINE),
    )


def _add(seconds: dict[str, float], stage: tuple[str, float, float] | None) -> None:
    """Adds a stage that was cut off."""
    if stage:
        name, began, heard = stage
        seconds[name] += heard - began


def particulars(event: Mapping[str, Any]) -> str:
    """What an event says beside when and where it happened."""
    return ", ".join(f"{name} {value}" for name, value in event.items() if name not in ABOUT and value is not None)
