"""The space, its prices and its scores as the arrays the solver works on, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from search.budget import Budget
from search.errors import InfeasibleError
from search.policy import Policy
from search.pricing import Pricing
from search.quality.sensitivity import SensitivityTable
from search.solve.linear import least, solve
from search.solve.problem import Link, Problem, Solution
from search.space import SearchSpace


def assignment_problem(pricing: Pricing, sensitivity: SensitivityTable | None = None) -> Problem:
    """Builds the multiple-choice problem: one variable per unit and precision.

    A choice's score is its weight score plus its input score; the input score of a tensor that several units read
    counts once, with the first of them. Units that share an input format are linked. Costs leave out `pricing.fixed`.

    Args:
        pricing: The space and its prices.
        sensitivity: The scores; None scores everything zero, for questions about cost alone.
    """
    space = pricing.space
    scores: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    readers: dict[int, list[int]] = {}
    for number, unit in enumerate(space.units):
        weight, input_ = space.decisions[unit.weight], space.decisions[unit.input]
        pairs = [(weight.formats.index(c.weight), input_.formats.index(c.input)) for c in unit.choices]
        readers.setdefault(unit.input, []).append(number)
        labels.append(np.array([chosen for _, chosen in pairs]))
        score = np.zeros(len(pairs))
        if sensitivity:
            score += [sensitivity.scores[unit.weight][chosen] for chosen, _ in pairs]
            if readers[unit.input] == [number]:
                score += [sensitivity.scores[unit.input][chosen] for _, chosen in pairs]
        scores.append(score)
    links = tuple(Link(tuple(units), tuple(labels[u] for u in units)) for units in readers.values() if len(units) > 1)
    known = {name: column for name, column in pricing.columns.items() if not np.isnan(np.concatenate(column)).any()}
    return Problem(tuple(scores), known, links)


def solution_policy(space: SearchSpace, solution: Solution) -> Policy:
    """Turns a solution into its policy."""
    chosen = [unit.choices[index] for unit, index in zip(space.units, solution.choices, strict=True)]
    return Policy(
        {
            layer: space.precision_of(layer, choice)
            for unit, choice in zip(space.units, chosen, strict=True)
            for layer in unit.layers
        }
    )


def variable_limits(pricing: Pricing, limits: Mapping[str, float]) -> dict[str, float]:
    """What limits leave for the choices, once what no choice changes is paid; costs that do not add up are left out."""
    return {name: limit - pricing.fixed[name] for name, limit in limits.items() if name in pricing.fixed}


def check_feasible(
    pricing: Pricing, limits: Mapping[str, float], unrestricted: SearchSpace, budget: Budget | None = None
) -> None:
    """Makes sure that some policy keeps every limit.

    Args:
        pricing: The space and its prices.
        limits: Absolute limits.
        unrestricted: The same space without pins and ties, to tell what they cost.
        budget: Where the limits come from, for the words of the message.

    Raises:
        InfeasibleError: If none does; the message names the least that can be reached and what stands in the way.
    """
    problem, free = assignment_problem(pricing), variable_limits(pricing, limits)
    reachable = {name: least(problem, name).costs[name] + pricing.fixed[name] for name in free}
    for name, lowest in reachable.items():
        if lowest > limits[name]:
            without = replace(pricing, space=unrestricted)
            freed = least(assignment_problem(without), name).costs[name] + without.fixed[name]
            limit, least_value = (budget or Budget()).wording(name, limits[name], lowest)
            raise InfeasibleError(
                f"{limit} cannot be met: the least this space can reach is {least_value} ({name} {lowest:.6g}); "
                f"{_advice(pricing.space, freed, lowest, limits[name])}"
            )
    if solve(problem, free) is None:
        reached = ", ".join(f"{name} {lowest:.6g} (limit {limits[name]:.6g})" for name, lowest in reachable.items())
        raise InfeasibleError(
            f"no policy of this space keeps all limits at once, though each alone can be; least reachable: {reached}. "
            "Relax one of them or add lower formats to space.weight and space.input"
        )


def _advice(space: SearchSpace, freed: float, lowest: float, limit: float) -> str:
    """Says whether pins and ties are in the way."""
    blocking = [d for d in space.decisions if not d.is_free] + [d for d in space.decisions if len(d.layers) > 1]
    if freed >= lowest or not blocking:
        return "relax the budget or add lower formats to space.weight and space.input"
    names = "; ".join(f"{d.side} of {', '.join(d.layers)} in {'/'.join(map(str, d.formats))}" for d in blocking[:6])
    enough = "which would do" if freed <= limit else "still too much"
    return f"without the pins and ties {freed:.6g} could be reached, {enough}. Pinned or tied: {names}"
