"""Optuna's samplers by name, and any other by its target."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from search.errors import ConfigError
from search.strategies.base import checks_types
from search.strategies.samplers.base import OptunaSearch, check_several, several_refused
from search.strategies.samplers.quietly import experiments_allowed

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

GENERATIONS = 5  # at least, of a genetic algorithm with a population of its own choosing
POPULATIONS = (8, 50)  # the least and the most individuals of such a population; 50 is Optuna's own


class _Modelled(OptunaSearch):
    """What samplers have in common that model what they were told: trials before there is a model."""

    @checks_types
    def __init__(
        self,
        evaluations: int = 100,
        seconds: float | None = None,
        start_from: str | None = None,
        *,
        startup: int = 10,
        **common: Any,
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.
            startup: Trials, the enqueued ones among them, before the sampler uses what it learnt.
            common: What every `OptunaSearch` takes.

        Raises:
            ConfigError: If a value is not allowed.
        """
        super().__init__(evaluations, seconds, start_from, **common)
        self.startup = at_least(1, startup, "startup")


class Tpe(_Modelled):
    """Optuna's tree-structured Parzen estimator over all decisions together.

    Watanabe, "Tree-Structured Parzen Estimator: Understanding Its Algorithm Components and Their Roles for Better
    Empirical Performance", 2023; several objectives by Ozaki et al., JAIR 73, 2022.
    """

    name = "tpe"

    def make_sampler(self, seed: int) -> BaseSampler:
        from optuna.samplers import TPESampler

        return TPESampler(
            n_startup_trials=self.startup,
            n_ei_candidates=24,
            multivariate=True,
            group=False,
            constant_liar=self.batch > 1,  # proposals of one batch are to differ
            seed=seed,
        )


