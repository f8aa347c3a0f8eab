"""Which trials of a study are in which state, at a glance.

Optuna's own calls read trials with everything in them. What is asked here many times a second is two columns of the
table of trials, from the first one on that may still change; what trials hold is read when they are new and when they
end.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.storages import BaseStorage, RDBStorage

MOST_IDS = 500  # in one statement: databases allow only so many values


class Glance(ABC):
    """Reads one study's trials by their ids."""

    @abstractmethod
    def states(self, since: int) -> list[tuple[int, str]]:
        """The trials from an id on, in their order: id, and state such as `WAITING`."""

    @abstractmethod
    def waiting(self, since: int, count: int) -> list[int]:
        """The ids of the first trials from an id on that wait to be claimed, at most `count`."""

    @abstractmethod
    def attributes(self, trials: Sequence[int]) -> dict[int, dict[str, Any]]:
        """The user attributes of trials, by id."""


class TableGlance(Glance):
    """Asks the database, whose tables are of the version that Optuna checked when it opened them."""

    def __init__(self, storage: RDBStorage, study: int) -> None:
        from sqlalchemy import MetaData, Table, bindparam, select

        self._engine = storage.engine.execution_options(isolation_level="AUTOCOMMIT")
        table = Table("trials", MetaData(), autoload_with=self._engine, resolve_fks=False)
        since = (table.c.study_id == study, table.c.trial_id >= bindparam("since"))
        ordered = select(table.c.trial_id, table.c.state).where(*since).order_by(table.c.trial_id)
        self._states = ordered
        self._waiting = ordered.where(table.c.state == "WAITING").limit(bindparam("count"))
        held = Table("trial_user_attributes", MetaData(), autoload_with=self._engine, resolve_fks=False)
        wanted = held.c.trial_id.in_(bindparam("trials", expanding=True))
        self._attributes = select(held.c.trial_id, held.c.key, held.c.value_json).where(wanted)

    def states(self, since: int) -> list[tuple[int, str]]:
        with self._engine.connect() as connection:
            return [(row[0], row[1]) for row in connection.execute(self._states, {"since": since})]

    def waiting(self, since: int, count: int) -> list[int]:
        with self._engine.connect() as connection:
            return [row[0] for row in connection.execute(self._waiting, {"since": since, "count": count})]

    def attributes(self, trials: Sequence[int]) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = defaultdict(dict)
        with self._engine.connect() as connection:
            for start in range(0, len(trials), MOST_IDS):
                some = {"trials": trials[start : start + MOST_IDS]}
                for trial, key, text in connection.execute(self._attributes, some):
                    found[trial][key] = json.loads(text)
        return found


class JournalGlance(Glance):
    """Looks at what a journal's storage holds in memory."""

    def __init__(self, storage: BaseStorage, study: int) -> None:
        self._storage, self._study = storage, study

    def states(self, since: int) -> list[tuple[int, str]]:
        trials = self._storage.get_all_trials(self._study, deepcopy=False)
        return [(trial._trial_id, trial.state.name) for trial in trials if trial._trial_id >= since]

    def waiting(self, since: int, count: int) -> list[int]:
        from optuna.trial import TrialState

        trials = self._storage.get_all_trials(self._study, deepcopy=False, states=(TrialState.WAITING,))
        return [trial._trial_id for trial in trials[:count]]

    def attributes(self, trials: Sequence[int]) -> dict[int, dict[str, Any]]:
        return {trial: self._storage.get_trial_user_attrs(trial) for trial in trials}
