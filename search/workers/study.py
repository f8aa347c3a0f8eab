"""A board in an Optuna storage, for workers that see a database, or a journal file, but not the folder of the run.

A search has a study; work is a trial that waits with what is to be done in its attributes. Claiming it is the
storage's own step from WAITING to RUNNING, which only one can take. Finished trials are COMPLETE and hold the outcome,
or FAIL where it is an error; a trial that failed without an outcome was withdrawn, or its worker died, in which case
a later trial has the same key. The last trial of a key is what counts.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from search.errors import ConfigError, DataError
from search.storages import check_storage, explained, hidden, is_outage, open_storage
from search.workers.board import Board, Outcome, Work, check_name
from search.workers.glance import Glance, JournalGlance, TableGlance
from search.workers.pace import Pace
from search.workers.watch import Clock, Watch

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

T = TypeVar("T")

PATIENCE_S = 60.0
"""How long to wait for a server that is being restarted, in seconds."""

ABOUT, OPEN, BEAT = "about", "open", "beat "
"""Attributes of a study: what the search is about, whether work may come, and each worker's beats."""

WORK, WORKER, OUTCOME = "work", "worker", "outcome"
"""Attributes of a trial: what is to be done, who does it, and what came of it."""

SILENT_S = 5.0
"""Seconds without a beat after which the search of one of several open studies is taken for dead."""

WIDEST = 64  # waiting trials among which to choose where many claim at once


