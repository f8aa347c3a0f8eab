"""Trials: what was tried, what it cost, and what it was worth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from search.files import JsonLines
from search.policy import Policy

DIGITS = 9
"""Decimals of evaluations: shares of evaluations add up no better."""

State = Literal["complete", "infeasible", "failed", "stopped"]
"""Measured; over budget, hence not measured; measured, but the metric is not a number; measured on part of the split
only, because another policy of no greater cost is surely better."""


@dataclass(frozen=True)
class Trial:
    """One policy tried.

    Attributes:
        number: Counts from 0 in the order of the log.
        policy: The policy.
        fidelity: Share of the selection split it was measured on; of an infeasible policy, that it was asked for.
        metrics: `quality`, `samples`, `drop`, `drop_low`, `drop_high` on the selection split, and `predicted`, the
            sensitivity's forecast of its loss, where known; empty for an infeasible policy. Of a stopped trial they
            are estimates from `samples` samples.
        cost: Predicted costs in SI units, None where the hardware model knows none.
        seconds: Time the measurement took; when it was made, where the evaluation store knew it.
        state: What came of it.
        proposing_seconds: Time the strategy took to propose it.
    """

    number: int
    policy: Policy
    fidelity: float
    metrics: Mapping[str, float | None]
    cost: Mapping[str, float | None]
    seconds: float
    state: State
    proposing_seconds: float = 0.0

    @property
    def digest(self) -> str:
        """The policy's digest."""
        return self.policy.digest

    @property
    def is_measured(self) -> bool:
        """Whether there is a quality, be it an estimate."""
        return self.state in ("complete", "stopped")

    @property
    def is_whole(self) -> bool:
        """Whether it was measured on the whole selection split, so that it may win and be on a front."""
        return self.state == "complete" and self.fidelity == 1.0

    @property
    def quality(self) -> float:
        """The measured quality.

        Raises:
            ValueError: If there is none.
        """
        quality = self.metrics.get("quality")
        if quality is None:
            raise ValueError(f"trial {self.number} is {self.state} and has no quality")
        return quality

    @property
    def drop(self) -> float:
        """The measured drop against the float model, on the same samples.

        Raises:
            ValueError: If there is none.
        """
        drop = self.metrics.get("drop")
        if drop is None:
            raise ValueError(f"trial {self.number} is {self.state} and has no drop")
        return drop

    @property
    def certain_drop(self) -> float:
        """The most the drop may be, by its 95% interval; the drop itself where the task gives no interval."""
        high = self.metrics.get("drop_high")
        return self.drop if high is None else high

    def to_dict(self) -> dict[str, Any]:
        """The trial as one line of `trials.jsonl`."""
        row = asdict(self)
        return {"number": self.number, "digest": self.digest, **row, "policy": self.policy.to_dict()}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Trial:
        """Reads what `to_dict` wrote."""
        names = ("number", "fidelity", "metrics", "cost", "seconds", "state", "proposing_seconds")
        known = {name: row[name] for name in names if name in row}
        return cls(policy=Policy.from_dict(row["policy"]), **known)


class TrialLog:
    """The append-only record of a search, `trials.jsonl`.

    Trials are numbered by their place in the file, whatever it says: a user may delete a line that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)
        read = self._lines.read_as(Trial.from_dict)
        self.trials = [replace(trial, number=number) for number, trial in enumerate(read)]

    def append(self, trial: Trial) -> None:
        """Adds a trial and waits until it is on disk."""
        self._lines.append(trial.to_dict())
        self.trials.append(trial)


class Spent(NamedTuple):
    """A trial that spent evaluations, and what the search had spent by its end.

    Attributes:
        trial: The trial.
        evaluations: Evaluations spent; a measurement on part of the split counts as that part.
        seconds: Seconds of measuring and proposing, those of proposing infeasible policies included.
    """

    trial: Trial
    evaluations: float
    seconds: float


def spending(trials: Iterable[Trial]) -> Iterator[Spent]:
    """Yields the trials that spent evaluations, in order; an infeasible one spends only the seconds of proposing it.

    A policy that a strategy proposed again spent again, but the log holds it once, and so it counts once here.
    """
    evaluations, seconds = 0.0, 0.0
    for trial in trials:
        seconds += trial.seconds + trial.proposing_seconds
        if trial.state != "infeasible":
            evaluations = round(evaluations + trial.fidelity, DIGITS)
            yield Spent(trial, evaluations, seconds)
