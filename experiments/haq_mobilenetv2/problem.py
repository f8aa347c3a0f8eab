"""The search problem: MobileNetV2 on HAQ's table at 0.6 of its latency in 8 bits, and what is proved of its optimum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from formula import Formula, FormulaEvaluator
from latency import BATCH, cost_model
from mobilenetv2 import mobilenetv2

from hwmodels import Network, Workload
from search.assignment import assignment_problem, solution_policy, variable_limits
from search.budget import Budget
from search.errors import InfeasibleError
from search.policy import Policy
from search.pricing import Pricing
from search.solve.bound import ROUNDS
from search.solve.problem import Solution
from search.solve.quadratic import solve_quadratic
from search.space import SearchSpace, build_space

RATIO = 0.6
BITS = range(2, 9)  # HAQ's min_bit and max_bit
PINS = {"first": "int8/uint8", "last": "int8/uint8"}

ADDITIVE = "exact optimum of what adds up"
WHOLE = "optimum of the whole formula"


@dataclass(frozen=True)
class Bench:
    """The parts of a search.

    Attributes:
        network: MobileNetV2.
        space: 2 to 8 bits for weights and inputs, the first and last layer pinned to 8.
        pricing: What policies cost on the table.
        formula: What they lose.
        ratio: What they may cost, as a share of 8 bits throughout.
    """

    network: Network
    space: SearchSpace
    pricing: Pricing
    formula: Formula
    ratio: float = RATIO

    @cached_property
    def evaluator(self) -> FormulaEvaluator:
        """Measures policies by the formula."""
        return FormulaEvaluator(self.formula)

    @cached_property
    def limits(self) -> dict[str, float]:
        """The budget in absolute terms."""
        return Budget(latency_ratio=self.ratio, reference="int8").limits(self._reference)

    @cached_property
    def _reference(self) -> dict[str, float]:
        return self.pricing.reference("int8")

    def latency_ratio(self, policy: Policy) -> float:
        """Latency of a policy as a share of 8 bits throughout."""
        return self.pricing.costs(policy)["latency_s"] / self._reference["latency_s"]


def make_bench(cycles: np.ndarray) -> Bench:
    """Puts the problem together."""
    network = mobilenetv2()
    space = build_space(network, [f"int{bits}" for bits in BITS], [f"uint{bits}" for bits in BITS], PINS)
    pricing = Pricing(network, space, cost_model(cycles), Workload(batch=BATCH))
    return Bench(network, space, pricing, Formula.draw(space))


@dataclass(frozen=True)
class Reference:
    """A policy that a solver finds when it is told the truth.

    Attributes:
        name: What it is the optimum of.
        policy: The policy.
        gap: By which share of its loss it may be above the optimum.
    """

    name: str
    policy: Policy
    gap: float


def references(bench: Bench, rounds: int = ROUNDS) -> tuple[Reference, ...]:
    """The exact optimum of what adds up, and that of the whole formula as far as it is proved.

    Args:
        bench: The problem.
        rounds: How often the bound on the whole formula is raised; 0 for no bound, hence an infinite gap.
    """
    nothing = np.zeros(len(bench.formula.errors))
    additive = _solved(bench, bench.formula.scores, None, rounds)
    whole = _solved(bench, nothing, bench.formula.form, rounds)
    named = {ADDITIVE: additive, WHOLE: whole}
    return tuple(
        Reference(name, solution_policy(bench.space, found), 0.0 if found.optimal else 1 - found.bound / found.score)
        for name, found in named.items()
    )


def _solved(bench: Bench, scores: np.ndarray, interactions: np.ndarray | None, rounds: int) -> Solution:
    problem = assignment_problem(bench.pricing, scores, interactions)
    found = solve_quadratic(problem, variable_limits(bench.pricing, bench.limits), rounds=rounds)
    if found is None:
        raise InfeasibleError(f"no policy of the space keeps {bench.ratio} of the latency")
    return found
