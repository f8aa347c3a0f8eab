"""Strategies on equal terms: each through the real objective, with qualities from the table of all policies."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from table import TableEvaluator
from units import Bench

from search.budget import Budget
from search.config import build, compose
from search.objective import Objective, SpentError
from search.policy import Policy
from search.run import best_trial
from search.sensitivity.table import SensitivityTable
from search.space import SearchSpace
from search.strategies.base import Strategy
from search.strategies.forecaster import Forecaster
from search.trials import Trial


class Ranked(Strategy):
    """Measures what one predictor holds for the best policies within the budget, best first, and learns nothing."""

    name = "ranked"

    def __init__(self, predictor: str, evaluations: int) -> None:
        super().__init__(evaluations)
        self.predictor = predictor

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        forecaster = Forecaster(self.predictor, objective.sensitivity, objective.pricing)
        for point in forecaster.best(objective.limits, self.evaluations):
            objective(space.decode(point.tolist()))


@dataclass(frozen=True)
class Contender:
    """A strategy under comparison.

    Attributes:
        make: Builds it for so many evaluations.
        seeded: Whether seeds make a difference.
    """

    make: Callable[[int], Strategy]
    seeded: bool = True


def configured(name: str) -> Contender:
    """A strategy by its name in the configuration."""

    def make(evaluations: int) -> Strategy:
        config = compose([f"strategy={name}", f"strategy.evaluations={evaluations}"])
        strategy: Strategy = build(config.strategy, Strategy, "strategy")
        return strategy

    return Contender(make)


def ranked(predictor: str) -> Contender:
    """One predictor's solver: its optimum and its next-best solutions."""
    return Contender(lambda evaluations: Ranked(predictor, evaluations), seeded=False)


CONTENDERS: dict[str, Contender] = {
    "auto": configured("auto"),
    "superposition": ranked("superposition"),
    "forward interactions, scaled": ranked("forward_scaled"),
    "backward interactions, scaled": ranked("backward_scaled"),
    "additive ILP (KL)": ranked("kl"),
    "Fisher diagonal": ranked("fisher_diagonal"),
    "TPE": configured("tpe"),
    "random": configured("random"),
}


@dataclass
class MemoryLog:
    """Trials of a search that nobody resumes."""

    trials: list[Trial] = field(default_factory=list)

    def append(self, trial: Trial) -> None:
        self.trials.append(trial)


def found(
    bench: Bench, evaluator: TableEvaluator, table: SensitivityTable, strategy: Strategy, bits: float, seed: int
) -> Policy:
    """The best policy that a strategy measures within a budget of average weight bits."""
    limits = Budget(average_weight_bits=bits).limits(bench.pricing.reference("float"))
    log = MemoryLog()
    objective = Objective(
        evaluator,
        bench.pricing,
        limits,
        log,  # type: ignore[arg-type]
        strategy,
        lambda: table,
        primary_cost="average_weight_bits",
    )
    with suppress(SpentError):
        strategy.search(bench.space, objective, np.random.default_rng(seed))
    return best_trial(objective, log.trials).policy
