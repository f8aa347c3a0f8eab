"""How often to ask: the slower the answer, the more seldom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from search.workers.watch import Clock

SHARE = 0.05
"""Of the time that may go into asking for the same thing again and again."""

LONGEST_S = 1.0
"""Seconds after which to ask again in any case."""


class Pace:
    """Keeps asking for the same thing to a share of the time, so that many who wait do not slow down those who work.

    A folder or a server that has too much to do answers slowly, and is asked less.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._next: float | None = None

    @property
    def is_due(self) -> bool:
        """Whether to ask again."""
        return self._next is None or self._clock() >= self._next

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Measures how long the answer takes, which is what the block waits for."""
        start = self._clock()
        yield
        now = self._clock()
        self._next = now + min((now - start) * (1 / SHARE - 1), LONGEST_S)

    def hurry(self) -> None:
        """Makes it due at once: something has changed."""
        self._next = None
