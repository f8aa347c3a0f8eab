"""Timing turn by turn: every round runs each candidate once, so that whatever drifts, drifts for all of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from hwmodels.precision import Precision

PERCENTILES = (20, 50, 80)
WARM_UP = 2
"""Rounds run before those that count."""
PATIENCE = 2
"""How many times the rounds that are wanted are run at most, in search of undisturbed ones."""


@dataclass(frozen=True)
class Prepared:
    """A site at a precision, ready to be run.

    Attributes:
        precision: The precision.
        kernel: What runs, as its library calls it.
        is_fallback: Whether that is another kernel than the precision's own.
        run: Runs all copies of the operation once and returns the seconds that took.
        frame: The same with everything around the operation but without it; what it takes is subtracted.
        copies: Copies of the operation in one run, each with weights of its own.
    """

    precision: Precision
    kernel: str
    is_fallback: bool
    run: Callable[[], float]
    frame: Callable[[], float] | None = None
    copies: int = 1


@dataclass(frozen=True)
class Seconds:
    """Percentiles of the seconds that one call took.

    Attributes:
        samples: Runs they are percentiles of.
    """

    p20: float
    p50: float
    p80: float
    samples: int


def measure(candidates: Sequence[Prepared], samples: int) -> list[Seconds | None]:
    """Times candidates turn by turn, in their order: A B C A B C and so on.

    Returns:
        For each candidate its percentiles; None where it took no longer than the frame around it.
    """
    runs: list[Callable[[], float]] = []
    for candidate in candidates:
        runs += [candidate.run, *([candidate.frame] if candidate.frame else [])]
    columns = iter(interleave(runs, samples))
    found = []
    for candidate in candidates:
        seconds = next(columns)
        frame = float(np.median(next(columns))) if candidate.frame else 0.0
        found.append(percentiles((seconds - frame) / candidate.copies))
    return found


def interleave(runs: Sequence[Callable[[], float]], samples: int) -> list[np.ndarray]:
    """Runs each once per round, and keeps what each returned.

    Runs during which the system took the core away are left out, and up to `PATIENCE` times as many rounds are run to
    have `samples` without; where there still are fewer, all count.

    Args:
        runs: What to time; each returns its seconds.
        samples: Undisturbed runs wanted of each.

    Returns:
        For each of `runs` its seconds, at least `samples` of them.
    """
    for _ in range(WARM_UP):
        for run in runs:
            run()
    seconds: list[list[float]] = [[] for _ in runs]
    is_calm: list[list[bool]] = [[] for _ in runs]
    for number in range(PATIENCE * samples):
        if number >= samples and all(sum(calm) >= samples for calm in is_calm):
            break
        for run, kept, calm in zip(runs, seconds, is_calm, strict=True):
            before = preemptions()
            kept.append(run())
            calm.append(preemptions() == before)
    return [
        np.array(kept)[np.array(calm)] if sum(calm) >= samples else np.array(kept)
        for kept, calm in zip(seconds, is_calm, strict=True)
    ]


def percentiles(seconds: np.ndarray) -> Seconds | None:
    """Percentiles 20, 50 and 80 of seconds; None where they are not above zero."""
    p20, p50, p80 = (float(value) for value in np.percentile(seconds, PERCENTILES))
    return Seconds(p20, p50, p80, len(seconds)) if p20 > 0 else None


def rounded(value: float) -> float:
    """Five significant digits: more than any timing is good for."""
    return float(f"{value:.5g}")


def preemptions() -> int:
    """How often the system has taken the core away from this process; zero where it does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keeps this process, and what it starts, on `threads` cores; where the system cannot, they are left free.

    Raises:
        ValueError: If there are fewer cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    if threads > len(allowed):
        raise ValueError(f"threads={threads}, but this process may use {len(allowed)} cores")
    os.sched_setaffinity(0, sorted(allowed)[-threads:])  # the first core is where systems put their own work
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
