"""Every cost and score of the solver's problem equals that of the policy, on networks of every kind."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import Attention, Decoder, Recurrent, Tagger
from tiny import TinyTask, make_bench

from hwmodels import Cost, CostModel, CostTable, Network, Roofline, StorageModel, Workload
from hwmodels.base import Choices
from hwmodels.cost import BoundaryCost
from search.assignment import assignment_problem, selection_points, solution_policy, unit_choice_matrix, variable_limits
from search.pricing import Pricing
from search.sensitivity.choices import choices_of, positions
from search.solve.linear import solve
from search.space import SearchSpace, build_space
from search.tasks.networks import resnet20
from search.trace import shared_parameters, trace


class Conversions(Roofline):
    """Reading a tensor in another format than its producer computes in takes time and energy, also within a tie."""

    def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
        table, names = super().cost_table(network, choices, workload), network.names
        hands = [(first, second) for first, second in itertools.pairwise(names) if {first, second} <= set(choices)]
        boundaries = tuple(
            BoundaryCost(
                f"{producer}.out",
                producer,
                consumer,
                {left: str(left) for left in choices[producer]},
                {right: str(right) for right in choices[consumer]},
                {
                    (str(left), str(right)): Cost(latency_s=1e-6 * (left.weight.bits + right.input.bits), energy_j=2e-7)
                    for left in choices[producer]
                    for right in choices[consumer]
                    if left.input.bits != right.input.bits
                },
            )
            for producer, consumer in [*hands, (names[0], names[-1]), (names[-1], names[0])]
        )
        return replace(table, boundaries=boundaries)


TRACED = {
    "attention": (lambda: Attention(), torch.randn(2, 8, 16)),
    "decoder": (lambda: Decoder(), torch.randint(20, (2, 8))),
    "tagger": (lambda: Tagger(), torch.randint(10, (2, 7))),
    "recurrent": (lambda: Recurrent(), torch.randn(2, 4)),
    "resnet20": (lambda: resnet20(), torch.randn(2, 1, 28, 28)),
    "tiny": (lambda: TinyTask().model, torch.randn(2, 1, 6, 6)),
}


def space_of(name: str, tied: bool) -> tuple[Network, SearchSpace]:
    make, example = TRACED[name]
    model = make().eval()
    network = trace(model, example)
    names, ties = network.names, [*map(list, shared_parameters(model, network))]
    ties += [[names[0], names[len(names) // 2], names[-1]]] if tied else []
    return network, build_space(network, ["int2", "int4", "int8"], ["uint4", "uint8", "float"], ties=ties)


def selection(space: SearchSpace, point: Sequence[int]) -> list[int]:
    """What every unit chooses at a point: its choices run over the input formats first."""
    return [point[unit.weight] * len(space.decisions[unit.input].formats) + point[unit.input] for unit in space.units]


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("cost_model", [Conversions("zen5"), StorageModel()], ids=["zen5", "storage"])
@pytest.mark.parametrize("tied", [False, True])
def test_costs_are_those_of_the_policy(name: str, cost_model: CostModel, tied: bool) -> None:
    network, space = space_of(name, tied)
    pricing = Pricing(network, space, cost_model, Workload(batch=3))
    problem = assignment_problem(pricing)
    assert bool(problem.boundaries) == (isinstance(cost_model, Conversions) and len(space.units) > 1)
    rng = np.random.default_rng(0)
    for _ in range(12):
        policy = space.sample(rng)
        solution = problem.solution(selection(space, space.encode(policy)), False)
        assert problem.agrees(solution.choices)
        assert solution_policy(space, solution) == policy
        assert tuple(selection_points(space, [solution])[0]) == space.encode(policy)
        costs = pricing.costs(policy)
        assert set(solution.costs) == {cost for cost, value in costs.items() if value == value}
        for cost, value in solution.costs.items():
            assert value + pricing.fixed.get(cost, 0.0) == pytest.approx(costs[cost], rel=1e-12), cost


@pytest.mark.parametrize("name", TRACED)
def test_scores_are_those_of_the_flat_choices(name: str) -> None:
    network, space = space_of(name, tied=True)
    rng, count = np.random.default_rng(0), len(choices_of(space))
    scores, factor = rng.normal(size=count), rng.normal(size=(count, 4))
    interactions = factor @ factor.T
    problem = assignment_problem(Pricing(network, space, StorageModel(), Workload()), scores, interactions)
    made = unit_choice_matrix(space)
    assert made.shape == (sum(problem.sizes), count)
    for _ in range(10):
        point = space.encode(space.sample(rng))
        at, choices = positions(space, point), selection(space, point)
        expected = scores[at].sum() + interactions[np.ix_(at, at)].sum() / 2
        assert problem.score(choices) == pytest.approx(expected)
        taken = made[problem.positions(choices)].sum(axis=0)
        assert np.array_equal(np.flatnonzero(taken), np.sort(at)), "every decision is counted once"


def test_arrays_must_fit_the_space() -> None:
    pricing = make_bench().pricing
    with pytest.raises(ValueError, match=r"scores have shape \(3,\), but the space has \d+ choices"):
        assignment_problem(pricing, np.zeros(3))
    with pytest.raises(ValueError, match="interactions have shape"):
        assignment_problem(pricing, None, np.zeros((3, 3)))
    assert selection_points(pricing.space, []).shape == (0, len(pricing.space.decisions))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("names", [("latency_s",), ("latency_s", "activation_bytes", "weight_bytes")])
def test_optimum_with_boundaries_is_the_one_enumeration_finds(seed: int, names: tuple[str, ...]) -> None:
    bench = make_bench(weight=("int2", "int8"), cost_model=Conversions("zen5"))
    space, rng = bench.space, np.random.default_rng(seed)
    scores = rng.random(len(choices_of(space)))
    every = [(bench.pricing.costs(p), float(scores[positions(space, space.encode(p))].sum())) for p in space]
    limits = {name: float(np.quantile([costs[name] for costs, _ in every], 0.3)) * (1 + 1e-12) for name in names}
    solution = solve(assignment_problem(bench.pricing, scores), variable_limits(bench.pricing, limits))
    allowed = [score for costs, score in every if all(costs[name] <= limits[name] for name in names)]
    if not allowed:
        assert solution is None
        return
    assert solution is not None
    assert solution.optimal
    assert solution.score == pytest.approx(min(allowed))
    costs = bench.pricing.costs(solution_policy(space, solution))
    assert all(costs[name] <= limits[name] * (1 + 1e-12) for name in names)


def test_latencies_that_are_not_known_leave_the_cost_out() -> None:
    class Unknown(Conversions):
        def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
            table = super().cost_table(network, choices, workload)
            pairs = {pair: Cost(latency_s=float("nan")) for pair in table.boundaries[0].costs}
            return replace(table, boundaries=(replace(table.boundaries[0], costs=pairs),) if table.boundaries else ())

    bench = make_bench(cost_model=Unknown("zen5"))
    problem = assignment_problem(bench.pricing)
    assert "latency_s" not in problem.costs
    assert "energy_j" in problem.costs


def test_boundaries_are_paid_on_top_of_the_layers() -> None:
    bench = make_bench(cost_model=Roofline("zen5"))
    stem, left, right, head = bench.network.names
    assert [stem, left, right, head] == ["stem", "left", "right", "head"]
    policy = next(p for p in bench.space if [p[n].input.bits for n in (stem, left, right, head)] == [4, 8, 8, 8])
    plain = bench.pricing.report(policy)
    paid = replace(bench.pricing, cost_model=Conversions("zen5")).report(policy)
    bits = policy[stem].weight.bits + 8 + policy[stem].weight.bits + 8 + policy[head].weight.bits + 4
    assert paid.total.latency_s - plain.total.latency_s == pytest.approx(1e-6 * bits), "to left, to head, and back"
    assert paid.total.energy_j - plain.total.energy_j == pytest.approx(6e-7)
    assert paid.layers == plain.layers
