"""Strategies that draw policies from Optuna's samplers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from search.objective import Objective
from search.space import SearchSpace
from search.strategies.base import Strategy

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class Tpe(Strategy):
    """Optuna's tree-structured Parzen estimator over the ordered formats of every open decision, under constraints.

    Every decision is an integer, the index of its format from few bits to many, so that the sampler knows their order;
    the limits are constraints. Uniform policies are tried first.
    """

    name = "tpe"

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="minimize", sampler=self.sampler(int(rng.integers(2**31))))
        names = {index: f"{space.decisions[index].side} {space.decisions[index].name}" for index in space.free}
        deepest = max(len(decision.formats) for decision in space.decisions)
        for level in reversed(range(deepest)):
            study.enqueue_trial({n: min(level, len(space.decisions[i].formats) - 1) for i, n in names.items()})
        worst = 0.0
        while True:
            asked = study.ask()
            point = [0] * len(space.decisions)
            for index, name in names.items():
                point[index] = asked.suggest_int(name, 0, len(space.decisions[index].formats) - 1)
            trial = objective(space.decode(point))
            for name, excess in objective.violations(trial).items():
                asked.set_constraint(name, excess)
            loss = objective.loss(trial) if trial.is_measured else worst
            worst = max(worst, loss)
            study.tell(asked, loss)

    def sampler(self, seed: int) -> BaseSampler:
        """Returns the sampler; every default that differs between Optuna versions is spelt out."""
        from optuna.samplers import TPESampler

        return TPESampler(n_startup_trials=10, n_ei_candidates=24, multivariate=True, constant_liar=False, seed=seed)
