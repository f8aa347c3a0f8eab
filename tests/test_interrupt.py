# Ctrl-C and SIGTERM: the best plan so far, nothing damaged, and the undisturbed plan when the search goes on.
from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hwmodels import StorageModel
from search.budget import Budget
from search.headway import amount
from search.job import Job, SpaceSettings
from search.progress import Progress
from search.quantize.settings import QuantizerSettings
from search.report import write_report
from search.run import search
from search.rundir import RunDirectory
from search.stopping import GRACE_S, Interrupted, Stop, StoppedError, listening
from search.strategies.base import Strategy
from search.strategies.baselines import RandomSearch
from search.strategies.evolution import Evolution
from search.strategies.solver import Solver
from search.trials import Trial
from tests.tiny import WEIGHTS, TinyTask

EVALUATIONS = 8


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C is ignored by what a shell starts in the background, tests among them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def job(run_dir: Path, strategy: Strategy) -> Job:
    return Job(
        task=TinyTask(),
        cost_model=StorageModel(),
        strategy=strategy,
        budget=Budget(size_ratio=0.5),
        run_dir=run_dir,
        space=SpaceSettings(list(WEIGHTS), ["uint4", "uint8"]),
        quantizer=QuantizerSettings(repair="none"),
        config={"seed": 0},
    )


class StopAt(Progress):
    """Asks a search to stop at a moment of it."""

    def __init__(self, stop: Stop, moment: Callable[[str, object], bool]) -> None:
        self._stop, self._moment = stop, moment

    def _see(self, what: str, value: object) -> None:
        if self._moment(what, value):
            self._stop.ask()

    def stage(self, name: str) -> None:
        self._see("stage", name)

    def step(self, done: int, total: int) -> None:
        self._see("step", done)

    def trial(self, trial: Trial, known: bool) -> None:
        self._see("trial", trial.number)


def stopped(run_dir: Path, strategy: Strategy, what: str, value: object) -> RunDirectory:
    stop = Stop()
    progress = StopAt(stop, lambda *moment: moment == (what, value))
    search(job(run_dir, strategy), progress, stop=stop)
    assert stop.is_asked
    return RunDirectory(run_dir)


STRATEGIES = {"solver": Solver, "random": RandomSearch, "evolution": Evolution}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_stopped_search_has_a_plan_and_goes_on_to_the_undisturbed_one(name: str, tmp_path: Path) -> None:
    strategy = STRATEGIES[name]
    whole = search(job(tmp_path / "whole", strategy(evaluations=EVALUATIONS)))
    run = stopped(tmp_path / "cut", strategy(evaluations=EVALUATIONS), "trial", 2)
    info, plan = run.info(), run.plan()
    assert info["status"] == "interrupted"
    done = amount(sum(trial.fidelity for trial in run.trials()), None)
    assert info["stopped"] == f"the search was stopped early, after {done} of {EVALUATIONS} evaluations"
    assert len(run.trials()) == 3
    assert plan is not None
    plan.check(TinyTask().model)
    assert plan.digest in {trial.digest for trial in run.trials()}
    assert info["stopped"] in plan.cautions
    front = run.table("front.csv")
    assert front is not None
    assert {"float", "winner"} <= set(front["role"])
    if name == "random":
        assert f"stopped early, after {done} of 8" in write_report(run).read_text(encoding="utf-8")

    again = search(job(tmp_path / "cut", strategy(evaluations=EVALUATIONS)))
    assert run.info()["status"] == "finished"
    assert run.info()["stopped"] is None
    assert again.plan == whole.plan
    assert [trial.digest for trial in run.trials()] == [trial.digest for trial in whole.run.trials()]
    for file in ("plan.json", "plan.safetensors"):
        assert run.file(file).read_bytes() == whole.run.file(file).read_bytes()


