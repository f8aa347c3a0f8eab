"""The board between a search and those that work for it: what is to be done, by whom, and what came out.

The process that searches runs the strategy alone, so that the search takes the same course with any number of workers.
It posts work: policies that the strategy asks for, and shares of the sensitivity table. Workers, itself among them,
claim, do and finish it. Every piece of work is a pure function of what the search is about, so that doing one twice,
after a worker was taken for dead, changes nothing.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["measure", "score"]


@dataclass(frozen=True)
class Work:
    """One piece of work.

    Attributes:
        key: Its name, of letters, digits, dots, dashes and underscores: the same work has the same key.
        kind: `measure` a policy, or `score` a share of the choices.
        content: What to do, as JSON holds it.

    Raises:
        ValueError: If the key has other characters, or none.
    """

    key: str
    kind: Kind
    content: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_name(self.key)


@dataclass(frozen=True)
class Outcome:
    """What came of a piece of work.

    Attributes:
        worker: Who did it.
        content: What was found, as JSON holds it.
        error: Why it could not be done; None where it was.
    """

    worker: str
    content: Mapping[str, Any]
    error: str | None = None


class Board(ABC):
    """Where work is posted; any number of processes on any number of machines may use one at once.

    No method blocks for long, and none relies on clocks of different machines. Work is claimed by one worker at a
    time. A worker that is not seen to beat for `silence_s` seconds by the observer's own clock is taken for dead, and
    what it had claimed is open again. What others do may be seen a moment late. One process at a time
    opens, posts, withdraws and reopens. `beat` may be called from another thread than the rest.

    Workers have names of the same characters as keys, each its own. A worker that was killed and is started anew under
    its old name, as Slurm does, first gets what it had claimed.
    """

    @property
    @abstractmethod
    def where(self) -> str:
        """The place, as users name it, without a password."""

    @abstractmethod
    def open(self, about: Mapping[str, Any]) -> None:
        """Opens the board for a search that `about` describes; one that was closed, or left by a kill, opens again.

        What came of work is kept, but for errors: what could not be done may be posted, and so tried, again.

        Args:
            about: What the search is about, as JSON holds it: the same when the same search is gone on with.

        Raises:
            ConfigError: If the board is one of several in a place, and belongs to another search.
        """

    @abstractmethod
    def about(self) -> dict[str, Any] | None:
        """What the search is about; None where no board was opened yet."""

    @abstractmethod
    def close(self) -> None:
        """Says that there will be no more work; workers then leave."""

    @property
    @abstractmethod
    def is_open(self) -> bool:
        """Whether work may still come."""

    @abstractmethod
    def post(self, works: Sequence[Work]) -> None:
        """Adds work, to be claimed in this order; what was posted before, and not withdrawn, is not posted again."""

    @abstractmethod
    def withdraw(self, keys: Iterable[str]) -> None:
        """Takes back work that nobody has claimed; other keys, and unknown ones, are left alone."""

    @abstractmethod
    def claim(self, worker: str) -> Work | None:
        """Gives a worker the next open work, or None where there is none.

        Where many claim at once, each gets one of the next few.
        """

    @abstractmethod
    def finish(self, work: Work, outcome: Outcome) -> None:
        """Says what came of claimed work; of a worker taken for dead, it counts if nobody has claimed it again."""

    @abstractmethod
    def outcome(self, key: str) -> Outcome | None:
        """What came of work; None where it is not finished."""

    @abstractmethod
    def beat(self, worker: str, facts: Mapping[str, Any]) -> None:
        """Shows that a worker is alive, and what it says of itself; to be called every second or so."""

    @abstractmethod
    def workers(self) -> dict[str, dict[str, Any]]:
        """What every worker that ever beat last said of itself, by its name."""

    @abstractmethod
    def reopen(self, silence_s: float) -> list[str]:
        """Opens again what dead workers had claimed; returns its keys. To be called every second or so.

        Args:
            silence_s: Seconds without a beat after which a worker is taken for dead; several times as long as
                workers leave between beats, and as observers leave between calls.
        """

    @property
    @abstractmethod
    def silent(self) -> frozenset[str]:
        """The workers that the last `reopen` took for dead, whether they had claimed something or not."""


def check_name(name: str) -> str:
    """Returns a name that is fit for a file or an attribute.

    Raises:
        ValueError: If it is not made of letters, digits, dots, dashes and underscores.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} must be letters, digits, dots, dashes and underscores, and begin with no dot")
    return name
