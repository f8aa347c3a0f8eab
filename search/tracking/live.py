"""The mirror of a search on its way: a process beside it reads the run directory and writes to MLflow.

A process of its own, and not a thread, keeps from the search what MLflow does to a process: seconds of imports under
the interpreter's lock, changes to its environment, its logging and its warnings, and calls that never return. It talks
with the search through two pipes: its first line of input says what to do, the next, or the end, that the search is
over; a line of output is a sign of life, and the last one is its report.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from search.errors import BitplanError, one_line
from search.files import PACKAGES
from search.portrait import Portrait, portray, read_plan
from search.rundir import RunDirectory
from search.tracking.mirror import Mirror
from search.tracking.settings import TrackingSettings
from search.tracking.store import connected, tracking_uri, without_password
from search.tracking.tables import tables
from search.trials import Trial

GLANCE_SECONDS = 0.5
"""How often the process looks whether the search is over."""

SHARE = 0.05
"""The part of its time that the process works at most while the search runs: a slow store is written to less often."""

STDIN, STDOUT = 0, 1


class Mirrored:
    """Mirrors a run to MLflow beside the search, from its start until the block ends, however it ends.

    The end waits for MLflow as long as it gives signs of life; the search itself never does.
    """

    def __init__(self, run_dir: Path, tracking: TrackingSettings, run_root: Path, sweep: str | None = None) -> None:
        """Creates the mirror.

        Args:
            run_dir: The run.
            tracking: Whether and where to.
            run_root: The folder of `mlflow.db`, unless another store is configured.
            sweep: Name of the sweep that the run is a part of.
        """
        self._run = RunDirectory(run_dir)
        self._tracking = tracking
        self._root = run_root.resolve()
        self._sweep = sweep
        self._process: subprocess.Popen[bytes] | None = None
        self._trouble: str | None = None

    def start(self, run: RunDirectory) -> None:
        """Begins to mirror beside what follows."""
        run.update(run_root=str(self._root), **({"sweep": self._sweep} if self._sweep else {}))
        if not self._tracking.enabled:
            return
        order = {"run": str(run.path.resolve()), "root": str(self._root), "tracking": asdict(self._tracking)}
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([PACKAGES, *filter(None, sys.path)]),
            "OMP_NUM_THREADS": "1",
        }
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "search.tracking.live"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is meant for the search
            )
            _tell(self._process, order)  # not as an argument: all users of the machine can read those
        except OSError as error:
            self._trouble = f"cannot start the process that writes to MLflow: {one_line(error)}"

    def __enter__(self) -> Mirrored:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process:
            try:
                self._trouble = self._trouble or self._finish(self._process)
            finally:
                self._process.kill()
                self._process.communicate()  # closes the pipes and waits
        if self._trouble:
            print(
                f"warning: {self._trouble}; nothing of the run is lost: `bitplan sync {self._run.path}` shows it in "
                "MLflow later",
                file=sys.stderr,
            )

    def _finish(self, process: subprocess.Popen[bytes]) -> str | None:
        """Tells the process that the search is over and waits for its report; returns what went wrong."""
        assert process.stdout
        with suppress(BrokenPipeError):  # it is gone: the end of its output says so
            _tell(process, "over")  # its input alone might not end: processes forked by the search hold it open, too
        said = b""
        while select.select([process.stdout], [], [], self._tracking.patience_s)[0]:
            more = os.read(process.stdout.fileno(), 4096)
            if not more:
                break
            said += more
        else:
            uri = without_password(tracking_uri(self._tracking.uri, self._root))
            return f"MLflow at {uri} gave no sign of life for {self._tracking.patience_s:g} s"
        report = said.splitlines()[-1:]
        if not report or not report[0].startswith(b"{"):
            return f"the process that writes to MLflow ended early, with code {process.wait()}"
        return json.loads(report[0])["trouble"]  # type: ignore[no-any-return]


def _tell(process: subprocess.Popen[bytes], what: Any) -> None:
    assert process.stdin
    process.stdin.write(json.dumps(what).encode() + b"\n")
    process.stdin.flush()


class Tail:
    """The trials of a search on its way, of which only new ones are read."""

    def __init__(self, path: Path) -> None:
        self.trials: list[Trial] = []
        self._path = path
        self._offset = 0

    def read(self) -> list[Trial]:
        """Everything tried so far, but for a line that is being written."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in whole.splitlines():
                trial = Trial.from_dict(json.loads(line))
                self.trials.append(replace(trial, number=len(self.trials)))  # as `TrialLog` counts
        return self.trials


