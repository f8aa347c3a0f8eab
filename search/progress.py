"""Shows how far a search is: live on a terminal, a line per trial elsewhere, nothing when used as a library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from search.headway import Goal, Headway, amount, duration
from search.trials import Trial

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

STEPS_EVERY_S = 30.0
"""Seconds between lines about the steps of a stage."""

BAR_WIDTH = (8, 40)
"""Columns of the bar: where there is no room for the least, it is left out."""


class Progress:
    """Silent progress; the base of those that show something."""

    def stage(self, name: str) -> None:
        """Enters the next stage of the pipeline."""

    def step(self, done: int, total: int) -> None:
        """Reports that `done` of `total` steps of the stage are done."""

    def trial(self, trial: Trial, known: bool) -> None:
        """Reports a trial, `known` where the log already had it."""

    def workers(self, count: int) -> None:
        """Reports how many processes measure now."""

    def notice(self, text: str) -> None:
        """Tells the user something now, from any thread."""

    def close(self) -> None:
        """Ends the display."""


def make_progress(
    console: Console, evaluations: int, goal: Goal | None = None, seconds: float | None = None
) -> Progress:
    """Chooses how to show progress: live where a person watches a terminal that can move its cursor, else by lines.

    Args:
        console: Where to show it.
        evaluations: Evaluations the search may spend.
        goal: What the search makes small.
        seconds: Seconds of measuring and proposing it may spend.
    """
    is_live = console.is_interactive and console.file.isatty()  # FORCE_COLOR asks for colours, not for a moving cursor
    return (BarProgress if is_live else LineProgress)(console, evaluations, goal, seconds)


class LineProgress(Progress):
    """One line per stage and per trial, for logs and batch systems."""

    def __init__(
        self,
        console: Console,
        evaluations: float | None = None,
        goal: Goal | None = None,
        seconds: float | None = None,
    ) -> None:
        self._console = console
        self._headway = Headway(evaluations, goal, seconds)
        self._told_s = 0.0

    def stage(self, name: str) -> None:
        self._headway.stage(name)
        self._told_s = self._headway.elapsed_s
        self._line(name)

    def step(self, done: int, total: int) -> None:
        self._headway.step(done, total)
        if self._headway.elapsed_s - self._told_s >= STEPS_EVERY_S:
            self._told_s = self._headway.elapsed_s
            self._line(f"{self._headway.stage_name}: {amount(done, total)}", *self._headway.facts())

    def trial(self, trial: Trial, known: bool) -> None:
        before, headway = self._headway.best, self._headway
        headway.trial(trial, known)
        facts = [fact for fact in headway.facts() if fact.endswith("left")]
        if headway.best is not before:
            facts.append("best so far")
        self._line(describe(trial, known), f"{amount(headway.done, headway.total)} evaluations", *facts)

    def workers(self, count: int) -> None:
        if count != self._headway.workers:
            self._line(f"{count} worker{'s'[: count > 1]}")
        self._headway.workers = count

    def notice(self, text: str) -> None:
        self._line(text)

    def _line(self, *facts: str) -> None:
        line = f"[{self._headway.elapsed_s:7.1f} s] {' · '.join(facts)}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


class BarProgress(Progress):
    """A bar for the stage at hand with what is known below it, for terminals of any width."""

    def __init__(
        self,
        console: Console,
        evaluations: float | None = None,
        goal: Goal | None = None,
        seconds: float | None = None,
    ) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        self._headway = Headway(evaluations, goal, seconds)
        self._spinner = Spinner("dots")
        self._live = Live(self, console=console, transient=True, refresh_per_second=8)
        self._live.start()

    def stage(self, name: str) -> None:
        self._headway.stage(name)

    def step(self, done: int, total: int) -> None:
        self._headway.step(done, total)

    def trial(self, trial: Trial, known: bool) -> None:
        self._headway.trial(trial, known)

    def workers(self, count: int) -> None:
        self._headway.workers = count

    def notice(self, text: str) -> None:
        from rich.text import Text

        self._live.console.print(Text(text, style="yellow"), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        headway, width = self._headway, options.max_width - 1  # the last column is left free: some terminals wrap in it
        known = amount(headway.done, headway.total) if headway.done or headway.total else ""
        told = " ".join(filter(None, [known, duration(headway.elapsed_s)]))
        room = width - len(told) - 4  # for the spinner and what keeps columns apart
        shown = Text(headway.stage_name, no_wrap=True, overflow="ellipsis")
        shown.truncate(max(room, 1), overflow="ellipsis")
        line = Table.grid(padding=(0, 1, 0, 0))
        cells = [self._spinner.render(console.get_time()), shown]
        least, most = BAR_WIDTH
        if room - len(shown) - 1 >= least:
            total, columns = headway.total, min(room - len(shown) - 1, most)
            pulse = total is None
            cells.append(
                ProgressBar(total, headway.done, width=columns, pulse=pulse, animation_time=console.get_time())
            )
        line.add_row(*cells, Text(told, no_wrap=True))
        yield line
        for row in packed(headway.facts(), width - 2):
            yield Text(f"  {row}", style="dim", no_wrap=True, overflow="ellipsis")


def packed(facts: Iterable[str], width: int) -> list[str]:
    """Puts facts on as few lines of at most `width` columns as their order allows; a longer one has its own line."""
    lines: list[str] = []
    for fact in facts:
        if lines and len(lines[-1]) + len(fact) + 3 <= width:
            lines[-1] += f" · {fact}"
        else:
            lines.append(fact)
    return lines


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
