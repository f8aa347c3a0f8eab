# What a search shows on its way: the numbers by hand, and the text that comes out of a terminal and of a file.
from __future__ import annotations

import io
import itertools
import os
import pty
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from search.headway import Goal, Headway, amount, duration
from search.policy import Policy
from search.progress import BarProgress, LineProgress, Progress, make_progress, packed
from search.strategies.baselines import RandomSearch
from search.terminal import make_console, plain_table, print_table
from search.trials import State, Trial
from tests.tiny import make_bench

POLICY = Policy.from_dict({"conv": "int4/uint8"})
TERMINAL = ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE")


def trial(
    number: int, drop: float = 0.1, weight_bytes: float = 2048.0, state: State = "complete", fidelity: float = 1.0
) -> Trial:
    metrics = {"quality": 0.9 - drop, "drop": drop, "drop_high": drop + 0.01, "samples": 60}
    cost = {"weight_bytes": weight_bytes, "average_weight_bits": 4.0, "latency_s": None}
    return Trial(number, POLICY, fidelity, metrics if state != "infeasible" else {}, cost, 2.0, state)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def measuring(**options: float) -> tuple[Headway, Clock]:
    clock = Clock()
    headway = Headway(10, clock=clock, **options)
    headway.stage("measuring policies")
    return headway, clock


def test_time_left_follows_from_the_seconds_that_evaluations_took() -> None:
    headway, clock = measuring()
    assert headway.left_s is None
    clock.now += 7  # a strategy that thinks before its first proposal tells nothing about the seconds of a measurement
    headway.trial(trial(0), known=False)
    assert headway.speed == pytest.approx(1 / 2)  # its own seconds
    for number in range(1, 4):
        clock.now += 3
        headway.trial(trial(number), known=False)
    assert headway.speed == pytest.approx(4 / 11)
    assert headway.left_s == pytest.approx(6 * 11 / 4)
    clock.now += 1
    assert headway.left_s == pytest.approx(6 * 11 / 4 - 1)
    clock.now += 1000  # of a measurement that takes much longer than the others, nothing is known
    assert headway.left_s == pytest.approx(5 * 11 / 4)


def test_speed_is_of_the_last_evaluations_and_not_of_known_ones() -> None:
    headway, clock = measuring()
    for number in range(3):
        headway.trial(trial(number), known=True)
    assert headway.done == 3
    assert headway.speed is None
    for number in range(3, 5):
        clock.now += 4
        headway.trial(trial(number), known=False)
    headway.trial(trial(5, state="infeasible"), known=False)
    assert (headway.done, headway.speed) == (5, pytest.approx(1 / 4))
    slow, clock = measuring()
    for number in range(60):
        clock.now += 1 if number < 30 else 5
        slow.trial(trial(number), known=False)
    assert slow.speed == pytest.approx(1 / 5)


def test_parts_of_the_split_count_as_parts() -> None:
    headway, clock = measuring()
    for number in range(4):
        clock.now += 1
        headway.trial(trial(number, state="stopped", fidelity=0.25), known=False)
    assert headway.done == 1
    assert headway.best is None
    assert headway.left_s == pytest.approx(9 * (2 + 3))  # the first took the 2 s that it says


def test_time_left_is_no_longer_than_the_seconds_that_may_be_spent() -> None:
    headway, clock = measuring(seconds=9.0)
    for number in range(2):
        clock.now += 2
        headway.trial(trial(number), known=False)
    assert headway.left_s == pytest.approx(9 - 4)


def test_scoring_is_timed_by_its_own_steps() -> None:
    clock = Clock()
    headway = Headway(10, clock=clock)
    headway.stage("scoring choices")
    headway.step(40, 100)  # what an interrupted run had scored comes at once
    assert headway.left_s is None
    clock.now += 10
    headway.step(50, 100)
    assert headway.left_s == pytest.approx(50)
    assert "about 50 s left of this stage" in headway.facts()


