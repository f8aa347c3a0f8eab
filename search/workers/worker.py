"""A worker: joins a search through its board, makes the same networks, and works until the search needs it no more."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from search.errors import BitplanError, ConfigError
from search.job import Job
from search.preparation import Ground, Stages
from search.rundir import EVALUATIONS, RunDirectory
from search.workers.board import Board, Outcome, Work
from search.workers.hands import BEAT_S, Hands, OtherAnswersError, Pulse, first_subject

POLLS_S = (0.005, 0.2)
"""Seconds between looks for work, the first and the longest ones."""

MakeJob = Callable[[Mapping[str, Any], Path], Job]
"""From the settings of a search and a folder to its job."""


class Worker:
    """One process that works for one search."""

    def __init__(
        self,
        board: Board,
        name: str,
        make_job: MakeJob,
        run_dir: Path | None = None,
        patience_s: float = 60.0,
        parent: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Names who works, and where.

        Args:
            board: The search's board.
            name: What this worker is called on it.
            make_job: Makes the search's job of its settings.
            run_dir: The run directory, where it is seen.
            patience_s: Seconds for which a search may give no sign of life before the worker leaves.
            parent: The process without which it leaves at once.
            say: Tells the user something.
        """
        self._board, self._name, self._make_job, self._say = board, name, make_job, say
        self._run_dir, self._patience_s, self._parent = run_dir, patience_s, parent
        self._is_ready = False
        self._done: dict[str, int] = {"measure": 0, "score": 0}
        self._heard = time.monotonic()
        self._beats: dict[str, int] = {}
        self._search_facts: Mapping[str, Any] | None = None
        self._looked = float("-inf")

    def work(self) -> None:
        """Joins, and works until the search ends, or gives no sign of life.

        Raises:
            ConfigError: If there is no search, its task cannot be made here, or another worker has this name.
            OtherAnswersError: If this process computes other last digits than the search.
        """
        about = self._await_board()
        self._check_name()
        with ExitStack() as stack:
            stack.enter_context(Pulse(self._board, self._name, self._facts, self._say))
            search = self._search() or {}
            if search.get("threads"):
                torch.set_num_threads(search["threads"])  # other numbers of them may sum in another order
            self._say(f"{self._name} joins: making the network of the search")
            hands = self._ready(about, search, stack)
            self._is_ready = True
            self._say(f"{self._name} is ready")
            why = self._do_all(hands)
            self._is_ready = False
        measured, scored = self._done["measure"], self._done["score"]
        self._say(f"{self._name} leaves: {why}; it measured {measured} policies and scored {scored} shares of choices")

    def _await_board(self) -> Mapping[str, Any]:
        """Waits until the search has opened its board; returns what it is about."""
        has_said = False
        while True:
            about = self._board.about()
            if about is not None and self._board.is_open and self._search() is not None:
                return about
            why = self._why_none()
            if why or self._is_forsaken():
                raise ConfigError(
                    why
                    or f"{self._board.where}: no search that is under way gave a sign of life there for "
                    f"{self._patience_s:g} s; see that this is the place that it was given, and start it first"
                )
            if not has_said:
                self._say(f"{self._name} waits for the search to begin")
                has_said = True
            time.sleep(POLLS_S[1])

    def _why_none(self) -> str | None:
        """Why the run will open no board, as far as its run.json says so."""
        if self._run_dir is None or not (self._run_dir / "run.json").is_file():
            return None
        info = RunDirectory(self._run_dir).info()
        if info.get("status") != "running" and self._parent is None:
            return (
                f"the search in {self._run_dir} is {info.get('status', 'damaged')}: repeat its command first, and then "
                "join it"
            )
        config = info.get("config")
        if not isinstance(config, Mapping) or not isinstance(config.get("task"), Mapping):
            return (
                f"the search in {self._run_dir} was made from Python: its model cannot be made here; write a "
                "search.tasks.task.Task and use bitplan search"
            )
        return None

    def _check_name(self) -> None:
        """Refuses a name under which somebody beats."""
        marks = []
        for _ in range(2):
            facts = self._board.workers().get(self._name)
            marks.append(facts and (facts.get("host"), facts.get("process"), facts.get("beats")))
            if facts is None or len(marks) == 2:
                break
            time.sleep(2 * BEAT_S)
        if len(marks) == 2 and marks[0] != marks[1]:
            raise ConfigError(f"a worker called {self._name} is at work for this search; choose another --name")

    def _ready(self, about: Mapping[str, Any], search: Mapping[str, Any], stack: ExitStack) -> Hands:
        """Makes the networks, and compares what they answer with what those of the search answer."""
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitplan-worker-")))
        shared = Path(search["store"]) if search.get("store") else None
        seen = shared if self._run_dir and shared and shared.is_dir() else folder
        try:
            job = self._make_job(about["config"], folder)
        except BitplanError as error:
            raise ConfigError(
                f"the search's settings cannot be used here: {error}; start the worker with the same packages, and in "
                f"the folder where the search was started, {search.get('folder')}"
            ) from error
        own = self._run_dir / EVALUATIONS if self._run_dir else folder / EVALUATIONS
        stages = Stages(Ground.of(job), folder, seen, own)
        store = stages.calibrated.store
        found = store.about if store else {}
        differing = [key for key in about["evaluations"] if found.get(key) != about["evaluations"][key]]
        if store is None or differing:
            raise OtherAnswersError(_explained(differing, about["evaluations"], found))
        if asdict(first_subject(stages)) != about["subject"]:
            raise OtherAnswersError(_explained(["answers"], {"answers": "quantized"}, {}))
        return Hands(self._name, stages, self._run_dir or folder, sends_scores=self._run_dir is None)

    def _do_all(self, hands: Hands) -> str:
        """Works; returns why no more."""
        wait = POLLS_S[0]
        while True:
            work = self._board.claim(self._name)
            if work is not None:
                self._do(hands, work)
                wait = POLLS_S[0]
                continue
            if not self._board.is_open:
                return "the search needs no more"
            if self._is_forsaken():
                return f"the search gave no sign of life for {self._patience_s:g} s"
            time.sleep(wait)
            wait = min(wait * 1.5, POLLS_S[1])

    def _do(self, hands: Hands, work: Work) -> None:
        started = time.perf_counter()
        try:
            outcome = hands.do(work)
        except OtherAnswersError as error:
            self._board.finish(work, Outcome(self._name, {"kind": type(error).__name__}, str(error)))
            raise
        self._board.finish(work, outcome)
        self._done[work.kind] += 1
        seconds = time.perf_counter() - started
        if work.kind == "measure":
            what = f"policy {work.key.rpartition('-')[2]} on {work.content['split']}"
        else:
            what = f"{len(work.content['choices'])} choices"
        verb = f"could not do {what} ({outcome.error})" if outcome.error else f"{work.kind}d {what}"
        self._say(f"{self._name} {verb} in {seconds:.2f} s")

    def _search(self) -> Mapping[str, Any] | None:
        """What the process that searches last said of itself, once it was heard to beat; remembers when that was."""
        now = time.monotonic()
        if now - self._looked < BEAT_S / 2:
            return self._search_facts
        self._looked = now
        searches = {name: facts for name, facts in self._board.workers().items() if facts.get("role") == "search"}
        for name, facts in searches.items():
            if name in self._beats and self._beats[name] != facts["beats"]:
                self._heard, self._search_facts = now, facts
        self._beats = {name: facts["beats"] for name, facts in searches.items()}
        return self._search_facts

    def _is_forsaken(self) -> bool:
        """Whether the search is gone, as far as one can see."""
        self._search()
        is_orphaned = self._parent is not None and os.getppid() != self._parent
        return is_orphaned or time.monotonic() - self._heard > self._patience_s

    def _facts(self) -> dict[str, Any]:
        return {"role": "worker", "is_ready": self._is_ready, "done": sum(self._done.values())}


def _explained(differing: list[str], wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Says in what this process differs from the search."""
    rest = [key for key in differing if key != "answers"]
    if not rest:
        return (
            "this machine computes other last digits than the one that searches, so its measurements would not be the "
            "same: use machines with the same kind of processor, the same packages and the same number of threads"
        )
    said = "; ".join(f"{key} is {found.get(key)} here, and {wanted[key]} there" for key in rest)
    return f"this process measures something else than the search does: {said}"
