"""The search's side of its board: posts what will be asked for, works itself while it waits, and looks after workers.

Only the process that searches runs the strategy, and it asks for one policy after the other as if it were alone. So the
search takes the same course with any number of workers, bit for bit: they only fill the evaluation store ahead of it,
and measure choices for the sensitivity table.
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from search.errors import BitplanError, ConfigError, one_line
from search.events import usable_cores
from search.files import PACKAGES
from search.job import Job
from search.preparation import Stages
from search.progress import Progress
from search.quality.evaluate import Evaluator
from search.quality.store import Order
from search.rundir import EVALUATIONS, UNRELATED, WORKERS, RunDirectory
from search.sensitivity.forward import Share, Sweep
from search.stopping import Stop
from search.workers.board import Board, Outcome, Work
from search.workers.hands import SILENCE_S, Hands, Pulse, first_subject, measure_work, score_work
from search.workers.opening import open_board, study_of

AHEAD = 3
"""Measurements ordered ahead for everybody who measures."""

SHARES = 4
"""Shares of the choices to score for everybody who scores: who is quick takes more of them."""

SENT = 16
"""Choices in a share at most where what is found of them goes through a database: 512 KiB of each."""

LOOK_S = 0.5
"""Seconds between looks at who is there."""

POLLS_S = (0.002, 0.05)
"""Seconds between looks for an outcome, the first and the longest ones."""

PARTING_S = 3.0
"""Seconds that workers have to leave by themselves; those that are not ready yet have none."""

Answer = TypeVar("Answer")


class Crew:
    """Those who work for one search.

    Attributes:
        name: What the process that searches is called on the board.
        own_store: Folder of the evaluations of a task whose scores are not kept for other runs; None where no worker
            could make the same task.
    """

    def __init__(self, job: Job, run: RunDirectory, progress: Progress, log: Callable[..., None], stop: Stop) -> None:
        """Sees whether others can work for a job.

        Args:
            job: What is searched.
            run: Its run directory.
            progress: Where the user sees how many work.
            log: Takes an event and its facts.
            stop: Whether the search is to stop.

        Raises:
            ConfigError: If workers are asked for, and they could not make the same task.
        """
        self.name = f"search-{os.getpid()}"
        self._job, self._run, self._progress, self._log, self._stop = job, run, progress, log, stop
        self._is_shareable = isinstance(job.config.get("task"), Mapping)
        if not self._is_shareable and (job.workers > 1 or job.study):
            raise ConfigError(
                f"workers={job.workers}, study={job.study}: other processes cannot make the model of a search that is "
                "called from Python; run it with workers=1, or write a search.tasks.task.Task and use bitplan search"
            )
        self.own_store = run.file(EVALUATIONS) if self._is_shareable else None
        study = study_of(job.study, run.info()["run_id"]) if job.study else None
        run.update(study=study)  # where workers that are told of the run directory find its board
        self._unopened = open_board(study or run.path)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._told_of: set[str] = set()
        self._board: Board | None = None
        self._pulse: Pulse | None = None
        self._hands: Hands | None = None
        self._task = ""
        self._ordered: dict[tuple[str, str, str], list[Work]] = {}
        self._is_helping = False
        self._looked = float("-inf")
        self._marks: dict[str, Any] = {}  # every worker's last beat
        self._others: frozenset[str] = frozenset()  # ready workers that have beaten since they were first seen

    def __enter__(self) -> Crew:
        """Starts the workers of this machine, which get ready while this process does."""
        folder = self._run.file(WORKERS)
        path = [PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])]
        for number in range(1, self._job.workers):
            name = f"local-{number}-{os.getpid()}"
            folder.mkdir(parents=True, exist_ok=True)
            # -P: a search.py of the user's, where he stands, is not this package
            command = [sys.executable, "-P", "-m", "search", "worker", str(self._run.path)]
            with (folder / f"{name}.log").open("ab") as log:
                self._processes[name] = subprocess.Popen(
                    [*command, "--name", name, "--leave-with", str(os.getpid())],
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for this process, which ends the others
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.end()
        finally:
            until = time.monotonic() + PARTING_S
            for name, process in self._processes.items():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(until - time.monotonic(), 0.1) if name in self._others else 0)
            self._tell_of_ends()
            left = [process for process in self._processes.values() if process.poll() is None]
            for process in left:
                process.terminate()
            until = time.monotonic() + PARTING_S
            for process in left:
                try:
                    process.wait(max(until - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:  # it is stopped, or stuck where no signal reaches it
                    process.kill()
                    process.wait()

    def _tell_of_ends(self) -> None:
        """Says which workers of this machine ended by themselves, and badly."""
        for name, process in self._processes.items():
            if process.poll() and name not in self._told_of:
                self._told_of.add(name)
                log = self._run.file(WORKERS) / f"{name}.log"
                self._progress.notice(f"worker {name} ended with exit code {process.returncode}: see {log}")

    def begin(self, stages: Stages) -> None:
        """Opens the board: from now on others may work.

        Raises:
            ConfigError: If workers are asked for, and nobody can measure for this search.
        """
        store = stages.calibrated.store
        if store is None or not self._is_shareable:
            why = self._run.info().get("not_shared", "its network cannot be made by other processes")
            if self._job.workers > 1 or self._job.study:
                raise ConfigError(f"workers={self._job.workers}: {why}; nobody can share the work, so leave workers=1")
            return
        self._task = store.folder.name
        board = self._unopened
        kept = {key: value for key, value in self._job.config.items() if key not in UNRELATED}
        board.open({"config": kept, "evaluations": store.about, "subject": asdict(first_subject(stages))})
        self._board = board
        self._hands = Hands(self.name, stages, self._run.path, restores=True)
        self._pulse = Pulse(board, self.name, self._facts, self._progress.notice).__enter__()
        store.helpers = self
        if self._job.workers > 1:
            self._give_hints()

    def _give_hints(self) -> None:
        """Says what keeps workers from being of use."""
        workers, threads, cores = self._job.workers, torch.get_num_threads(), usable_cores()
        strategy = self._job.strategy
        if workers * threads > cores:
            self._progress.notice(
                f"workers={workers} with {threads} threads each share {cores} cores: it is quicker with "
                f"OMP_NUM_THREADS={max(cores // workers, 1)}, but other numbers of threads may give other last digits"
            )
        if strategy.proposes_one:
            if getattr(strategy, "batch", None) == 1:
                change = f"strategy.batch={workers} has it propose {workers} at once, which is another search"
            else:
                change = "strategy=evolution and random, and solver with strategy.batch, propose several at once"
            self._progress.notice(
                f"strategy={strategy.name} proposes one policy after the other: {workers} workers score choices "
                f"together, and measure the front, but hardly speed up the search; {change}"
            )

    def end(self) -> None:
        """Takes back what nobody began, and closes the board: workers then leave."""
        left = [work.key for works in self._ordered.values() for work in works]
        self._ask(lambda board: board.withdraw(left), None)
        self._ask(lambda board: board.close(), None)
        self._leave()

    @property
    def foresight(self) -> int:
        """How many of the measurements that come next are worth ordering; 1 where nobody else works."""
        others = 0 if self._is_helping else len(self._look())
        return 1 + AHEAD * (others + 1) if others else 1

    def order(self, orders: Sequence[Order]) -> None:
        """Posts measurements that will be asked for."""
        works = [measure_work(self._task, order) for order in orders]
        self._ask(lambda board: board.post(works), None)
        for order, work in zip(orders, works, strict=True):
            self._ordered.setdefault(order.place, []).append(work)

    def delivered(self, place: tuple[str, str, str]) -> bytes | None:
        """Waits for what was ordered, and works meanwhile.

        Returns:
            The file of the scores; None where it was not ordered, or has to be measured here.
        """
        if self._is_helping:
            return None
        file = None
        for work in self._ordered.pop(place, []):
            outcome = self._outcome(work)
            if outcome and not outcome.error:
                file = base64.b64decode(outcome.content["file"])
        return file

    def sharing(self, evaluator: Evaluator) -> Share | None:
        """What spreads the scoring of choices; None where nobody else is expected to work."""
        if self._board is None or (self._job.workers == 1 and not self._job.study and not self._look()):
            return None

        def share(sweep: Sweep) -> None:
            assert evaluator.store is not None
            subject, about = evaluator.store.subject(evaluator.simulated), asdict(self._job.sensitivity)
            choices = sweep.missing
            count = SHARES * max(self._job.workers, len(self._others) + 1)
            if self._job.study:
                count = max(count, -(-len(choices) // SENT))
            ends = [round(len(choices) * number / count) for number in range(count + 1)]
            parts = [choices[start:end] for start, end in pairwise(ends) if start < end]
            self._spread([score_work(self._task, subject, part, about) for part in parts], sweep)

        return share

    def _spread(self, works: list[Work], sweep: Sweep) -> None:
        """Has everybody score; begins alone where nobody is there yet."""
        total = sum(len(work.content["choices"]) for work in works)
        own = 0  # choices scored by this process that belong to no work that is over

        def written() -> None:
            nonlocal own
            own += 1
            left = sum(len(work.content["choices"]) for work in works)
            self._progress.step(min(total - left + own, total), total)
            self._stop.check()

        while works and not self._look():
            sweep.write(works[0].content["choices"], written)
            own, works = 0, works[1:]
        self._ask(lambda board: board.post(works), None)
        polls = Polls()
        while works and self._look():
            works = [work for work in works if not self._is_scored(work, sweep)]
            own = 0
            self._progress.step(total - sum(len(work.content["choices"]) for work in works), total)
            self._stop.check()
            mine = self._ask(lambda board: board.claim(self.name), None) if works else None
            if mine is None:
                polls.wait()
            elif mine.kind == "score":
                sweep.write(mine.content["choices"], written)
                self._finish(mine, Outcome(self.name, {}))
            else:
                self._do(mine)
        self._ask(lambda board: board.withdraw([work.key for work in works]), None)

    def _is_scored(self, work: Work, sweep: Sweep) -> bool:
        """Whether work is over; takes what was found of it by one who does not see the run directory."""
        outcome = self._found(work)
        for choice, file in (outcome.content.get("files", {}) if outcome else {}).items():
            sweep.put(int(choice), base64.b64decode(file))
        return outcome is not None

    def _outcome(self, work: Work) -> Outcome | None:
        """What came of work; None where nobody is left who could do it."""
        polls = Polls()
        while self._board is not None:
            outcome = self._found(work)
            if outcome is not None:
                return outcome
            if not self._look():
                self._ask(lambda board: board.withdraw([work.key]), None)
                return None
            mine = self._ask(lambda board: board.claim(self.name), None)
            if mine is None:
                polls.wait()
            else:
                self._do(mine)
                polls = Polls()
        return None

    def _do(self, work: Work) -> None:
        """Works for the search itself."""
        assert self._hands is not None
        self._is_helping = True
        try:
            outcome = self._hands.do(work)
        finally:
            self._is_helping = False
        self._finish(work, outcome)

    def _found(self, work: Work) -> Outcome | None:
        return self._ask(lambda board: board.outcome(work.key), None)

    def _finish(self, work: Work, outcome: Outcome) -> None:
        self._ask(lambda board: board.finish(work, outcome), None)

    def _ask(self, question: Callable[[Board], Answer], otherwise: Answer) -> Answer:
        """Asks the board; where it cannot be reached any more, the search goes on alone."""
        if self._board is None:
            return otherwise
        try:
            return question(self._board)
        except (BitplanError, OSError) as error:
            self._progress.notice(f"the search goes on without workers: {one_line(error)}")
            self._log("workers_out_of_reach", "warning", error=one_line(error))
            self._leave()
            return otherwise

    def _leave(self) -> None:
        """Has nothing to do with the board any more."""
        self._board = None
        if self._pulse:
            self._pulse.__exit__(None, None, None)
            self._pulse = None

    def _look(self) -> frozenset[str]:
        """Who else works now; opens again what the dead had claimed."""
        now = time.monotonic()
        if self._board is None:
            return frozenset()
        if now - self._looked < LOOK_S:
            return self._others
        self._looked = now
        self._tell_of_ends()
        nothing: list[str] = []
        nobody: dict[str, dict[str, Any]] = {}
        self._ask(lambda board: board.reopen(SILENCE_S), nothing)
        silent = self._ask(lambda board: board.silent, self._others)
        before = self._marks
        self._marks = {
            name: (facts["host"], facts["process"], facts["beats"])
            for name, facts in self._ask(lambda board: board.workers(), nobody).items()
            if facts.get("role") == "worker" and facts.get("is_ready")
        }
        heard = {name for name, mark in self._marks.items() if before.get(name, mark) != mark}
        others = (self._others | heard) & (self._marks.keys() - silent)
        for event, names in (("worker_joined", others - self._others), ("worker_lost", self._others - others)):
            for name in sorted(names):
                self._log(event, worker=name)
        if others != self._others:
            self._others = others
            self._progress.workers(1 + len(others))
        return others

    def _facts(self) -> dict[str, Any]:
        return {
            "role": "search",
            "folder": str(Path.cwd()),
            "run_dir": str(self._run.path.resolve()),
            "store": str(self._job.store.resolve()) if self._job.store else None,
            "threads": torch.get_num_threads(),
        }


class Polls:
    """Waits a little, longer every time."""

    def __init__(self) -> None:
        self._seconds = POLLS_S[0]

    def wait(self) -> None:
        """Sleeps."""
        time.sleep(self._seconds)
        self._seconds = min(self._seconds * 1.5, POLLS_S[1])
