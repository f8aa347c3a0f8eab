"""The space, its prices and its scores as the arrays the solver works on, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import sparse

from hwmodels.cost import ADDITIVE_COSTS, BoundaryCost
from hwmodels.memory import input_readers, liveness_cuts
from hwmodels.precision import FLOAT_BITS
from search.budget import Budget
from search.errors import InfeasibleError
from search.policy import Policy
from search.pricing import Pricing
from search.solve.linear import least, solve
from search.solve.problem import Boundary, Column, Link, Problem, Solution
from search.space import Decision, SearchSpace

WEIGHT_COSTS = ("weight_bytes", "average_weight_bits", "effective_bits")
PRECISE = 1e-6
"""Relative accuracy of what error messages name."""


def unit_choice_matrix(space: SearchSpace) -> sparse.csr_array:
    """Says which choices of decisions each choice of a unit makes, shape `(choices of all units, choices)`.

    A unit's choice is a precision: a weight format and an input format. The input format of a tensor that several
    units read counts with the first of them. With this matrix F, scores s of all choices of all decisions become
    `F @ s`, and interactions G become `F @ G @ F.T`.
    """
    starts = np.cumsum([0, *(len(decision.formats) for decision in space.decisions)])
    rows, columns = [], []
    seen: set[int] = set()
    row = 0
    for unit, (weights, inputs) in zip(space.units, _format_indices(space), strict=True):
        at = np.arange(row, row + len(unit.choices))
        row += len(unit.choices)
        rows.append(at)
        columns.append(starts[unit.weight] + weights)
        if unit.input not in seen:
            seen.add(unit.input)
            rows.append(at)
            columns.append(starts[unit.input] + inputs)
    where = np.concatenate(rows), np.concatenate(columns)
    return sparse.csr_array((np.ones(len(where[0])), where), shape=(row, starts[-1]))


def assignment_problem(
    pricing: Pricing, scores: np.ndarray | None = None, interactions: np.ndarray | None = None
) -> Problem:
    """Builds the multiple-choice problem: one variable per unit and precision.

    Units that share an input format are linked. Costs leave out `pricing.fixed`, but for the peak `activation_bytes`,
    which is complete. Costs that the cost model does not know are left out.

    Args:
        pricing: The space and its prices.
        scores: A score for every choice of every decision, in their order, shape `(choices,)`; None scores everything
            zero, for questions about cost alone.
        interactions: What every pair of them adds, shape `(choices, choices)`.

    Raises:
        ValueError: If the scores or interactions do not fit the space.
    """
    space = pricing.space
    made = unit_choice_matrix(space)
    rows, choices = made.shape
    for name, array, shape in (("scores", scores, (choices,)), ("interactions", interactions, (choices, choices))):
        if array is not None and np.shape(array) != shape:
            raise ValueError(
                f"{name} have shape {np.shape(array)}, but the space has {choices} choices: expected {shape}"
            )
    edges = np.cumsum([len(unit.choices) for unit in space.units])[:-1]
    unit_scores = np.zeros(rows) if scores is None else made @ np.asarray(scores, dtype=np.float64)
    between = None
    if interactions is not None:
        between = (made @ (made @ np.asarray(interactions, dtype=np.float64)).T).T
    costs, boundaries = _costs(pricing)
    return Problem(
        tuple(np.split(unit_scores, edges)),
        costs,
        _links(space),
        between,
        boundaries,
        {"activation_bytes": _activation_cuts(pricing)},
    )


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


def selection_points(space: SearchSpace, solutions: Sequence[Solution]) -> np.ndarray:
    """Turns solutions into points of the space, shape `(solutions, decisions)`."""
    points = np.empty((len(solutions), len(space.decisions)), dtype=np.int64)
    chosen = np.array([solution.choices for solution in solutions], dtype=np.int64).reshape(-1, len(space.units))
    for number, (unit, (weights, inputs)) in enumerate(zip(space.units, _format_indices(space), strict=True)):
        points[:, unit.weight] = weights[chosen[:, number]]
        points[:, unit.input] = inputs[chosen[:, number]]
    return points


def variable_limits(pricing: Pricing, limits: Mapping[str, float]) -> dict[str, float]:
    """What limits leave for the choices, once what no choice changes is paid; of a peak nothing is paid beforehand."""
    return {name: limit - pricing.fixed.get(name, 0.0) for name, limit in limits.items()}


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
    problem, within = assignment_problem(pricing), variable_limits(pricing, limits)
    if solve(problem, within) is not None:
        return
    budget = budget or Budget()
    freed = replace(pricing, space=unrestricted)
    lowest = {name: _least(pricing, problem, name) for name in limits}
    beyond = [name for name in limits if lowest[name] > limits[name]]
    if not beyond:
        raise InfeasibleError(_excluding(pricing, freed, problem, limits, budget))
    sentences = []
    for name in beyond:
        limit, reached = budget.wording(name, limits[name], lowest[name])
        advice = _advice(pricing.space, freed, name, lowest[name], limits[name])
        sentences.append(
            f"{limit} cannot be met: the least this space can reach is {reached} ({name} {lowest[name]:.6g}); {advice}"
        )
    others = ", ".join(f"{name} {lowest[name]:.6g}" for name in limits if name not in beyond)
    raise InfeasibleError(". ".join(sentences) + (f". Least reachable of the others: {others}" if others else ""))


def _format_indices(space: SearchSpace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For every unit, the indices of its choices' formats in its weight decision and in its input decision."""
    for unit in space.units:
        weight, input_ = space.decisions[unit.weight], space.decisions[unit.input]
        pairs = [(weight.formats.index(c.weight), input_.formats.index(c.input)) for c in unit.choices]
        weights, inputs = np.array(pairs).T
        yield weights, inputs


