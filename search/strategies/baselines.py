"""Baselines: what any search must beat."""

from __future__ import annotations

import numpy as np

from search.objective import Objective
from search.policy import Policy
from search.space import SearchSpace
from search.strategies.base import Strategy


class RandomSearch(Strategy):
    """Draws policies uniformly and brings those over budget within it, one random step down at a time."""

    name = "random"

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        objective.map(objective.starts)
        while True:
            objective(lower_until_feasible(space, objective, space.sample(rng), rng))


def lower_until_feasible(space: SearchSpace, objective: Objective, policy: Policy, rng: np.random.Generator) -> Policy:
    """Lowers random decisions of `policy` by one format until it keeps the budget or nothing is left to lower."""
    point = np.array(space.encode(policy))
    while not objective.is_feasible(policy) and point.any():
        point[rng.choice(np.flatnonzero(point))] -= 1
        policy = space.decode(point.tolist())
    return policy
