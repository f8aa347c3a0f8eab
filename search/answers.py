"""Another budget, or another device, from a finished run: answered from its files, without the model.

What the run measured stays measured, its prices are computed anew, and its sensitivities are solved again. Drops of
policies that it did not measure are forecasts by what all of its measurements taught (`search.strategies.surrogate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels import CostModel, Workload
from search.assignment import check_feasible, variable_limits
from search.budget import Budget
from search.errors import ConfigError, DataError
from search.files import write_json
from search.legal import in_words, runnable, without
from search.policy import Policy
from search.pricing import Pricing, placed
from search.rundir import RunDirectory
from search.sensitivity.scoring import TABLE
from search.sensitivity.table import SensitivityTable
from search.space import build_space
from search.strategies.forecaster import Forecaster, forecasters
from search.strategies.neighbourhood import stacked
from search.strategies.solver import COARSE, RUNNERS_UP
from search.strategies.surrogate import Surrogate

MEASURED = 3
FORECASTS = 5
"""Answers that are shown of each kind."""


@dataclass(frozen=True)
class Answer:
    """One policy that keeps the budget.

    Attributes:
        policy: The policy.
        drop: Its drop on the selection split: measured, or forecast from the run's measurements.
        is_measured: Which of the two.
        deviation: Standard deviation of a forecast; 0 where it was measured.
        costs: What it costs now.
    """

    policy: Policy
    drop: float
    is_measured: bool
    deviation: float
    costs: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        known = {name: value for name, value in self.costs.items() if value == value}
        return {**asdict(self), "digest": self.policy.digest, "policy": self.policy.to_dict(), "costs": known}


@dataclass(frozen=True)
class Resolved:
    """What a run answers to a new question.

    Attributes:
        run: The run that was asked.
        hardware: The device.
        budget: The budget.
        limits: Its limits on costs, absolute.
        primary_cost: The cost that the budget is about.
        answers: Policies that keep it, best first.
    """

    run: Path
    hardware: str
    budget: Budget
    limits: Mapping[str, float]
    primary_cost: str
    answers: tuple[Answer, ...]

    @property
    def open(self) -> list[Policy]:
        """The policies that were not measured, best forecast first."""
        return [answer.policy for answer in self.answers if not answer.is_measured]

    def save(self, folder: Path) -> Path:
        """Writes `resolved.json` to a folder."""
        record = {
            "run": str(self.run),
            "hardware": self.hardware,
            "budget": self.budget.given(),
            "limits": dict(self.limits),
            "answers": [answer.to_dict() for answer in self.answers],
        }
        return write_json(folder / "resolved.json", record)


def resolve(
    run: RunDirectory, budget: Budget, cost_model: CostModel, workload: Workload, forecasts: int = FORECASTS
) -> Resolved:
    """Answers a budget from a run's files.

    Args:
        run: A run that scored sensitivities.
        budget: What the plan may cost.
        cost_model: The device.
        workload: Batch and threads.
        forecasts: At most so many answers that were not measured, beside the best ones that were.

    Raises:
        DataError: If the run scored none, or measured nothing to forecast drops from.
        InfeasibleError: If no policy of the run's space keeps the budget.
    """
    pricing = pricing_of(run, cost_model, workload)
    space = pricing.space
    limits = budget.limits(pricing.reference(budget.reference))
    free_space, _ = runnable(build_space(pricing.network, *_formats(run)), pricing.network, cost_model)
    check_feasible(pricing, limits, free_space, budget)
    if not run.file(TABLE).is_file():
        raise DataError(
            f"{run.path} has no {TABLE}: its strategy scored no sensitivities, or it did not get that far; "
            "run strategy=auto to be able to ask again"
        )
    table = SensitivityTable.load(run.file(TABLE))
    measured = [trial for trial in run.trials() if trial.is_whole]
    if not measured:
        raise DataError(f"{run.path} has measured no policy yet, so that forecasts cannot be told in drops")
    primary = next(iter(limits), "weight_bytes")
    sources = forecasters(table, pricing)
    seen = np.array([space.encode(trial.policy) for trial in measured])
    drops = np.array([trial.drop if budget.quality_drop is None else trial.certain_drop for trial in measured])
    surrogate = Surrogate.fit(seen, _forecasts(sources, seen), drops)
    free = variable_limits(pricing, limits)
    if budget.quality_drop is None:
        proposed = [source.best(free, RUNNERS_UP) for source in sources]
    else:
        proposed = [source.front(primary, COARSE, free) for source in sources]
    candidates = stacked([seen, *proposed, _by_agent(run, budget, pricing, limits)], len(space.decisions))
    mean, deviation = surrogate.posterior(candidates, _forecasts(sources, candidates))
    seen_drops = {trial.digest: drop for trial, drop in zip(measured, drops, strict=True)}
    answers = []
    for point, forecast, spread in zip(candidates.tolist(), mean, deviation, strict=True):
        policy = space.decode(point)
        costs = pricing.costs(policy)
        is_measured = policy.digest in seen_drops
        drop = seen_drops.get(policy.digest, float(forecast))
        if all(costs[name] <= limit for name, limit in limits.items()):
            answers.append(Answer(policy, drop, is_measured, 0.0 if is_measured else float(spread), costs))
    wanted = budget.quality_drop

    def rank(answer: Answer) -> tuple[float, ...]:
        if wanted is None:
            return (answer.drop, answer.costs[primary])
        return (max(answer.drop - wanted, 0.0), answer.costs[primary], answer.drop)

    ranked = sorted(answers, key=rank)
    open_ = [answer for answer in ranked if not answer.is_measured][:forecasts]
    known = [answer for answer in ranked if answer.is_measured][:MEASURED]
    return Resolved(run.path, cost_model.name, budget, limits, primary, tuple(sorted([*open_, *known], key=rank)))


def _by_agent(run: RunDirectory, budget: Budget, pricing: Pricing, limits: Mapping[str, float]) -> np.ndarray:
    """What the agent that the run trained proposes, where it knows such limits, shape `(plans, decisions)`."""
    policies: Sequence[Policy] = []
    if run.file("agent").is_dir():
        from search.strategies.rl.agent import Agent

        agent, primary = Agent.load(run.path), next(iter(limits), "weight_bytes")
        asked = limits if budget.quality_drop is None else {primary: math.inf, **limits}
        if agent.refusal(pricing, asked) is None:
            is_limited = budget.quality_drop is None
            policies = [agent.propose(pricing, limits)] if is_limited else agent.along(pricing, limits, primary, COARSE)
    points = [pricing.space.encode(policy) for policy in policies]
    return np.array(points, dtype=np.int64).reshape(len(points), len(pricing.space.decisions))


def pricing_of(run: RunDirectory, cost_model: CostModel, workload: Workload) -> Pricing:
    """The run's space, priced on a device.

    Raises:
        ConfigError: If the device cannot run all of it.
    """
    network, info = run.network(), run.info()
    held = info["config"]["space"]
    cost_model = placed(cost_model, info["config"]["quantizer"]["placement"])
    space = build_space(network, *_formats(run), held["pins"], info["ties"])
    space = without(space, info.get("dropped", ()))
    if refused := in_words(runnable(space, network, cost_model)[1]):
        raise ConfigError(
            f"{cost_model.name} cannot run all of the space that {run.path} searched ({'; '.join(refused)}): "
            f"start a search with hardware={cost_model.name}"
        )
    return Pricing.of(network, space, cost_model, workload)


def _formats(run: RunDirectory) -> tuple[list[str], list[str]]:
    held = run.info()["config"]["space"]
    return held["weight"], held["input"]


def _forecasts(sources: Sequence[Forecaster], points: np.ndarray) -> np.ndarray:
    return np.stack([source.losses(points) for source in sources], axis=1)
