"""How far a search is: a live bar on a terminal, one line per trial elsewhere, nothing when used as a library."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from search.trials import Trial

if TYPE_CHECKING:
    from rich.console import Console


class Progress:
    """Silent progress; the base of those that show something."""

    def stage(self, name: str) -> None:
        """Enters the next stage of the pipeline."""

    def step(self, done: int, total: int) -> None:
        """Reports that `done` of `total` steps of the stage are done."""

    def trial(self, trial: Trial, known: bool) -> None:
        """Reports a trial, `known` where the log already had it."""

    def close(self) -> None:
        """Ends the display."""


class LineProgress(Progress):
    """One line per stage and per trial, for logs and batch systems."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.perf_counter()

    def stage(self, name: str) -> None:
        self._console.print(f"[{time.perf_counter() - self._started:6.1f} s] {name}", highlight=False, markup=False)

    def trial(self, trial: Trial, known: bool) -> None:
        self._console.print(describe(trial, known), highlight=False, markup=False, soft_wrap=True)


class BarProgress(Progress):
    """A live bar for the stage at hand, for terminals."""

    def __init__(self, console: Console, evaluations: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = RichProgress(*columns, console=console, transient=True)
        self._bar = self._bars.add_task("starting", total=None)
        self._evaluations = evaluations
        self._measured = 0.0
        self._bars.start()

    def stage(self, name: str) -> None:
        self._bars.reset(self._bar, description=name, total=None)

    def step(self, done: int, total: int) -> None:
        self._bars.update(self._bar, completed=done, total=total)

    def trial(self, trial: Trial, known: bool) -> None:
        self._measured += 0.0 if trial.state == "infeasible" else trial.fidelity
        self._bars.update(
            self._bar,
            description=f"measuring policies: {describe(trial, known)}",
            completed=self._measured,
            total=self._evaluations,
        )

    def close(self) -> None:
        self._bars.stop()


def describe(trial: Trial, known: bool = False) -> str:
    """One line about a trial."""
    bits = trial.cost["average_weight_bits"]
    quality: str = trial.state
    if trial.state == "complete":
        quality = f"quality {trial.quality:.4f} drop {trial.drop:+.4f}"
    elif trial.state == "stopped":
        quality = f"stopped after {trial.metrics['samples']} samples, drop about {trial.drop:+.4f}"
    source = "known" if known else f"{trial.seconds:.2f} s"
    return f"trial {trial.number} {trial.digest} {quality} at {bits:.2f} bits ({source})"
