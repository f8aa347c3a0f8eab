"""A search problem whose optimum is known: qualities by a formula, on the tiny network's space, in microseconds."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tiny import Bench, make_bench

from hwmodels import Precision
from search.objective import Objective, SpentError
from search.policy import Policy
from search.quality.evaluate import Evaluator, Quality
from search.shortlist import best_trial
from search.strategies.base import Strategy
from search.tasks.task import Split
from search.trials import Trial, TrialLog


class FormulaEvaluator(Evaluator):
    """Each decision loses quality by its weight times `4**-bits`-like steps, and neighbours lose more together."""

    def __init__(self, bench: Bench, seed: int) -> None:
        super().__init__(bench.task, bench.simulated)
        rng = np.random.default_rng(seed)
        self._space = bench.space
        count = len(bench.space.decisions)
        self._weights = rng.uniform(0.02, 0.2, count)
        self._pairs = np.triu(rng.uniform(-0.02, 0.05, (count, count)), 1)

    def measure(self, policy: Mapping[str, Precision], split: Split, fidelity: float = 1.0) -> Quality:
        levels = np.array(self._space.encode(policy))
        top = np.array([len(decision.formats) - 1 for decision in self._space.decisions])
        lost = np.where(top > 0, 4.0 ** -(levels.astype(float)) - 4.0 ** -(top.astype(float)), 0.0)
        drop = float(self._weights @ lost + lost @ self._pairs @ lost)
        return Quality(1.0 - drop, 100, drop, drop, drop)


@dataclass
class Synthetic:
    """The tiny network's space with qualities by a formula.

    Attributes:
        bench: Network, space and prices.
        limits: Limits on costs.
        quality_drop: The drop allowed, where that is what is limited.
    """

    bench: Bench
    limits: dict[str, float]
    quality_drop: float | None = None
    seed: int = 0

    @cached_property
    def evaluator(self) -> FormulaEvaluator:
        return FormulaEvaluator(self.bench, self.seed)

    def objective(self, log: Path, strategy: Strategy, **options) -> Objective:
        given = {"quality_drop": self.quality_drop, "primary_cost": next(iter(self.limits), "weight_bytes"), **options}
        return Objective(
            self.evaluator, self.bench.pricing, self.limits, TrialLog(log), strategy, self.bench.scores, **given
        )

    def search(self, strategy: Strategy, log: Path, seed: int = 0, **options) -> tuple[list[Trial], Objective]:
        """Runs a strategy to its end; returns its trials and the objective."""
        log.parent.mkdir(parents=True, exist_ok=True)
        objective = self.objective(log, strategy, **options)
        with suppress(SpentError):
            strategy.search(self.bench.space, objective, np.random.default_rng(seed))
        return TrialLog(log).trials, objective

    def search_optimum(self, strategy: Strategy, log: Path, seed: int = 0) -> tuple[list[Trial], Objective]:
        """Runs a strategy until it has found the optimum, which saves the rest, or to its end."""

        def stop_there(trial: Trial, known: bool) -> None:
            is_allowed = self.quality_drop is None or (trial.is_measured and trial.drop <= self.quality_drop)
            if trial.is_whole and is_allowed:
                loss = trial.drop if self.quality_drop is None else trial.cost[next(iter(self.limits), "weight_bytes")]
                if loss <= self.optimum * (1 + 1e-9):
                    raise SpentError

        return self.search(strategy, log, seed, on_trial=stop_there)

    @cached_property
    def optimum(self) -> float:
        """The least loss of the whole space: a drop, or a cost where the drop is limited."""
        losses = []
        for policy in self.bench.space:
            costs = self.bench.pricing.costs(policy)
            drop = self.evaluator.measure(policy, "selection").drop
            if all(costs[name] <= limit for name, limit in self.limits.items()) and drop <= (self.quality_drop or 9.0):
                losses.append(drop if self.quality_drop is None else costs[next(iter(self.limits), "weight_bytes")])
        return min(losses)

    def found(self, trials: list[Trial], objective: Objective) -> float:
        """The least loss that a search found."""
        best: Trial = best_trial(objective, trials)
        return objective.loss(best)

    def policies(self) -> list[Policy]:
        return list(self.bench.space)


def make_synthetic(seed: int = 0, share: float = 0.4, quality_drop: float | None = None) -> Synthetic:
    """Limits the bytes to that quantile of all policies', or the drop of quality."""
    bench = make_bench()
    limits = (
        {} if quality_drop is not None else {"weight_bytes": float(np.quantile(bench.costs("weight_bytes"), share))}
    )
    return Synthetic(bench, limits, quality_drop, seed)
