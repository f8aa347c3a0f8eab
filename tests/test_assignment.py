"""The solver's problem against enumeration of a small space."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import Decoder
from tiny import Bench, SlowToUnpack, make_bench
from torch import nn

from hwmodels import Roofline, StorageModel, Workload
from search.assignment import (
    assignment_problem,
    check_feasible,
    solution_policy,
    variable_limits,
)
from search.budget import Budget
from search.errors import InfeasibleError
from search.policy import Policy
from search.pricing import Pricing
from search.sensitivity.choices import positions
from search.solve.linear import least, solve
from search.space import SearchSpace, build_space
from search.tasks.networks import digits_net, resnet20
from search.trace import shared_parameters, trace


def random_scores(space: SearchSpace, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([np.sort(rng.random(len(decision.formats)))[::-1] for decision in space.decisions])


def loss(space: SearchSpace, scores: np.ndarray, policy: Policy) -> float:
    return float(scores[positions(space, space.encode(policy))].sum())


@pytest.fixture(scope="module")
def small() -> Bench:
    """128 policies with a cost model that knows time, so that several limits pull in different directions."""
    return make_bench(weight=("int2", "int8"), cost_model=Roofline("zen5"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "names",
    [("weight_bytes",), ("weight_bytes", "bit_ops"), ("effective_bits", "latency_s"), ("activation_bytes", "bit_ops")],
)
def test_optimum_is_the_one_enumeration_finds(small: Bench, seed: int, names: tuple[str, ...]) -> None:
    scores, space = random_scores(small.space, seed), small.space
    every = [(loss(space, scores, policy), small.pricing.costs(policy), policy) for policy in space]
    share = np.random.default_rng(seed).uniform(0.3, 0.8)
    limits = {name: float(np.quantile([costs[name] for _, costs, _ in every], share)) for name in names}
    allowed = [lost for lost, costs, _ in every if all(costs[n] <= limits[n] for n in names)]

    solution = solve(assignment_problem(small.pricing, scores), variable_limits(small.pricing, limits))
    assert solution is not None
    policy = solution_policy(space, solution)
    assert loss(space, scores, policy) == pytest.approx(min(allowed), rel=1e-9)
    assert solution.score == pytest.approx(min(allowed), rel=1e-9), "a shared input is counted once"
    costs = small.pricing.costs(policy)
    for name in names:
        assert solution.costs[name] + small.pricing.fixed.get(name, 0.0) == pytest.approx(costs[name], rel=1e-12)
        assert costs[name] <= limits[name]


def test_tied_weights_and_weight_only_layers() -> None:
    model = Decoder().eval()
    network = trace(model, torch.randint(20, (2, 8)))
    ties = list(map(list, shared_parameters(model, network)))
    space = build_space(network, ["int4", "int8"], ["uint8"], ties=ties)
    pricing = Pricing(network, space, StorageModel(), Workload())
    scores = random_scores(space, 0)
    limit = float(np.median([pricing.costs(policy)["weight_bytes"] for policy in space]))
    solution = solve(assignment_problem(pricing, scores), variable_limits(pricing, {"weight_bytes": limit}))
    best = min(loss(space, scores, policy) for policy in space if pricing.costs(policy)["weight_bytes"] <= limit)
    assert loss(space, scores, solution_policy(space, solution)) == pytest.approx(best)


def test_every_solution_is_a_policy_of_the_space(small: Bench) -> None:
    problem = assignment_problem(small.pricing)
    found = solution_policy(small.space, least(problem, "weight_bytes"))
    assert small.space.decode(small.space.encode(found)) == found
    assert {str(precision.weight) for precision in found.values()} == {"int2"}


def test_unknown_costs_are_left_out(bench: Bench) -> None:
    problem = assignment_problem(bench.pricing)
    assert set(problem.costs) == {"weight_bytes", "bit_ops", "average_weight_bits", "effective_bits"}
    assert set(problem.peaks) == {"activation_bytes"}
    limits = variable_limits(bench.pricing, {"weight_bytes": 1000.0, "activation_bytes": 10.0})
    assert limits == {"weight_bytes": 1000.0 - bench.pricing.fixed["weight_bytes"], "activation_bytes": 10.0}


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


def test_infeasible_budgets_are_all_named(bench: Bench) -> None:
    lowest = {name: min(bench.costs(name)) for name in ("weight_bytes", "activation_bytes", "bit_ops")}
    limits = {"weight_bytes": lowest["weight_bytes"] / 2, "activation_bytes": lowest["activation_bytes"] / 3}
    expected = (
        rf"budget\.weight_bytes=.*is {lowest['weight_bytes']:.4g} .*"
        rf"budget\.activation_bytes=.*\(activation_bytes {lowest['activation_bytes']:.6g}\).*"
        rf"of the others: bit_ops {lowest['bit_ops']:.6g}"
    )
    with pytest.raises(InfeasibleError, match=expected):
        check_feasible(bench.pricing, {**limits, "bit_ops": 1e12}, bench.space)


def test_a_peak_out_of_reach_names_pinned_inputs_only() -> None:
    layers = [nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4)]
    network = trace(nn.Sequential(*layers).eval(), torch.randn(2, 64))
    free = build_space(network, ["int4", "int8"], ["uint4", "uint8"])
    pinned = build_space(network, ["int4", "int8"], ["uint4", "uint8"], pins={"0": "int8", "2": "int8/uint8"})
    pricing = Pricing(network, pinned, StorageModel(), Workload())
    lowest = min(pricing.costs(policy)["activation_bytes"] for policy in pinned)
    freed = min(pricing.costs(policy)["activation_bytes"] for policy in free)
    check_feasible(pricing, {"activation_bytes": lowest}, free)
    with pytest.raises(
        InfeasibleError, match=rf"{freed:.6g} could be reached, which would do.*tied: input of 2 in uint8$"
    ):
        check_feasible(pricing, {"activation_bytes": (lowest + freed) / 2}, free)


def test_single_formats_are_no_pins() -> None:
    bench = make_bench(input=("uint8",))
    with pytest.raises(InfeasibleError, match="; relax the budget"):
        check_feasible(bench.pricing, {"bit_ops": 1.0}, bench.space)


def test_limits_that_exclude_each_other() -> None:
    bench = make_bench(cost_model=SlowToUnpack())
    limits = {"weight_bytes": min(bench.costs("weight_bytes")), "latency_s": min(bench.costs("latency_s"))}
    for name, limit in limits.items():
        check_feasible(bench.pricing, {name: limit}, bench.space)
    policies = [bench.pricing.costs(policy) for policy in bench.space]
    least = {
        name: min(costs[name] for costs in policies if all(costs[n] <= limits[n] for n in limits if n != name))
        for name in limits
    }
    expected = (
        "no policy of this space keeps all limits at once.*"
        rf"weight_bytes {least['weight_bytes']:.6g} .*latency_s {least['latency_s']:.6g} .*Relax one"
    )
    with pytest.raises(InfeasibleError, match=expected):
        check_feasible(bench.pricing, limits, bench.space)


def test_pins_that_make_limits_exclude_each_other() -> None:
    free, pinned = make_bench(cost_model=SlowToUnpack()), make_bench(cost_model=SlowToUnpack(), pins={"left": "int8"})
    costs, limits = [free.pricing.costs(policy) for policy in free.space], {}
    limits["weight_bytes"] = min(pinned.costs("weight_bytes"))
    limits["latency_s"] = min(each["latency_s"] for each in costs if each["weight_bytes"] <= limits["weight_bytes"])
    with pytest.raises(
        InfeasibleError, match=r"Without the pins and ties they could all be kept.*weight of left in int8"
    ):
        check_feasible(pinned.pricing, limits, free.space)


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