def test_an_interrupted_search_goes_on_to_the_undisturbed_plan(tmp_path: Path) -> None:
    class Interrupting(Progress):
        def trial(self, trial: Trial, known: bool) -> None:
            if trial.number == 2:
                raise KeyboardInterrupt

    run = RunDirectory(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        search(job(run.path, RandomSearch(evaluations=4)), Interrupting())
    assert run.info()["status"] == "interrupted"
    assert run.plan() is None
    search(job(run.path, RandomSearch(evaluations=4)))
    whole = search(job(tmp_path / "whole", RandomSearch(evaluations=4)))
    assert run.file("plan.json").read_bytes() == whole.run.file("plan.json").read_bytes()


@pytest.mark.parametrize("moment", [("stage", "calibrating ranges"), ("step", 2), ("stage", "scoring choices")])
def test_before_anything_was_measured_there_is_no_plan(moment: tuple[str, object], tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        stopped(tmp_path, Solver(evaluations=EVALUATIONS), *moment)
    run = RunDirectory(tmp_path)
    assert run.info()["status"] == "interrupted"
    assert run.plan() is None
    assert not run.trials()
    if moment[0] == "step":
        assert len(list(run.file("scoring").glob("[!.]*.npz"))) == 2  # at the next choice, and both are kept
    search(job(tmp_path, Solver(evaluations=EVALUATIONS)))
    assert run.info()["status"] == "finished"


def test_a_stop_while_the_front_is_measured_leaves_the_run_open(tmp_path: Path) -> None:
    run = stopped(tmp_path, RandomSearch(evaluations=4), "stage", "measuring the front on the report split")
    assert run.info()["status"] == "interrupted"
    assert run.plan() is not None


def test_a_late_search_measures_what_its_plan_needs(tmp_path: Path) -> None:
    now = [0.0]
    stop = Stop(clock=lambda: now[0])

    class Late(StopAt):
        def stage(self, name: str) -> None:
            now[0] += GRACE_S
            super().stage(name)

    search(job(tmp_path, RandomSearch(evaluations=6)), Late(stop, lambda *moment: moment == ("trial", 4)), stop=stop)
    front = RunDirectory(tmp_path).table("front.csv")
    assert front is not None
    assert set(front["role"]) == {"float", "winner"}


def test_the_first_signal_asks_and_ctrl_c_after_it_interrupts() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = Stop()
    with listening(stop, said.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # batch systems send several
        assert (stop.is_asked, stop.exit_code) == (True, 143)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(StoppedError):
            stop.check()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    (line,) = said
    assert line.startswith("SIGTERM: stopping after the trial at hand")
    assert line.endswith("Ctrl-C stops at once")


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = Stop()
        with listening(stop, print):
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.is_asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_say_that_they_hear_no_signals() -> None:
    said: list[str] = []

    def work() -> None:
        with listening(Stop(), said.append):
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (line,) = said
    assert "main thread" in line


class Signalling(TinyTask):
    """Sends this process the signals of $SIGNALS once, in the middle of a measurement behind the third trial."""

    def score(self, outputs, batch):
        log = Path(os.environ["RUN_DIR"]) / "trials.jsonl"
        if os.environ.get("SIGNALS") and log.is_file() and log.read_text().count("\n") == 3:
            for name in os.environ.pop("SIGNALS").split():
                os.kill(os.getpid(), signal.Signals[name])
        return super().score(outputs, batch)


@pytest.mark.parametrize(
    ("signals", "code", "trials", "end"),
    [
        ("SIGTERM", 143, 4, "The search was stopped early, after 4 of 6 evaluations; repeat the command with run_dir="),
        ("SIGINT SIGINT", 130, 3, "The search was stopped at once, and nothing measured is lost; repeat the command"),
    ],
)
def test_the_command_tells_what_became_of_it(
    signals: str,
    code: int,
    trials: int,
    end: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from search.cli import main

    run = RunDirectory(tmp_path / "run")
    monkeypatch.setenv("RUN_DIR", str(run.path))
    monkeypatch.setenv("SIGNALS", signals)
    with pytest.raises(Interrupted) as caught:
        main(["search", *SETTINGS, f"run_dir={run.path}", f"run_root={tmp_path}"])
    out = capfd.readouterr().out
    assert caught.value.code == code
    assert len(run.trials()) == trials
    assert run.info()["status"] == "interrupted"
    assert end in out
    assert "stopping after the trial at hand, with the best plan so far" in out
    assert ("← winner" in out) == (trials == 4)
    assert run.file("report.html").exists() == (trials == 4)


SETTINGS = [
    *("task=custom", "task._target_=tests.test_interrupt.Signalling", "tracking=none", "strategy=random"),
    *("strategy.evaluations=6", "quantizer.repair=none", "space.weight=[int2,int4,int8]", "budget.size_ratio=0.9"),
]


@pytest.mark.system
def test_ctrl_c_in_a_terminal(tmp_path: Path) -> None:
    """Once for the whole way: the key, the process group, the exit code, and what the terminal is left like."""
    run = RunDirectory(tmp_path / "run")
    settings = [*SETTINGS, "strategy.evaluations=5000", f"run_dir={run.path}", f"run_root={tmp_path}"]
    master, slave = pty.openpty()
    environment = os.environ | {"RUN_DIR": str(run.path), "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, *settings],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        cwd=Path(__file__).parent.parent,
        start_new_session=True,
    )
    os.close(slave)
    shown = bytearray()

    def read() -> None:
        try:
            while part := os.read(master, 65536):
                shown.extend(part)
        except OSError:  # how Linux says that the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    until = time.monotonic() + 60
    while not (run.file("trials.jsonl").exists() and run.file("trials.jsonl").read_text().count("\n") >= 3):
        assert process.poll() is None, shown.decode()
        assert time.monotonic() < until
        time.sleep(0.01)
    os.write(master, b"\x03")
    assert process.wait(60) == 130
    reader.join()
    os.close(master)
    text = shown.decode()
    assert "Ctrl-C: stopping after the trial at hand" in text
    assert "← winner" in text
    assert "of 5000 evaluations; repeat the command with run_dir=" in text
    assert "Traceback" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert json.loads(run.file("run.json").read_text())["status"] == "interrupted"


TERMINAL = """
import fcntl, signal, sys, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from search.cli import main
sys.exit(main(["search", *sys.argv[1:]]))
"""
