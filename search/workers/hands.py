"""What everybody does who works for a search, the process that searches among them: measure, and score."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from search.errors import BitplanError, one_line
from search.policy import Policy
from search.preparation import Stages
from search.quality.evaluate import Evaluator
from search.quality.store import Order, Subject
from search.sensitivity.forward import Sweep
from search.sensitivity.scoring import sweep_of
from search.workers.board import Board, Outcome, Work

BEAT_S = 1.0
"""Seconds between beats."""

SILENCE_S = 5.0
"""Seconds without a beat after which a worker is taken for dead."""


class OtherAnswersError(BitplanError):
    """This process computes other last digits than the search it works for."""


def measure_work(task: str, order: Order) -> Work:
    """The work that an order is.

    Args:
        task: Digest of everything that the task's scores depend on; it keeps what was found for another one apart.
        order: The measurement.
    """
    how = "race" if order.rivals is not None else f"{order.fidelity:g}"
    content = {
        "subject": asdict(order.subject),
        "policy": order.policy.to_dict(),
        "split": order.split,
        "part": order.part,
        "fidelity": order.fidelity,
        "rivals": None if order.rivals is None else [rival.to_dict() for rival in order.rivals],
    }
    network, part, policy = order.place
    return Work(f"measure-{task}-{network}-{part}-{how}-{policy}", "measure", content)


def score_work(task: str, subject: Subject, choices: list[int], about: Any) -> Work:
    """The work of scoring some choices.

    Args:
        task: Digest of everything that the task's scores depend on.
        subject: The network.
        choices: Their positions.
        about: What the whole table is made from, as plain values.
    """
    whole = json.dumps([task, subject.digest, choices, about], sort_keys=True)
    content = {"subject": asdict(subject), "choices": choices}
    return Work(f"score-{sha256(whole.encode()).hexdigest()[:24]}", "score", content)


def order_of(content: Mapping[str, Any]) -> Order:
    """The measurement that the content of work asks for."""
    rivals = content["rivals"]
    return Order(
        Subject(**content["subject"]),
        Policy.from_dict(content["policy"]),
        content["split"],
        content["part"],
        content["fidelity"],
        None if rivals is None else tuple(map(Policy.from_dict, rivals)),
    )


def first_subject(stages: Stages) -> Subject:
    """The network before anything is repaired that measuring decides about: by its answers workers are known."""
    calibrated = stages.calibrated
    assert calibrated.store is not None
    if calibrated.simulated.settings.repair == "auto":
        calibrated.simulated.repair_with("none")
    return calibrated.store.subject(calibrated.simulated)


class Hands:
    """Does work on the networks of one search."""

    def __init__(
        self, name: str, stages: Stages, folder: Path, *, sends_scores: bool = False, restores: bool = False
    ) -> None:
        """Takes up the networks.

        Args:
            name: Who works.
            stages: The networks.
            folder: Where what is scored is written: the run directory, or a folder of one's own.
            sends_scores: Whether what is scored goes with the outcome, too, as the search does not see the folder.
            restores: Whether the networks are left with the repair within the loop that they were found with, for
                somebody else who is measuring them.
        """
        self._name = name
        self._stages = stages
        self._folder = folder
        self._sends_scores = sends_scores
        self._restores = restores
        self._sweeps: dict[str, Sweep] = {}

    def do(self, work: Work) -> Outcome:
        """Does a piece of work; what goes wrong is an outcome, too.

        Raises:
            OtherAnswersError: If the network computes other last digits here than where the search runs.
        """
        try:
            return Outcome(self._name, self._done(work))
        except OtherAnswersError:
            raise
        except Exception as error:  # whatever the user's task raises: who searches comes upon it, and tells the user
            return Outcome(self._name, {"kind": type(error).__name__}, one_line(error))

    def _done(self, work: Work) -> dict[str, Any]:
        subject = Subject(**work.content["subject"])
        with self._repaired(subject) as evaluator, evaluator.uncounted():
            assert evaluator.store is not None
            if evaluator.store.subject(evaluator.simulated) != subject:
                raise OtherAnswersError(
                    f"the network, {subject.stage} and with repair={subject.repair}, answers otherwise here than "
                    "where the search runs"
                )
            if work.kind == "measure":
                return {"file": base64.b64encode(evaluator.fill(order_of(work.content))).decode()}
            sweep, choices = self._sweep(evaluator, subject), work.content["choices"]
            sweep.write(choices)
            sent = choices if self._sends_scores else ()
            return {"files": {str(choice): base64.b64encode(sweep.file(choice)).decode() for choice in sent}}

    @contextmanager
    def _repaired(self, subject: Subject) -> Iterator[Evaluator]:
        """What measures a network, repaired within the loop as it is to be."""
        calibrated = self._stages.calibrated.simulated
        held = calibrated.settings.repair
        if held != subject.repair:
            calibrated.repair_with(subject.repair)
        try:
            if subject.stage == "calibrated":
                yield self._stages.calibrated
            else:
                tuned = self._stages.tuned() if subject.stage == "tuned" else None
                yield tuned or self._stages.repaired()[0]
        finally:
            if self._restores and held != subject.repair:
                calibrated.repair_with(held)

    def _sweep(self, evaluator: Evaluator, subject: Subject) -> Sweep:
        if subject.digest not in self._sweeps:
            job, space = self._stages.ground.job, self._stages.ground.space
            sweep = sweep_of(job.task, evaluator.simulated, space, job.sensitivity, self._folder)
            self._sweeps[subject.digest] = sweep
        return self._sweeps[subject.digest]


class Pulse:
    """Beats on a board while a block runs, in a thread of its own."""

    def __init__(
        self, board: Board, name: str, facts: Callable[[], Mapping[str, Any]], say: Callable[[str], None]
    ) -> None:
        """Names who beats.

        Args:
            board: Where.
            name: Who.
            facts: What is said with every beat.
            say: Told once that nobody hears it; called from another thread.
        """
        self._board, self._name, self._facts, self._say = board, name, facts, say
        self._count = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"pulse of {name}", daemon=True)
        self._is_heard = True

    def beat(self) -> None:
        """Beats once; where that fails, others take this process for dead, and it goes on by itself."""
        self._count += 1
        where = {"host": socket.gethostname(), "process": os.getpid(), "beats": self._count}
        try:
            self._board.beat(self._name, {**self._facts(), **where})
        except (BitplanError, OSError) as error:
            if self._is_heard:
                self._is_heard = False
                self._say(f"nobody can see that {self._name} is alive: {one_line(error)}")

    def _run(self) -> None:
        while not self._ends.wait(BEAT_S):
            self.beat()

    def __enter__(self) -> Pulse:
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        self._thread.join(timeout=BEAT_S)  # it may be waiting for a server that is down