def _links(space: SearchSpace) -> tuple[Link, ...]:
    """Links units that read one tensor, by the index of its format."""
    readers: dict[int, list[tuple[int, np.ndarray]]] = {}
    for number, (unit, (_, inputs)) in enumerate(zip(space.units, _format_indices(space), strict=True)):
        readers.setdefault(unit.input, []).append((number, inputs))
    shared = [zip(*members, strict=True) for members in readers.values() if len(members) > 1]
    return tuple(Link(tuple(units), tuple(labels)) for units, labels in shared)


def _costs(pricing: Pricing) -> tuple[dict[str, Column], tuple[Boundary, ...]]:
    """The known costs that add up, and those of boundaries between two units."""
    unit_of = {layer: number for number, unit in enumerate(pricing.space.units) for layer in unit.layers}
    columns = {name: [numbers.copy() for numbers in column] for name, column in pricing.columns.items()}
    met: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for boundary in pricing.table.boundaries:
        first, second = unit_of[boundary.producer], unit_of[boundary.consumer]
        for name, matrix in _boundary_matrices(pricing.space, boundary, first, second).items():
            if first == second:  # within a tie both sides make the same choice
                columns[name][first] += np.diagonal(matrix)
                continue
            between = met.setdefault((min(first, second), max(first, second)), {})
            between[name] = between.get(name, 0.0) + (matrix if first < second else matrix.T)

    unknown = {name for name, column in columns.items() if np.isnan(np.concatenate(column)).any()}
    unknown |= {name for between in met.values() for name, matrix in between.items() if np.isnan(matrix).any()}
    costs = {name: tuple(column) for name, column in columns.items() if name not in unknown}
    known = {
        units: {name: matrix for name, matrix in between.items() if name in costs and matrix.any()}
        for units, between in met.items()
    }
    return costs, tuple(_boundary(units, matrices) for units, matrices in known.items() if matrices)


def _boundary_matrices(space: SearchSpace, boundary: BoundaryCost, first: int, second: int) -> dict[str, np.ndarray]:
    """Cost name to what every pair of choices of producer's and consumer's unit costs, shape `(choices, choices)`."""
    produced = [space.precision_of(boundary.producer, choice) for choice in space.units[first].choices]
    read = [space.precision_of(boundary.consumer, choice) for choice in space.units[second].choices]
    pairs = [[boundary.cost(left, right) for right in read] for left in produced]
    return {name: np.array([[getattr(cost, name) for cost in row] for row in pairs]) for name in ADDITIVE_COSTS}


def _boundary(units: tuple[int, int], matrices: Mapping[str, np.ndarray]) -> Boundary:
    """A boundary whose labels tell apart only the choices that cost something else."""
    costs = np.stack(list(matrices.values()))
    _, firsts, first = np.unique(np.concatenate(costs, axis=1), axis=0, return_index=True, return_inverse=True)
    _, seconds, second = np.unique(np.concatenate(costs).T, axis=0, return_index=True, return_inverse=True)
    labels = first.reshape(-1), second.reshape(-1)
    return Boundary(units, labels, {name: matrix[np.ix_(firsts, seconds)] for name, matrix in matrices.items()})


