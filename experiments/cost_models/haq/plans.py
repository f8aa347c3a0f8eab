"""What plans cost on HAQ's table that were found to be optimal by what a law makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.haq_mobilenetv2.formula import Formula
from experiments.haq_mobilenetv2.latency import BATCH
from hwmodels import Network, Precision, Workload
from hwmodels.haq_table import BitTable
from search.assignment import assignment_problem, solution_policy, variable_limits
from search.policy import Policy
from search.pricing import Pricing
from search.solve.linear import solve
from search.space import SearchSpace, build_space

RATIO = 0.6
BITS = range(2, 9)
PINS = {"first": "int8/uint8", "last": "int8/uint8"}
HALVINGS = 16
SLACK = 1e-9  # of sums that are compared


@dataclass(frozen=True)
class Planned:
    """The plan of least loss by the cycles a law predicts.

    Attributes:
        promised_ratio: Its share of the cycles of 8 bits throughout, by that law.
        true_ratio: The same by the table.
        loss: Its loss.
    """

    promised_ratio: float
    true_ratio: float
    loss: float


class Planner:
    """Solves HAQ's problem, 2 to 8 bits and the ends at 8, for scores of a formula that add up."""

    def __init__(self, network: Network, cycles: np.ndarray) -> None:
        """Takes the network and its true cycles, shape `(layers, weight bits, input bits)`."""
        self.network, self.cycles = network, cycles
        self.space: SearchSpace = build_space(
            network, [f"int{bits}" for bits in BITS], [f"uint{bits}" for bits in BITS], PINS
        )
        self.formula = Formula.draw(self.space)

    def plan(self, predicted: np.ndarray, ratio: float) -> Planned:
        """The plan of least loss within a share of the predicted cycles of 8 bits throughout."""
        pricing = Pricing(self.network, self.space, BitTable(predicted, BATCH, "predicted"), Workload(batch=BATCH))
        problem = assignment_problem(pricing, self.formula.scores)
        whole = predicted[:, 7, 7].sum() * BitTable(predicted, BATCH).unit_s
        limits = variable_limits(pricing, {"latency_s": ratio * whole})
        found = solve(problem, limits)
        if found is None:
            raise ValueError(f"no plan keeps {ratio} of the cycles")
        policy = solution_policy(self.space, found)
        return Planned(self.ratio(policy, predicted), self.ratio(policy, self.cycles), found.score)

    def plan_within(self, predicted: np.ndarray, ratio: float) -> Planned:
        """The plan a law leads to where its budget is moved until the true one is just kept."""
        low, high, best = 0.25, 1.0, None
        tried = ratio  # first, for a law that is right
        for _ in range(HALVINGS):
            planned = self.plan(predicted, tried)
            if planned.true_ratio <= ratio * (1 + SLACK):
                low = tried
                best = planned if best is None or planned.loss < best.loss else best
            else:
                high = tried
            tried = (low + high) / 2
        if best is None:
            raise ValueError(f"no budget of this law keeps {ratio} of the true cycles")
        return best

    def ratio(self, policy: Policy, cycles: np.ndarray) -> float:
        """A policy's share of the cycles of 8 bits throughout."""
        chosen = [_entry(row, policy[name]) for name, row in zip(self.network.names, cycles, strict=True)]
        return float(sum(chosen) / cycles[:, 7, 7].sum())


def _entry(row: np.ndarray, precision: Precision) -> float:
    return float(row[precision.weight.bits - 1, precision.input.bits - 1])
