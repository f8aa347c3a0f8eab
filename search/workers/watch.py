"""Who is silent, judged by the observer's own clock: clocks of other machines may be hours off."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping

LOOKS = 4
"""How many looks it takes at least to call a worker silent."""

Clock = Callable[[], float]
"""Gives seconds since some moment, never less than before."""


class Watch:
    """Watches marks that change while their owner lives, such as counters of beats.

    A long time between two looks counts for no more than a share of the silence: an observer that was busy, asleep or
    cut off from the board did not hear those who were beating all the while, and gives them time to be heard.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()
        self._heard: dict[str, tuple[Hashable, float]] = {}

    def silent(self, marks: Mapping[str, Hashable], silence_s: float) -> set[str]:
        """Looks at everyone's marks.

        Args:
            marks: What each of those watched shows now; who is left out is forgotten.
            silence_s: Seconds without a change that are taken for death.

        Returns:
            The names of those whose mark has not changed for so long.
        """
        now = self._clock()
        passed = min(now - self._looked, silence_s / LOOKS)
        self._looked = now
        before = self._heard
        self._heard = {}
        for name, mark in marks.items():
            last, silence = before.get(name, (None, 0.0))
            still = name in before and last == mark
            self._heard[name] = (mark, silence + passed if still else 0.0)
        return {name for name, (_, silence) in self._heard.items() if silence >= silence_s}
