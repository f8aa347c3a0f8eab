"""What all strategies have in common that draw policies from a sampler of Optuna's."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from search.errors import ConfigError, closest
from search.objective import Objective
from search.space import SearchSpace
from search.storages import check_storage
from search.strategies.base import Strategy, checks_types
from search.strategies.samplers.dialogue import Dialogue
from search.strategies.samplers.mirror import Mirror, identity
from search.strategies.samplers.parameters import TIES, Parameters, Tie
from search.strategies.samplers.quietly import experiments_allowed
from search.units import COST_NAMES

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler


class OptunaSearch(Strategy):
    """Policies drawn from an Optuna sampler, which is told what came of each.

    Every open decision is a whole number, the index of its format from few bits to many, so that samplers know their
    order; in large spaces the decisions of one block share a number. Limits are constraints, where the sampler knows
    such, else what is violated is added to its loss. What `start_from` gives and the uniform policies come first.
    See `search.strategies.samplers.dialogue` for what happens to repeated proposals and to those over a limit.

    A subclass gives `name` and `make_sampler`.
    """

    @checks_types
    def __init__(
        self,
        evaluations: int = 100,
        seconds: float | None = None,
        start_from: str | None = None,
        *,
        costs: Sequence[str] = (),
        tie: Tie = "auto",
        storage: str | None = None,
        study: str | None = None,
        batch: int = 1,
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.
            costs: Costs to minimise beside the drop of quality, for a front; empty for a single best policy.
            tie: `block` gives the decisions of one block with the same side and formats one number, `none` every
                decision its own, and `auto` ties where more than 50 decisions are open.
            storage: Where to mirror the trials: path of a journal file, or URL of a database; None is nowhere.
            study: Name of the study there; None makes one of the strategy's name and what tells the search from others.
            batch: Policies that the sampler proposes before it is told what came of them; what is found depends on it,
                and not on who measures them.

        Raises:
            ConfigError: If a value is not allowed, or the sampler cannot minimise several things at once.
        """
        super().__init__(evaluations, seconds, start_from)
        if tie not in TIES:
            raise ConfigError(f"strategy.tie={tie} is unknown{closest(str(tie), TIES)}; allowed: {', '.join(TIES)}")
        if study is not None and storage is None:
            raise ConfigError(f"strategy.study={study} names a study in no storage; set strategy.storage, too")
        if storage is not None:
            check_storage(storage, "strategy.storage")
        if batch < 1:
            raise ConfigError(f"strategy.batch={batch} must be at least 1")
        self.costs = _checked(costs)
        self.tie = tie
        self.storage = storage
        self.study = study
        self.batch = batch

    @property
    def proposes_one(self) -> bool:
        return self.batch == 1

    @abstractmethod
    def make_sampler(self, seed: int) -> BaseSampler:
        """Makes the sampler, every default that differs between Optuna versions spelt out."""

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        for cost in self.costs:
            if math.isnan(objective.pricing.reference("float")[cost]):
                source = objective.pricing.cost_model.name
                raise ConfigError(f"strategy.costs names {cost}, which hardware {source} does not predict")
        seed = int(rng.integers(2**31))
        with experiments_allowed():
            sampler = self.make_sampler(seed)
        metrics = self._metrics(objective)
        mirror = self._mirror(objective, seed, metrics) if self.storage else None
        Dialogue(
            study_in_memory(sampler, len(metrics)),
            Parameters.of(space, self.tie),
            objective,
            rng,
            self.costs,
            knows_constraints=knows_constraints(sampler),
            on_trial=mirror.add if mirror else lambda trial: None,
            batch=self.batch,
        ).run()

    def _metrics(self, objective: Objective) -> list[str]:
        if self.costs:
            return ["drop", *self.costs]
        return ["drop" if objective.quality_drop is None else objective.primary_cost]

    def _mirror(self, objective: Objective, seed: int, metrics: Sequence[str]) -> Mirror:
        """Opens the study that this search is mirrored to."""
        assert self.storage is not None
        facts: dict[str, Any] = {
            "strategy": self.name,
            "settings": {key: value for key, value in vars(self).items() if key not in ("storage", "study")},
            "seed": seed,
            "limits": objective.limits
            | ({} if objective.quality_drop is None else {"quality_drop": objective.quality_drop}),
            "float_quality": objective.float_quality,
        }
        decisions = [(d.side, d.name, *map(str, d.formats)) for d in objective.space.decisions]
        search = identity(**facts, decisions=decisions, hardware=objective.pricing.cost_model.name)
        mirror = Mirror(self.storage, self.study or f"{self.name} {search}", objective, metrics, search)
        mirror.describe(**facts)
        return mirror


def knows_constraints(sampler: BaseSampler) -> bool:
    """Whether a sampler is of a kind that reads the constraints of trials."""
    from optuna.samplers import GPSampler, NSGAIIISampler, NSGAIISampler, TPESampler

    return isinstance(sampler, TPESampler | NSGAIISampler | NSGAIIISampler | GPSampler)


def study_in_memory(sampler: BaseSampler, objectives: int) -> optuna.Study:
    """A study for a sampler to work on, that says nothing on the terminal."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)


def check_several(sampler: BaseSampler, costs: Sequence[str], name: str) -> None:
    """Tries whether a sampler can minimise several things at once.

    Raises:
        ConfigError: If it cannot.
    """
    from optuna.distributions import IntDistribution

    try:
        study_in_memory(sampler, 1 + len(costs)).ask({"level": IntDistribution(0, 1)})
    except ValueError as error:
        raise several_refused(name, costs) from error


def several_refused(name: str, costs: Sequence[str]) -> ConfigError:
    """The error of a sampler that has one objective."""
    return ConfigError(
        f"strategy.costs=[{', '.join(costs)}] asks for a front, but {name} minimises one number only; leave "
        "strategy.costs out, or use strategy=tpe, nsga2, nsga3 or gp"
    )


def _checked(costs: Sequence[str]) -> tuple[str, ...]:
    if costs is not None and not isinstance(costs, (list, tuple)):
        raise ConfigError(f"strategy.costs={costs} must be a list, such as [{costs}]")
    for cost in costs or ():
        if cost not in COST_NAMES:
            raise ConfigError(
                f"strategy.costs names {cost}, which is no cost{closest(str(cost), COST_NAMES)}; "
                f"allowed: {', '.join(COST_NAMES)}"
            )
    if len(set(costs or ())) != len(costs or ()):
        raise ConfigError(f"strategy.costs=[{', '.join(costs)}] names a cost twice")
    return tuple(costs or ())