@pytest.mark.parametrize("quality_drop", [None, 0.05])
def test_the_best_is_the_one_the_objective_ranks_first(quality_drop: float | None, tmp_path: Path) -> None:
    bench = make_bench()
    objective = bench.objective(tmp_path / "log", {}, RandomSearch(), quality_drop=quality_drop)
    goal = Goal(objective.primary_cost, quality_drop)
    drops, sizes = (0.01, 0.03, 0.045, 0.2), (100.0, 200.0, 300.0)
    trials = [trial(n, *pair) for n, pair in enumerate(itertools.product(drops, sizes))]
    assert sorted(trials, key=goal.rank) == sorted(trials, key=objective.rank)


def test_a_budget_says_which_cost_is_shown() -> None:
    assert Goal.of({"latency_ratio": 0.5}).primary_cost == "latency_s"
    assert Goal.of({}).primary_cost == "weight_bytes"
    goal = Goal.of({"quality_drop": 0.05, "weight_bytes": 9.0}, "accuracy")
    assert goal == Goal("weight_bytes", 0.05, "accuracy")
    assert goal.describe(trial(0)) == ["stored size 2.00 KiB", "accuracy 0.8000", "drop +0.1000"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (99.4, "99 s"), (100, "2 min"), (5940, "99 min"), (12000, "3 h 20 min"), (3e5, "3 days 11 h")],
)
def test_times_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_amounts_and_lines() -> None:
    assert [amount(3.0, 40), amount(3.25, 40), amount(3.0, None)] == ["3/40", "3.2/40", "3"]
    assert packed(["ab", "cd", "ef"], 7) == ["ab · cd", "ef"]
    assert packed(["longer than that", "x"], 7) == ["longer than that", "x"]


def test_a_log_has_a_line_for_each_trial_and_nothing_else() -> None:
    text = io.StringIO()
    progress = LineProgress(Console(file=text, width=80))
    progress._headway = Headway(4, clock=Clock())
    told(progress)
    lines = [re.sub(r"^\[ *\d+\.\d s\] ", "", line) for line in text.getvalue().splitlines()]
    assert lines == [
        "scoring choices",
        "measuring policies",
        f"trial 0 {POLICY.digest} quality 0.7000 drop +0.2000 at 4.00 bits (known) · 1/4 evaluations · best so far",
        "2 workers",
        f"trial 1 {POLICY.digest} quality 0.8000 drop +0.1000 at 4.00 bits (2.00 s) · 2/4 evaluations · best so far",
        f"trial 2 {POLICY.digest} infeasible at 4.00 bits (2.00 s) · 2/4 evaluations",
        "stopping soon",
    ]


def told(progress: Progress) -> None:
    """Tells a progress of a short search."""
    progress.stage("scoring choices")
    progress.step(1, 3)
    progress.stage("measuring policies")
    progress.trial(trial(0, 0.2), known=True)
    progress.workers(2)
    progress.trial(trial(1, 0.1), known=False)
    progress.trial(trial(2, state="infeasible"), known=False)
    progress.notice("stopping soon")
    progress.close()


@contextmanager
def terminal(width: int) -> Iterator[tuple[Console, Callable[[], str]]]:
    """A console on a pseudo-terminal, and what gives the text that came out of it."""
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as file, os.fdopen(master, "rb", buffering=0) as out:
        os.set_blocking(master, False)

        def text() -> str:
            file.flush()
            return b"".join(iter(lambda: out.read(65536) or b"", b"")).decode()

        yield Console(file=file, width=width, height=24), text


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TERMINAL:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def screen(text: str, width: int) -> tuple[list[str], bool]:
    """What a terminal shows after a text with the few controls that are used here, and whether its cursor is seen."""
    rows, row, column, is_seen = [""], 0, 0, True
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", text, flags=re.DOTALL):
        if piece == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        elif piece == "\r":
            column = 0
        elif piece.startswith("\x1b["):
            if piece == "\x1b[2K":
                rows[row] = ""
            elif piece == "\x1b[1A":
                row -= 1
            elif piece in ("\x1b[?25l", "\x1b[?25h"):
                is_seen = piece.endswith("h")
            else:
                assert piece.endswith("m"), f"unexpected {piece!r}"
        else:
            assert column < width, f"the line {rows[row]!r} would wrap"
            rows[row] = rows[row].ljust(column)[:column] + piece + rows[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in rows], is_seen


