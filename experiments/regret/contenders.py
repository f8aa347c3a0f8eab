"""Strategies on equal terms: each through the real objective, with qualities from the table of all policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from goals import BITS, COST, DROPS, FRONT, Goal
from study import Study
from trajectories import Run

from search.config import build, compose, config_dir
from search.objective import Objective, SpentError
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
        make: Builds it.
        settings: What it was built with; results of other settings are not taken for its own.
        goals: What it is asked for.
        seeded: Whether seeds make a difference.
    """

    make: Callable[[], Strategy]
    settings: Sequence[str]
    goals: Sequence[Goal] = (*BITS, *DROPS)
    seeded: bool = True


def configured(
    name: str, evaluations: int, *settings: str, goals: Sequence[Goal] = (*BITS, *DROPS), seeded: bool = True
) -> Contender:
    """A strategy by its name in the configuration."""
    overrides = [f"strategy={name}", f"strategy.evaluations={evaluations}", *settings]
    return Contender(partial(_build, overrides), overrides, goals, seeded)


def _build(overrides: Sequence[str]) -> Strategy:
    strategy: Strategy = build(compose(overrides).strategy, Strategy, "strategy")
    return strategy


def ranked(predictor: str, evaluations: int = 40) -> Contender:
    """One predictor's solver: its optimum and its next-best solutions, where costs are limited."""
    make = partial(Ranked, predictor, evaluations)
    return Contender(make, [f"ranked={predictor}", f"evaluations={evaluations}"], BITS, seeded=False)


TO_FRONT = f"strategy.costs=[{COST}]"

CONTENDERS: Mapping[str, Contender] = {
    "auto (20)": configured("auto", 20),
    "auto (40)": configured("auto", 40),
    "auto (40), front": configured("auto", 40, "strategy.front=0.9", goals=[FRONT]),
    "auto (100), front": configured("auto", 100, "strategy.front=0.9", goals=[FRONT]),
    "rl (100)": configured("rl", 100),
    "rl (100), no demonstrations": configured("rl", 100, "strategy.demonstrations=false"),
    "haq (600)": configured("haq", 600),
    "tpe": configured("tpe", 300),
    "gp": configured("gp", 60),
    "cmaes": configured("cmaes", 300),
    "qmc": configured("qmc", 600),
    "nsga2": configured("nsga2", 300),
    "nsga3": configured("nsga3", 300),
    "nsga2, front": configured("nsga2", 300, TO_FRONT, goals=[FRONT]),
    "nsga3, front": configured("nsga3", 300, TO_FRONT, goals=[FRONT]),
    "evolution": configured("evolution", 600),
    "greedy": configured("greedy", 600, seeded=False),
    "uniform": configured("uniform", 600, seeded=False),
    "random": configured("random", 600, goals=[*BITS, *DROPS, FRONT]),
    "superposition": ranked("superposition"),
    "forward interactions": ranked("forward_scaled"),
    "backward interactions": ranked("backward_scaled"),
    "additive KL": ranked("kl"),
    "Fisher diagonal": ranked("fisher_diagonal"),
}
"""By name; in brackets the evaluations that a strategy lays its plans for, which changes what it does first."""

LEFT_OUT: Mapping[str, str] = {
    "solver": "what auto stands for",
    "exhaustive": "the table itself",
    "optuna": "any sampler; the named ones take part",
    "custom": "yours",
}
"""Strategies of the configuration that do not compete, and why."""


def strategies() -> list[str]:
    """All strategies of the configuration."""
    return sorted(path.stem for path in (config_dir() / "strategy").glob("*.yaml"))


def available() -> dict[str, Contender]:
    """The contenders whose strategies there are."""
    known = {f"strategy={name}" for name in strategies()}
    return {
        name: contender
        for name, contender in CONTENDERS.items()
        if contender.settings[0] in known or not contender.settings[0].startswith("strategy=")
    }


@dataclass
class MemoryLog:
    """Trials of a search that nobody resumes."""

    trials: list[Trial] = field(default_factory=list)

    def append(self, trial: Trial) -> None:
        self.trials.append(trial)


def compete(study: Study, strategy: Strategy, goal: Goal, seed: int) -> Run:
    """Runs a strategy to its end and returns all it measured, in order."""
    run = Run({"goal": goal.name, "seed": seed})

    def on_trial(trial: Trial, known: bool) -> None:
        if trial.is_measured:
            scoring_s = study.scoring_s if objective.is_scored else 0.0
            seconds = objective.spent_seconds + scoring_s
            run.add(study.code(trial.policy), trial.fidelity, objective.spent_evaluations, seconds)

    budget, pricing = goal.budget, study.pricing
    objective = Objective(
        study.evaluator,
        pricing,
        budget.limits(pricing.reference(budget.reference)),
        MemoryLog(),  # type: ignore[arg-type]
        strategy,
        lambda: study.scores,
        primary_cost=COST,
        quality_drop=budget.quality_drop,
        on_trial=on_trial,
    )
    with suppress(SpentError):
        strategy.search(study.bench.space, objective, np.random.default_rng(seed))
    return run