def _activation_cuts(pricing: Pricing) -> tuple[Column, ...]:
    """The bytes alive at once, as one column per liveness cut that can be the peak.

    A tensor's bytes belong to the first unit that reads it; those of tensors that stay in float to the first unit of
    all, whatever it chooses.
    """
    network, space = pricing.network, pricing.space
    unit_of = {layer: number for number, unit in enumerate(space.units) for layer in unit.layers}
    bits = [np.array([choice.input.bits for choice in unit.choices]) for unit in space.units]
    cuts = []
    for cut in liveness_cuts(network) or ((),):
        column = [np.zeros(len(unit.choices)) for unit in space.units]
        for tensor in map(network.tensors.__getitem__, cut):
            readers = input_readers(network, tensor)
            unit = min((unit_of[layer] for layer in readers), default=0)
            column[unit] += tensor.values * pricing.workload.batch / 8 * (bits[unit] if readers else FLOAT_BITS)
        cuts.append(tuple(column))
    least = [sum(float(numbers.min()) for numbers in cut) for cut in cuts]
    largest = [sum(float(numbers.max()) for numbers in cut) for cut in cuts]
    highest = int(np.argmax(least))
    return tuple(cut for number, cut in enumerate(cuts) if number == highest or largest[number] > least[highest])


def _least(pricing: Pricing, problem: Problem, name: str) -> float:
    """The least that a cost can be."""
    return least(problem, name).costs[name] + pricing.fixed.get(name, 0.0)


def _excluding(pricing: Pricing, freed: Pricing, problem: Problem, limits: Mapping[str, float], budget: Budget) -> str:
    """Says how far limits that can be met one by one exclude each other."""
    within = variable_limits(pricing, limits)
    reached = []
    for name in limits:
        others = {other: most for other, most in within.items() if other != name}
        found = solve(problem, others, minimise=name, gap=PRECISE)
        if found is None:
            reached.append(f"{name} cannot be the cause, since the others exclude each other")
        else:
            limit, value = budget.wording(name, limits[name], found.costs[name] + pricing.fixed.get(name, 0.0))
            reached.append(f"{name} {found.costs[name] + pricing.fixed.get(name, 0.0):.6g} ({limit} needs {value})")
    blocking = _restricted(pricing.space, freed.space)
    advice = "Relax one of them or add lower formats to space.weight and space.input"
    if blocking and solve(assignment_problem(freed), variable_limits(freed, limits)) is not None:
        advice = f"Without the pins and ties they could all be kept. Pinned or tied: {_names(blocking)}"
    return (
        "no policy of this space keeps all limits at once, though each alone can be; "
        f"the least of each while the others hold: {', '.join(reached)}. {advice}"
    )


def _advice(space: SearchSpace, freed: Pricing, name: str, lowest: float, limit: float) -> str:
    """Says whether pins and ties are in the way."""
    blocking = _restricted(space, freed.space)
    if name in WEIGHT_COSTS:
        blocking = [decision for decision in blocking if decision.side == "weight"]
    elif name == "activation_bytes":
        blocking = [decision for decision in blocking if decision.side == "input"]
    reachable = _least(freed, assignment_problem(freed), name) if blocking else lowest
    if reachable >= lowest:
        return "relax the budget or add lower formats to space.weight and space.input"
    enough = "which would do" if reachable <= limit else "still too much"
    return f"without the pins and ties {reachable:.6g} could be reached, {enough}. Pinned or tied: {_names(blocking)}"


def _restricted(space: SearchSpace, unrestricted: SearchSpace) -> list[Decision]:
    """The decisions that pins and ties have changed."""
    free = {(d.side, d.layers, d.formats) for d in unrestricted.decisions}
    return [d for d in space.decisions if (d.side, d.layers, d.formats) not in free]


def _names(decisions: list[Decision]) -> str:
    shown = [f"{d.side} of {', '.join(d.layers)} in {'/'.join(map(str, d.formats))}" for d in decisions[:6]]
    return "; ".join(shown) + (f"; and {len(decisions) - 6} more" if len(decisions) > 6 else "")
