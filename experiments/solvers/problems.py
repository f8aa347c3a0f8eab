"""Random problems that look like networks: sensitivities and sizes over orders of magnitude, errors partly alike."""

from __future__ import annotations

import numpy as np

from search.solve.problem import Problem

BITS = np.array([2, 3, 4, 5, 6, 7, 8, 16])


def additive_problem(seed: int, units: int, costs: int) -> Problem:
    """Scores that add up, and several costs that grow with bits and with sizes of their own."""
    rng = np.random.default_rng(seed)
    sensitivity = rng.lognormal(0, 1.5, units)[:, np.newaxis]
    scores = sensitivity * 4.0**-BITS * rng.lognormal(0, 0.3, (units, len(BITS)))
    columns = {}
    for number in range(costs):
        size = np.round(rng.lognormal(10, 1.2, (units, 1)))
        columns[f"cost{number}"] = tuple(size * BITS ** rng.uniform(0.7, 1.0))
    return Problem(tuple(scores), columns)


def interacting_problem(seed: int, units: int, alike: float, rank: int = 2048) -> Problem:
    """Scores that are a Gram matrix of errors in the outputs.

    Args:
        seed: Of the numbers.
        units: Layers.
        alike: Share of the squared error that all layers have in the same direction.
        rank: Dimensions of the outputs, samples times width.
    """
    rng = np.random.default_rng(seed)
    count = len(BITS)
    sensitivity, size = rng.lognormal(0, 1.5, units), np.round(rng.lognormal(10, 1.2, units))
    common = rng.standard_normal(rank)
    rows = []
    for unit in range(units):
        own, each = rng.standard_normal(rank), rng.standard_normal((count, rank))
        sign = rng.choice([-1, 1], p=[0.3, 0.7])
        error = np.sqrt(alike) * sign * common + np.sqrt(0.3) * own + np.sqrt(0.7 - alike) * each
        squared = sensitivity[unit] * 4.0**-BITS * rng.lognormal(0, 0.3, count)
        rows.append(error * np.sqrt(squared / rank)[:, np.newaxis])
    stacked = np.concatenate(rows)
    gram = 2 * stacked @ stacked.T
    bytes_ = tuple(each * BITS / 8 for each in size)
    return Problem(tuple(np.zeros(count) for _ in range(units)), {"bytes": bytes_}, (), (gram + gram.T) / 2)


def budget(problem: Problem, cost: str, share: float) -> float:
    """A budget between the least cost, at share 0, and the most."""
    least = sum(float(column.min()) for column in problem.costs[cost])
    most = sum(float(column.max()) for column in problem.costs[cost])
    return least + share * (most - least)