class _Genetic(OptunaSearch):
    """What both genetic algorithms have in common: a population that fits the evaluations."""

    @checks_types
    def __init__(
        self,
        evaluations: int = 100,
        seconds: float | None = None,
        start_from: str | None = None,
        *,
        population: int | None = None,
        **common: Any,
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.
            population: Individuals of a generation; None is a fifth of the evaluations, at least 8 and at most 50.
            common: What every `OptunaSearch` takes.

        Raises:
            ConfigError: If a value is not allowed.
        """
        super().__init__(evaluations, seconds, start_from, **common)
        least, most = POPULATIONS
        self.population = (
            min(max(evaluations // GENERATIONS, least), most)
            if population is None
            else at_least(2, population, "population")
        )

    def _variation(self, seed: int) -> dict[str, Any]:
        return {
            "population_size": self.population,
            "mutation_prob": None,  # one decision of each child, on average
            "crossover": None,  # uniform: each decision from either parent
            "crossover_prob": 0.9,
            "swapping_prob": 0.5,
            "seed": seed,
        }


class Nsga2(_Genetic):
    """NSGA-II: Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", IEEE TEC 6(2), 2002."""

    name = "nsga2"

    def make_sampler(self, seed: int) -> BaseSampler:
        from optuna.samplers import NSGAIISampler

        return NSGAIISampler(**self._variation(seed))


class Nsga3(_Genetic):
    """NSGA-III, for many costs: Deb and Jain, IEEE TEC 18(4), 2014."""

    name = "nsga3"

    def make_sampler(self, seed: int) -> BaseSampler:
        from optuna.samplers import NSGAIIISampler

        return NSGAIIISampler(dividing_parameter=3, **self._variation(seed))


class Gp(_Modelled):
    """Bayesian optimisation with a Gaussian process, by (constrained, hypervolume) log expected improvement.

    Fitting takes a time that grows with the cube of the trials: meant for a few hundred of them.
    """

    name = "gp"

    def make_sampler(self, seed: int) -> BaseSampler:
        from optuna.samplers import GPSampler

        return GPSampler(n_startup_trials=self.startup, deterministic_objective=True, seed=seed)


class CmaEs(OptunaSearch):
    """CMA-ES: Hansen, "The CMA Evolution Strategy: A Tutorial", 2016, as the package `cmaes` has it.

    It knows one objective and no constraints: what is violated is added to its loss.
    """

    name = "cmaes"

    @checks_types
    def __init__(
        self,
        evaluations: int = 100,
        seconds: float | None = None,
        start_from: str | None = None,
        *,
        population: int | None = None,
        **common: Any,
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.
            population: Individuals of a generation; None is `4 + 3 log(parameters)`.
            common: What every `OptunaSearch` takes.

        Raises:
            ConfigError: If a value is not allowed.
        """
        super().__init__(evaluations, seconds, start_from, **common)
        if self.costs:
            raise several_refused(self.name, self.costs)
        self.population = None if population is None else at_least(4, population, "population")

    def make_sampler(self, seed: int) -> BaseSampler:
        from optuna.samplers import CmaEsSampler

        return CmaEsSampler(
            sigma0=None,
            n_startup_trials=1,
            popsize=self.population,
            with_margin=False,
            warn_independent_sampling=False,  # of a single parameter, which needs no covariances
            seed=seed,
        )


class Qmc(OptunaSearch):
    """A scrambled low-discrepancy sequence: covers the space evenly and learns nothing."""

    name = "qmc"

    @checks_types
    def __init__(
        self,
        evaluations: int = 100,
        seconds: float | None = None,
        start_from: str | None = None,
        *,
        sequence: Literal["sobol", "halton"] = "sobol",
        **common: Any,
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.
            sequence: `sobol` or `halton`.
            common: What every `OptunaSearch` takes.

        Raises:
            ConfigError: If a value is not allowed.
        """
        super().__init__(evaluations, seconds, start_from, **common)
        if sequence not in ("sobol", "halton"):
            raise ConfigError(f"strategy.sequence={sequence} is unknown; allowed: sobol, halton")
        self.sequence = sequence

    def make_sampler(self, seed: int) -> BaseSampler:
        from optuna.samplers import QMCSampler

        return QMCSampler(qmc_type=self.sequence, scramble=True, seed=seed, warn_independent_sampling=False)


class AnySampler(OptunaSearch):
    """Any sampler of Optuna's, or of one's own: its class, which is called with the seed of the run.

    A sampler of a kind that reads constraints (TPE, NSGA-II and III, GP, and what inherits from them) is given the
    limits as such; to the loss of others what is violated is added.
    """

    name = "optuna"
    __slots__ = ("_factory",)  # not among vars(), which a run records

    @checks_types
    def __init__(
        self,
        evaluations: int = 100,
        seconds: float | None = None,
        start_from: str | None = None,
        *,
        sampler: Callable[..., BaseSampler],
        **common: Any,
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.
            sampler: Returns the sampler when called with `seed=`: a class, or a partial of it with other arguments.
            common: What every `OptunaSearch` takes.

        Raises:
            ConfigError: If the sampler takes no seed, or cannot be made, or a value is not allowed.
        """
        super().__init__(evaluations, seconds, start_from, **common)
        self._factory = sampler
        self.sampler = _described(sampler)
        _check_seedable(sampler, self.sampler)
        try:
            with experiments_allowed():
                made: Any = self.make_sampler(seed=0)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"strategy.sampler: {self.sampler} cannot be made: {error}") from error
        if not hasattr(made, "sample_independent"):
            kind = type(made).__name__
            raise ConfigError(
                f"strategy.sampler: {self.sampler} made a {kind}; it must be an optuna.samplers.BaseSampler"
            )
        if self.costs:
            check_several(made, self.costs, type(made).__name__)

    def make_sampler(self, seed: int) -> BaseSampler:
        return self._factory(seed=seed)


def at_least(least: int, value: int, key: str) -> int:
    """Returns a setting that is large enough.

    Raises:
        ConfigError: If it is not.
    """
    if value < least:
        raise ConfigError(f"strategy.{key}={value} must be at least {least}")
    return value


def _check_seedable(sampler: Any, described: str) -> None:
    """Refuses what could not be seeded: then one seed would not give one sequence of policies."""
    if not callable(sampler):
        raise ConfigError(
            f"strategy.sampler is {described}, made already and not with the run's seed; give its class "
            "(in configs: strategy.sampler._target_ with strategy.sampler._partial_=true)"
        )
    if isinstance(sampler, functools.partial) and "seed" in sampler.keywords:
        raise ConfigError("strategy.sampler.seed is the run's own; leave it out and set seed=N")
    taken = inspect.signature(_unwrapped(sampler)).parameters.values()
    if not any(item.name == "seed" or item.kind is item.VAR_KEYWORD for item in taken):
        raise ConfigError(
            f"strategy.sampler: {described} takes no seed, so that one seed would not give one sequence of policies; "
            "wrap it in a function of `seed`"
        )


def _unwrapped(sampler: Any) -> Any:
    return _unwrapped(sampler.func) if isinstance(sampler, functools.partial) else sampler


def _described(sampler: Any) -> str:
    """A sampler's class and arguments in words."""
    if isinstance(sampler, functools.partial):
        given = [*map(str, sampler.args), *(f"{key}={value}" for key, value in sampler.keywords.items())]
        return _described(sampler.func) + (f"({', '.join(given)})" if given else "")
    return getattr(sampler, "__qualname__", type(sampler).__qualname__)