class StudyBoard(Board):
    """A board in a study of an Optuna storage."""

    def __init__(self, where: str, patience_s: float = PATIENCE_S, clock: Clock = time.monotonic) -> None:
        """Names the storage, which is reached when it is first needed.

        Args:
            where: URL of a database, or path of a journal file, with `#NAME` where it names the study.
            patience_s: How long to wait for a server that does not answer any more, in seconds.
            clock: What tells the time, in seconds.

        Raises:
            ConfigError: If it is neither, or a database that cannot tell who was first.
        """
        self._where, _, self._name = where.partition("#")
        check_storage(self._where, "study")
        if self._where.startswith("sqlite"):
            raise ConfigError(
                f"study={self._where} is an SQLite database, in which two workers may claim the same work; give the "
                "path of a journal file, or the URL of a PostgreSQL or MySQL database"
            )
        self._patience_s, self._clock = patience_s, clock
        self._watch = Watch(clock)
        self._searches = Watch(clock)
        self._first_marks: dict[str, str] = {}
        self._silent: frozenset[str] = frozenset()
        self._opened: BaseStorage | None = None
        self._study: int | None = None
        self._glance: Glance | None = None
        self._life = uuid4().hex[:8]
        self._count = 0
        self._held_by_study: dict[str, Any] = {}
        self._finding, self._reading, self._looking, self._claiming = (Pace(clock) for _ in range(4))
        self._forget()
        self._reach = 1  # waiting trials to choose from: more after others were quicker
        self._first_waiting = 0
        self._mine: dict[str, int] = {}
        self._left: dict[str, list[int]] = {}  # what workers claimed before they were killed and started anew

    def _forget(self) -> None:
        """Starts afresh in following the study's trials."""
        self._keys: dict[int, str] = {}
        self._latest: dict[str, int] = {}
        self._outcomes: dict[int, Outcome | None] = {}
        self._running: list[int] = []
        self._first_unfinished = 0

    def open(self, about: Mapping[str, Any]) -> None:
        about = json.loads(json.dumps(dict(about), allow_nan=False))
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
        self._name = self._name or f"search {digest}"
        study = self._ask(self._made, self._name)
        held = self._ask(self._storage.get_study_user_attrs, study).get(ABOUT, about)
        if held != about:
            raise ConfigError(
                f"study {self._name} in {hidden(self._where)} holds another search{_difference(held, about)}; name "
                f"another study with study={hidden(self._where)}#NAME"
            )
        self._ask(self._storage.set_study_user_attr, study, ABOUT, about)
        self._ask(self._storage.set_study_user_attr, study, OPEN, True)
        self._use(study)
        self._reading.hurry()
        self._forget()
        self._look()
        self._outcomes = {i: None if found and found.error else found for i, found in self._outcomes.items()}

    def _made(self, name: str) -> int:
        """The id of the study of a name, which is made where there is none."""
        from optuna.exceptions import DuplicatedStudyError
        from optuna.study import StudyDirection

        try:
            return int(self._storage.create_new_study([StudyDirection.MINIMIZE], name))
        except DuplicatedStudyError:
            return int(self._storage.get_study_id_from_name(name))

    def about(self) -> dict[str, Any] | None:
        found = self._attributes().get(ABOUT)
        return None if found is None else dict(found)

    def close(self) -> None:
        study = self._found()
        if study is not None:
            self._ask(self._storage.set_study_user_attr, study, OPEN, False)
            self._reading.hurry()

    @property
    def is_open(self) -> bool:
        return bool(self._attributes().get(OPEN, False))

    def _attributes(self) -> dict[str, Any]:
        """The study's attributes as of a moment ago; none where there is no study yet."""
        study = self._found()
        if study is not None and self._reading.is_due:
            with self._reading.asking():
                self._held_by_study = dict(self._ask(self._storage.get_study_user_attrs, study))
        return self._held_by_study

    def post(self, works: Sequence[Work]) -> None:
        self._look()
        for work in works:
            if not self._is_posted(work.key):
                self._ask(self._add, work)

    def _add(self, work: Work) -> None:
        from optuna.trial import TrialState, create_trial

        content = {"key": work.key, "kind": work.kind, "content": dict(work.content)}
        template = create_trial(state=TrialState.WAITING, user_attrs={WORK: content})
        number = self._storage.create_new_trial(self._required(), template)
        self._keys[number] = work.key
        self._latest[work.key] = number

    def _is_posted(self, key: str) -> bool:
        """Whether a key's last trial is to be finished, or has an outcome."""
        number = self._latest.get(key)
        return number is not None and self._outcomes.get(number, Outcome("", {})) is not None

    def withdraw(self, keys: Iterable[str]) -> None:
        from optuna.trial import TrialState

        self._look()
        for key in keys:
            number = self._latest.get(key)
            if number is not None and number not in self._outcomes and self._ask(self._takes, number):
                self._ask(self._ends, number, TrialState.FAIL)
                self._outcomes[number] = None

    def claim(self, worker: str) -> Work | None:
        if self._found() is None:
            return None
        if check_name(worker) not in self._left:
            self._left[worker] = self._ask(self._claimed_before, worker)
        if self._left[worker]:
            return self._given(self._left[worker].pop(0))
        while waiting := self._waiting():
            self._first_waiting = waiting[0]
            number = random.choice(waiting)
            if self._ask(self._takes, number):
                self._reach = max(1, self._reach // 2)
                self._ask(self._storage.set_trial_user_attr, number, WORKER, worker)
                return self._given(number)
            self._reach = min(WIDEST, 2 * self._reach)
        return None

    def _waiting(self) -> list[int]:
        """The first trials that wait to be claimed: as many as it takes not to meet others at the same one."""
        if not self._claiming.is_due:
            return []
        with self._claiming.asking():
            waiting = self._ask(self._seen().waiting, self._first_waiting, self._reach)
        if waiting:
            self._claiming.hurry()
        return waiting

    def _given(self, number: int) -> Work:
        """The work of a claimed trial."""
        work = _work(self._held(number))
        self._mine[work.key] = number
        return work

    def _held(self, number: int) -> dict[str, Any]:
        """A trial's attributes."""
        return self._ask(self._seen().attributes, [number]).get(number, {})

    def _claimed_before(self, worker: str) -> list[int]:
        """What a worker of this name claimed, and did not finish, before it was killed."""
        from optuna.trial import TrialState

        running = self._storage.get_all_trials(self._required(), deepcopy=False, states=(TrialState.RUNNING,))
        return [trial._trial_id for trial in running if trial.user_attrs.get(WORKER) == worker]

    def _takes(self, number: int) -> bool:
        """Whether a waiting trial could be claimed: the storage lets only one do so."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            return bool(self._storage.set_trial_state_values(number, TrialState.RUNNING))
        except UpdateFinishedTrialError:
            return False

    def _ends(self, number: int, state: Any, outcome: Mapping[str, Any] | None = None) -> bool:
        """Whether a trial could be given its end, which it has only one of."""
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            if outcome is not None:
                self._storage.set_trial_user_attr(number, OUTCOME, outcome)
            self._storage.set_trial_state_values(number, state)
        except UpdateFinishedTrialError:
            return False
        return True

    def finish(self, work: Work, outcome: Outcome) -> None:
        from optuna.trial import TrialState

        row = {"worker": outcome.worker, "content": dict(outcome.content), "error": outcome.error}
        json.dumps(row, allow_nan=False)
        state = TrialState.COMPLETE if outcome.error is None else TrialState.FAIL
        number = self._mine.pop(work.key, None)
        if number is None or not self._ask(self._ends, number, state, row):
            self._look()
            latest = self._latest[work.key]
            if latest != number and self._ask(self._takes, latest):  # thought dead: it is open again
                self._ask(self._ends, latest, state, row)
        self._looking.hurry()

    def outcome(self, key: str) -> Outcome | None:
        if self._looking.is_due:
            self._look()
        number = self._latest.get(key)
        return None if number is None else self._outcomes.get(number)

    def _look(self) -> None:
        """Follows the study's trials: reads those that are new, and what came of those that are finished."""
        if self._found() is not None:
            with self._looking.asking():
                self._follow()

    def _follow(self) -> None:
        states = self._ask(self._seen().states, self._first_unfinished)
        ended = {number for number, state in states if state not in ("WAITING", "RUNNING")}
        unread = [i for i, _ in states if i not in self._keys or (i in ended and i not in self._outcomes)]
        for number, attributes in sorted(self._ask(self._seen().attributes, unread).items()) if unread else ():
            self._keys[number] = key = _work(attributes).key
            self._latest[key] = max(number, self._latest.get(key, number))
            if number in ended:
                self._outcomes[number] = _outcome(attributes)
        unfinished = [number for number, _ in states if number not in self._outcomes]
        self._running = [number for number, state in states if state == "RUNNING"]
        self._first_unfinished = min(
            unfinished, default=max((i + 1 for i, _ in states), default=self._first_unfinished)
        )

    def beat(self, worker: str, facts: Mapping[str, Any]) -> None:
        study = self._found()
        if study is not None:
            self._count += 1
            row = {"life": self._life, "count": self._count, "facts": dict(facts)}
            self._ask(self._storage.set_study_user_attr, study, f"{BEAT}{check_name(worker)}", row)

    def workers(self) -> dict[str, dict[str, Any]]:
        return {name: row["facts"] for name, row in sorted(self._beats().items())}

    def _beats(self) -> dict[str, dict[str, Any]]:
        """The last beats: as they are now, or somebody would be taken for dead for what was seen a moment ago."""
        self._reading.hurry()
        return _beats_of(self._attributes())

    def reopen(self, silence_s: float) -> list[str]:
        self._look()
        held = self._ask(self._seen().attributes, self._running) if self._running else {}
        # `trial N` stands for whoever claimed a trial, and was not heard to say who he is; no worker's name has a space
        claimants = {number: held.get(number, {}).get(WORKER, f"trial {number}") for number in self._running}
        marks: dict[str, Any] = dict.fromkeys(claimants.values())
        marks |= {worker: (row["life"], row["count"]) for worker, row in self._beats().items()}
        self._silent = frozenset(self._watch.silent(marks, silence_s))
        lost = sorted(number for number, claimant in claimants.items() if claimant in self._silent)
        return [key for number in lost if (key := self._revived(number)) is not None]

    @property
    def silent(self) -> frozenset[str]:
        return self._silent

    def _revived(self, number: int) -> str | None:
        """Ends the trial of a dead worker and posts its work anew; its key, unless the worker had finished it."""
        from optuna.trial import TrialState

        attributes = self._held(number)
        found = _outcome(attributes)
        if found is not None:  # it died between saying what came of it and saying that this is all
            state = TrialState.COMPLETE if found.error is None else TrialState.FAIL
            self._ask(self._ends, number, state)
            return None
        if not self._ask(self._ends, number, TrialState.FAIL):
            return None
        work = _work(attributes)
        self._outcomes[number] = None
        self.post([work])
        return work.key

    @property
    def where(self) -> str:
        return hidden(self._where) + f"#{self._name}" * bool(self._name)

    @property
    def _storage(self) -> BaseStorage:
        """The storage; the first time, a server that does not answer is not waited for."""
        if self._opened is None:
            with explained(self._where, "study"):
                self._opened = open_storage(self._where)
        return self._opened

    def _found(self) -> int | None:
        """The id of the study: that of the name given, or the only one that is open; None where there is none yet."""
        if self._opened is None and "://" not in self._where and not Path(self._where).is_file():
            return None  # to look for a study is not to make a journal
        if self._study is None and self._finding.is_due:
            with self._finding.asking():
                studies = [study for study in self._ask(self._storage.get_all_studies) if ABOUT in study.user_attrs]
            chosen: Sequence[Any]
            if self._name:
                chosen = [study for study in studies if study.study_name == self._name]
            else:
                chosen = self._under_way([study for study in studies if study.user_attrs.get(OPEN)])
            if len(chosen) > 1:
                names = ", ".join(sorted(study.study_name for study in chosen))
                raise ConfigError(
                    f"{hidden(self._where)} holds {len(chosen)} searches that are under way: {names}; say which with "
                    f"'{hidden(self._where)}#NAME'"
                )
            if chosen:
                self._name = chosen[0].study_name
                self._use(chosen[0]._study_id)
        return self._study

    def _under_way(self, studies: Sequence[Any]) -> Sequence[Any]:
        """The open studies of searches that live; where there are several, none before it is known which do."""
        if len(studies) < 2:
            return studies
        marks = {study.study_name: _searching(study.user_attrs) for study in studies}
        self._first_marks = marks | self._first_marks
        silent = self._searches.silent(marks, SILENT_S)
        alive = [name for name, mark in marks.items() if mark != self._first_marks[name] and name not in silent]
        is_known = len(alive) + len(silent) == len(studies) or len(alive) > 1
        return [study for study in studies if study.study_name in alive] if is_known else []

    def _use(self, study: int) -> None:
        from optuna.storages import RDBStorage

        storage = self._storage
        is_table = isinstance(storage, RDBStorage)
        self._glance = self._ask(TableGlance, storage, study) if is_table else JournalGlance(storage, study)
        self._study = study

    def _required(self) -> int:
        study = self._found()
        if study is None:
            raise DataError(f"{hidden(self._where)} holds no search that is open; open the board first")
        return study

    def _seen(self) -> Glance:
        self._required()
        assert self._glance is not None
        return self._glance

    def _ask(self, call: Callable[..., T], *arguments: Any) -> T:
        """Asks the storage, again and again for a while where it does not answer.

        Raises:
            DataError: If it still does not answer then, or if something else is wrong with it.
        """
        until = None
        wait_s = 0.1
        while True:
            try:
                return call(*arguments)
            except KeyError:
                raise DataError(f"study {self._name} in {hidden(self._where)} is gone; somebody deleted it") from None
            except Exception as error:
                until = until or self._clock() + self._patience_s
                if not is_outage(error) or self._clock() + wait_s > until:
                    with explained(self._where, "study"):
                        raise
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, 2.0)


def _beats_of(attributes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Everybody's last beat, among the attributes of a study."""
    return {name.removeprefix(BEAT): row for name, row in attributes.items() if name.startswith(BEAT)}


def _searching(attributes: Mapping[str, Any]) -> str:
    """The last beats of the processes that search, among the attributes of a study, as one text."""
    beats = _beats_of(attributes)
    return json.dumps([row for _, row in sorted(beats.items()) if row["facts"].get("role") == "search"])


def _work(attributes: Mapping[str, Any]) -> Work:
    row = attributes[WORK]
    return Work(row["key"], row["kind"], row["content"])


def _outcome(attributes: Mapping[str, Any]) -> Outcome | None:
    row = attributes.get(OUTCOME)
    return None if row is None else Outcome(row["worker"], row["content"], row["error"])


def _difference(held: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Says in what two descriptions of searches differ first."""
    for key in [*held, *given]:
        if held.get(key) != given.get(key):
            return f", with {key}={held.get(key)} rather than {given.get(key)}"
    return ""