@pytest.mark.parametrize("width", [160, 80, 40, 20])
def test_the_bar_fits_and_leaves_a_clean_terminal(width: int) -> None:
    with terminal(width) as (console, text):
        progress = make_progress(console, 4, Goal(metric="accuracy"))
        assert isinstance(progress, BarProgress)
        progress.stage("measuring policies")
        progress.trial(trial(0), known=False)
        progress._live.refresh()
        shown = "\n".join(screen(text(), width)[0])
        progress.close()
        assert "1/4" in shown
        assert "best accuracy 0.80"[: width - 3] in shown
        if width >= 40:
            for fact in (
                "measuring policies",
                "drop +0.1000",
                "stored size 2.00 KiB",
                "about 6 s left",
                "evaluations/s",
            ):
                assert fact in shown
    with terminal(width) as (console, text):
        told(make_progress(console, 4))
        rows, is_seen = screen(text(), max(width, len("stopping soon") + 1))
        assert [line for line in rows if line] == ["stopping soon"]
        assert is_seen


def test_an_error_leaves_a_clean_terminal() -> None:
    with terminal(80) as (console, text):
        progress = make_progress(console, 4)
        with pytest.raises(RuntimeError), closing(progress):
            raise RuntimeError
        rows, is_seen = screen(text(), 80)
        assert not any(rows)
        assert is_seen


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with terminal(80) as (console, text):
        told(make_progress(console, 4))
        found = text()
    assert "\x1b" not in found
    assert found.count("trial ") == 3


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal(80) as (console, text):
        told(make_progress(console, 4))
        print_table(coloured(), console)
        styles = re.findall(r"\x1b\[([0-9;]*)m", text())
    colours = [code for style in styles for code in style.split(";") if code and int(code) >= 30]
    assert not colours


def test_forced_colours_do_not_move_the_cursor_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    console = Console(file=file, width=80)
    told(make_progress(console, 4))
    print_table(coloured(), console)
    found = set(re.findall(r"\x1b\[[0-9;?]*([A-Za-z])", file.getvalue()))
    assert found == {"m"}
    assert "\r" not in file.getvalue()


def coloured() -> object:
    table = plain_table("plans", ["plan", "quality", "drop vs float [95%]", "size", "latency", "budget"])
    for number in range(3):
        drop = "+0.0029 [−0.0051, +0.0109]"
        table.add_row(f"trial {number}", "0.9714", drop, "24.1 KiB (0.140x)", "109 µs", "[green]met[/]")
    return table


def test_tables_are_the_same_on_a_terminal_and_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    print_table(coloured(), Console(file=file, width=160))
    with terminal(120) as (console, text):
        print_table(coloured(), console)
        shown = text()
    bare = re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r", "")
    assert "\x1b" in shown
    assert [line.rstrip() for line in bare.splitlines()] == [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [79, 40])
def test_a_narrow_terminal_shows_every_cell(width: int) -> None:
    with terminal(width) as (console, text):
        print_table(coloured(), console)
        rows, _ = screen(text(), width)
    shown = " ".join(" ".join(rows).split())
    for number in range(3):
        assert f"trial {number}" in shown
    for cell in (
        "quality 0.9714",
        "drop vs float [95%] +0.0029 [−0.0051, +0.0109]",
        "size 24.1 KiB (0.140x)",
        "budget met",
    ):
        assert shown.count(cell) == 3


def test_a_file_is_as_wide_as_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_console().width == 160
