"""A search mirrored into Optuna's storage, to be looked at with optuna-dashboard and Optuna's own plots.

The sampler itself works on a study in memory. Optuna's storages keep what trials came to but not the state of a
sampler's random generator, so that a search that goes on in a storage takes another course than the undisturbed one;
replaying it from its seed does not, and trials that the storage has already are not added again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.errors import ConfigError, DataError
from search.objective import Objective
from search.strategies.samplers.quietly import experiments_allowed
from search.trials import Trial

if TYPE_CHECKING:
    import optuna

PATIENCE_S = 60.0  # how long to wait for others that write to the same SQLite file
IDENTITY = "bitplan search"  # the study attribute that says which search it holds


class Mirror:
    """A study in a storage that is given every trial of one search, in order.

    Parameters are the formats of the open decisions, whatever the sampler ties, so that every policy has its place.
    Measured policies are complete, those over a limit or stopped in a race pruned, and what has no quality failed.
    """

    def __init__(self, storage: str, name: str, objective: Objective, metrics: Sequence[str], search: str) -> None:
        """Opens or creates the study.

        Args:
            storage: Path of a journal file, or URL of a database.
            name: Name of the study.
            objective: The space, and what violates a limit.
            metrics: What is minimised: `drop` or costs.
            search: What tells this search from others.

        Raises:
            ConfigError: If the study holds another search.
            DataError: If the storage cannot be used.
        """
        self._storage, self._objective, self._metrics = storage, objective, tuple(metrics)
        with self._explained():
            self._study = _open(storage, name, self._metrics)
            held = self._study.user_attrs.get(IDENTITY)
            if held is None and not self._study.get_trials(deepcopy=False):
                self._study.set_user_attr(IDENTITY, search)
                held = search
        if held != search:
            raise ConfigError(
                f"strategy.study={name} in {hidden(storage)} holds another search, of other settings or another seed; "
                "name another study, or leave strategy.study out for one of its own"
            )

    def describe(self, **facts: Any) -> None:
        """Writes facts about the search to the study, for its readers."""
        with self._explained():
            for key, value in facts.items():
                self._study.set_user_attr(key, value)

    def add(self, trial: Trial) -> None:
        """Adds a trial unless the study has it already.

        Raises:
            ConfigError: If the study has another trial in its place.
            DataError: If the storage cannot be reached any more; what was measured is not lost by that.
        """
        with self._explained():
            there = self._study.get_trials(deepcopy=False)
            if trial.number == len(there):
                self._study.add_trial(self._frozen(trial))
        if trial.number < len(there) and there[trial.number].user_attrs.get("digest") != trial.digest:
            raise ConfigError(
                f"trial {trial.number} of study {self._study.study_name} in {hidden(self._storage)} is another policy "
                "than this search proposed; name another study with strategy.study=NAME"
            )

    def _frozen(self, trial: Trial) -> optuna.trial.FrozenTrial:
        from optuna.distributions import CategoricalDistribution
        from optuna.trial import TrialState, create_trial

        space = self._objective.space
        point = space.encode(trial.policy)
        states = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        open_ = {f"{space.decisions[i].side} {space.decisions[i].name}": i for i in space.free}
        formats = {name: tuple(map(str, space.decisions[i].formats)) for name, i in open_.items()}
        measured = {name: value for name, value in trial.metrics.items() if value is not None}
        costs = {name: value for name, value in trial.cost.items() if value is not None}
        violations = self._objective.violations(trial)
        return create_trial(
            state=states.get(trial.state, TrialState.PRUNED),
            values=[trial.drop if name == "drop" else costs[name] for name in self._metrics]
            if trial.state == "complete"
            else None,
            params={name: formats[name][point[i]] for name, i in open_.items()},
            distributions={name: CategoricalDistribution(choices) for name, choices in formats.items()},
            user_attrs={"digest": trial.digest, "state": trial.state, **measured, **costs},
            constraints=violations,
            system_attrs={"constraints": list(violations.values())},  # where optuna-dashboard 0.21 looks for them
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what databases and files raise into a message without a password."""
        from optuna.exceptions import OptunaError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (OptunaError, SQLAlchemyError, ImportError, OSError, RuntimeError, ValueError) as error:
            reason = hidden(" ".join(str(error.__cause__ or error).split()))
            raise DataError(
                f"strategy.storage={hidden(self._storage)} cannot be used: {reason}; it must be the path of a journal "
                "file, or a URL such as sqlite:///studies.db or postgresql://user@host/name"
            ) from None  # what it hides may hold the password


def identity(**facts: Any) -> str:
    """A short name for everything that decides the course of a search."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def hidden(text: str) -> str:
    """A text without the passwords of the URLs in it."""
    return re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", re.sub(r"(?i)((?:password|passwd|pwd)=)[^&\s]*", r"\1***", text))


def check_storage(storage: str) -> None:
    """Checks what can be checked of a storage without opening it.

    Raises:
        ConfigError: If it is neither a URL nor a path that a journal could have.
    """
    if not storage or (":" in storage and "://" not in storage and not Path(storage).parent.is_dir()):
        raise ConfigError(
            f"strategy.storage={hidden(storage)} is neither a path nor a URL; give the path of a journal file such as "
            "runs/optuna.log, or a URL such as sqlite:///studies.db"
        )
    if "://" not in storage and Path(storage).is_dir():
        raise ConfigError(
            f"strategy.storage={storage} is a folder; name a journal file in it, such as {storage}/optuna.log"
        )


def _open(storage: str, name: str, metrics: Sequence[str]) -> optuna.Study:
    """Opens or creates a study, one process at a time where the storage is a file."""
    import optuna
    from filelock import FileLock
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.engine import make_url

    is_url = "://" in storage
    file = make_url(storage).database if storage.startswith("sqlite") else None if is_url else storage
    if file and file != ":memory:":
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.opening") if file else nullcontext(), experiments_allowed():
        if is_url:
            waits = {"connect_args": {"timeout": PATIENCE_S}} if storage.startswith("sqlite") else {}
            opened: Any = RDBStorage(storage, engine_kwargs=waits)
        else:
            opened = JournalStorage(JournalFileBackend(storage))
        study = optuna.create_study(
            storage=opened, study_name=name, directions=["minimize"] * len(metrics), load_if_exists=True
        )
        if study.metric_names is None:
            study.set_metric_names(list(metrics))
    return study
