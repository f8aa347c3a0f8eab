"""The solver's problem against enumeration of a small space."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import Decoder
from tiny import Bench, SlowToUnpack, make_bench

from hwmodels import Roofline, StorageModel, Workload
from search.assignment import assignment_problem, check_feasible, solution_policy, variable_limits
from search.budget import Budget
from search.errors import InfeasibleError
from search.pricing import Pricing
from search.quality.sensitivity import SensitivityTable
from search.solve.linear import least, solve
from search.space import SearchSpace, build_space
from search.tasks.networks import digits_net, resnet20
from search.trace import shared_parameters, trace


def random_scores(space: SearchSpace, seed: int) -> SensitivityTable:
    rng = np.random.default_rng(seed)
    return SensitivityTable(tuple(np.sort(rng.random(len(d.formats)))[::-1].copy() for d in space.decisions))


@pytest.fixture(scope="module")
def small() -> Bench:
    """128 policies with a cost model that knows time, so that several limits pull in different directions."""
    return make_bench(weight=("int2", "int8"), cost_model=Roofline("zen5"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("names", [("weight_bytes",), ("weight_bytes", "bit_ops"), ("effective_bits", "latency_s")])
def test_optimum_is_the_one_enumeration_finds(small: Bench, seed: int, names: tuple[str, ...]) -> None:
    table, space = random_scores(small.space, seed), small.space
    every = [(table.predict(space.encode(policy)), small.pricing.costs(policy), policy) for policy in space]
    share = np.random.default_rng(seed).uniform(0.3, 0.8)
    limits = {name: float(np.quantile([costs[name] for _, costs, _ in every], share)) for name in names}
    allowed = [(loss, policy) for loss, costs, policy in every if all(costs[n] <= limits[n] for n in names)]

    solution = solve(assignment_problem(small.pricing, table), variable_limits(small.pricing, limits))
    assert solution is not None
    policy = solution_policy(space, solution)
    loss = min(loss for loss, _ in allowed)
    assert table.predict(space.encode(policy)) == pytest.approx(loss, rel=1e-9)
    assert solution.score == pytest.approx(loss, rel=1e-9), "a shared input is counted once"
    costs = small.pricing.costs(policy)
    for name in names:
        assert solution.costs[name] + small.pricing.fixed[name] == pytest.approx(costs[name], rel=1e-12)
        assert costs[name] <= limits[name]


def test_tied_weights_and_weight_only_layers() -> None:
    model = Decoder().eval()
    network = trace(model, torch.randint(20, (2, 8)))
    ties = list(map(list, shared_parameters(model, network)))
    space = build_space(network, ["int4", "int8"], ["uint8"], ties=ties)
    pricing = Pricing(network, space, StorageModel(), Workload())
    table = random_scores(space, 0)
    limit = float(np.median([pricing.costs(policy)["weight_bytes"] for policy in space]))
    solution = solve(assignment_problem(pricing, table), variable_limits(pricing, {"weight_bytes": limit}))
    best = min(
        table.predict(space.encode(policy)) for policy in space if pricing.costs(policy)["weight_bytes"] <= limit
    )
    assert table.predict(space.encode(solution_policy(space, solution))) == pytest.approx(best)


def test_every_solution_is_a_policy_of_the_space(small: Bench) -> None:
    problem = assignment_problem(small.pricing)
    found = solution_policy(small.space, least(problem, "weight_bytes"))
    assert small.space.decode(small.space.encode(found)) == found
    assert {str(precision.weight) for precision in found.values()} == {"int2"}


def test_unknown_costs_are_left_out(bench: Bench) -> None:
    assert set(assignment_problem(bench.pricing).costs) == {
        "weight_bytes",
        "bit_ops",
        "average_weight_bits",
        "effective_bits",
    }
    limits = variable_limits(bench.pricing, {"weight_bytes": 1000.0, "activation_bytes": 10.0})
    assert limits == {"weight_bytes": 1000.0 - bench.pricing.fixed["weight_bytes"]}


def test_infeasible_budgets_name_the_least(bench: Bench) -> None:
    lowest = min(bench.costs("weight_bytes"))
    check_feasible(bench.pricing, {"weight_bytes": lowest}, bench.space)
    with pytest.raises(
        InfeasibleError, match=rf"budget\.weight_bytes={lowest - 1:g} .*\(weight_bytes {lowest:.6g}\); relax"
    ):
        check_feasible(bench.pricing, {"weight_bytes": lowest - 1}, bench.space)


def test_infeasible_ratios_are_named_as_the_user_gave_them(bench: Bench) -> None:
    reference, lowest = bench.pricing.reference("float")["weight_bytes"], min(bench.costs("weight_bytes"))
    budget = Budget(size_ratio=0.5 * lowest / reference)
    with pytest.raises(InfeasibleError, match=rf"budget\.size_ratio=.* can reach is {lowest / reference:.4g} "):
        check_feasible(bench.pricing, budget.limits({"weight_bytes": reference}), bench.space, budget)


def test_infeasible_budgets_name_pins_and_ties() -> None:
    bench = make_bench(pins={"left": "int8"}, ties=[["stem", "head"]])
    unrestricted = make_bench().space
    lowest, freed = min(bench.costs("weight_bytes")), min(make_bench().costs("weight_bytes"))
    with pytest.raises(InfeasibleError, match=rf"{freed:.6g} could be reached, which would do.*weight of left in int8"):
        check_feasible(bench.pricing, {"weight_bytes": (lowest + freed) / 2}, unrestricted)
    with pytest.raises(InfeasibleError, match=rf"{freed:.6g} could be reached, still too much.*stem, head"):
        check_feasible(bench.pricing, {"weight_bytes": freed / 2}, unrestricted)


def test_limits_that_exclude_each_other() -> None:
    bench = make_bench(cost_model=SlowToUnpack())
    limits = {"weight_bytes": min(bench.costs("weight_bytes")), "latency_s": min(bench.costs("latency_s"))}
    for name, limit in limits.items():
        check_feasible(bench.pricing, {name: limit}, bench.space)
    with pytest.raises(InfeasibleError, match=r"no policy of this space keeps all limits at once.*weight_bytes \d+"):
        check_feasible(bench.pricing, limits, bench.space)


NETWORKS = {"digits": (digits_net, 8), "resnet20": (resnet20, 28)}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("weight", [("int8",), ("int4", "int8")])
def test_budgets_of_exactly_what_a_policy_costs_can_be_met(name: str, weight: tuple[str, ...]) -> None:
    """As when int8's own latency is asked for: sums in another order must not turn the budget away."""
    make, size = NETWORKS[name]
    network = trace(make().eval(), torch.randn(2, 1, size, size))
    space = build_space(network, weight, ["uint8"])
    pricing = Pricing(network, space, Roofline("zen5"), Workload())
    for limit in ("latency_ratio", "energy_ratio", "size_ratio", "bit_ops_ratio", "average_weight_bits"):
        budget = Budget(**{limit: 8 if limit == "average_weight_bits" else 1}, reference="int8")
        limits = budget.limits(pricing.reference("int8"))
        check_feasible(pricing, limits, space)
        solution = solve(assignment_problem(pricing), variable_limits(pricing, limits))
        costs = pricing.costs(solution_policy(space, solution))
        for cost, most in limits.items():
            assert costs[cost] <= most == pytest.approx(pricing.reference("int8")[cost], rel=1e-11)


@pytest.mark.parametrize("cost", ["latency_s", "energy_j", "effective_bits"])
def test_budgets_of_exactly_the_least_can_be_met(small: Bench, cost: str) -> None:
    limits = Budget(**{cost: min(small.costs(cost))}).limits(small.pricing.reference("float"))
    check_feasible(small.pricing, limits, small.space)