class Follower:
    """Writes to MLflow what happens to a run, until it is over."""

    def __init__(
        self,
        run: RunDirectory,
        settings: TrackingSettings,
        run_root: Path,
        is_over: Callable[[float], bool],
        alive: Callable[[], None],
    ) -> None:
        """Creates the follower; nothing is written yet.

        Args:
            run: The run.
            settings: Where to, and how often.
            run_root: The folder of `mlflow.db`.
            is_over: Waits that many seconds at most for the search to end; returns whether it has.
            alive: Called after every piece of work.
        """
        self._run = run
        self._settings = settings
        self._root = run_root
        self._is_over = is_over
        self._alive = alive
        self._tail = Tail(run.file("trials.jsonl"))
        self._shown: Portrait | None = None

    def follow(self) -> str | None:
        """Writes until the search is over, and once more; returns what went wrong in the end.

        What goes wrong on the way is tried again, later and later.
        """
        uri, pause, is_last = tracking_uri(self._settings.uri, self._root), self._settings.interval_s, False
        while True:
            try:
                with connected(uri, self._root, self._alive) as store:
                    self._alive()
                    mirror = Mirror(store, self._run, self._settings.experiment, self._alive)
                    while True:
                        began = time.monotonic()
                        self._update(mirror, is_last)
                        if is_last:
                            return None
                        pause = max(self._settings.interval_s, (time.monotonic() - began) / SHARE)
                        is_last = self._rest(pause)
            except BitplanError as error:
                if is_last:
                    return str(error)
            self._shown, pause = None, 2 * pause
            is_last = self._rest(pause)

    def _update(self, mirror: Mirror, is_last: bool) -> None:
        portrait = portray(self._run, self._tail.read())
        if portrait.ended is None:
            mirror.follow(portrait)
        elif is_last or portrait != self._shown:
            mirror.show(portrait, tables(self._run, self._tail.trials, read_plan(self._run)))
        self._shown = portrait
        self._alive()

    def _rest(self, seconds: float) -> bool:
        """Waits, but not beyond a change of run.json, as when the search ends and its report is drawn."""
        until, before = time.monotonic() + seconds, self._written()
        while not self._is_over(min(seconds, GLANCE_SECONDS)):
            if time.monotonic() >= until or self._written() != before:
                return False
        return True

    def _written(self) -> int:
        return self._run.file("run.json").stat().st_mtime_ns


def sweep_name(config: Any, run_root: Path) -> str | None:
    """What a sweep is called: its folder, as seen from the run root; None for a single run.

    Args:
        config: Hydra's own configuration.
        run_root: The folder of all runs.
    """
    from hydra.types import RunMode

    if config.mode != RunMode.MULTIRUN:
        return None
    folder = Path(config.sweep.dir).resolve()
    return str(folder.relative_to(run_root.resolve()) if folder.is_relative_to(run_root.resolve()) else folder.name)


def main() -> None:
    """Follows one run, in the process beside its search."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are for the search, whose end is the end of the input
    os.set_blocking(STDOUT, False)  # nobody reads signs of life while the search runs

    def alive() -> None:
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(STDOUT, b".\n")

    def is_over(seconds: float) -> bool:
        return bool(select.select([STDIN], [], [], seconds)[0])

    alive()
    with open(STDIN, "rb", buffering=0, closefd=False) as unbuffered:  # a buffer might swallow the next line, too
        order = json.loads(unbuffered.readline())
    run, settings = RunDirectory(order["run"]), TrackingSettings(**order["tracking"])
    try:
        trouble = Follower(run, settings, Path(order["root"]), is_over, alive).follow()
    except Exception as error:  # whatever it is, the search is to hear of it
        trouble = f"the process that writes to MLflow failed: {type(error).__name__}: {one_line(error)}"
    os.set_blocking(STDOUT, True)
    with suppress(BrokenPipeError):
        os.write(STDOUT, json.dumps({"trouble": trouble}).encode() + b"\n")


if __name__ == "__main__":
    main()
