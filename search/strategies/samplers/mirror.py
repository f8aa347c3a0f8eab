"""A search mirrored into Optuna's storage, to be looked at with optuna-dashboard and Optuna's own plots.

The sampler itself works on a study in memory. Optuna's storages keep what trials came to but not the state of a
sampler's random generator, so that a search that goes on in a storage takes another course than the undisturbed one;
replaying it from its seed does not, and trials that the storage has already are not added again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.errors import ConfigError
from search.objective import Objective
from search.storages import explained, hidden, open_storage
from search.strategies.samplers.quietly import experiments_allowed
from search.trials import Trial

if TYPE_CHECKING:
    import optuna

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
        with explained(self._storage, "strategy.storage"):
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
        with explained(self._storage, "strategy.storage"):
            for key, value in facts.items():
                self._study.set_user_attr(key, value)

    def add(self, trial: Trial) -> None:
        """Adds a trial unless the study has it already.

        Raises:
            ConfigError: If the study has another trial in its place.
            DataError: If the storage cannot be reached any more; what was measured is not lost by that.
        """
        with explained(self._storage, "strategy.storage"):
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


def identity(**facts: Any) -> str:
    """A short name for everything that decides the course of a search."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _open(storage: str, name: str, metrics: Sequence[str]) -> optuna.Study:
    """Opens or creates a study, one process at a time where the storage is a file."""
    import optuna
    from filelock import FileLock
    from sqlalchemy.engine import make_url

    is_url = "://" in storage
    file = make_url(storage).database if storage.startswith("sqlite") else None if is_url else storage
    if file and file != ":memory:":
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.opening") if file else nullcontext(), experiments_allowed():
        study = optuna.create_study(
            storage=open_storage(storage), study_name=name, directions=["minimize"] * len(metrics), load_if_exists=True
        )
        if study.metric_names is None:
            study.set_metric_names(list(metrics))
    return study
