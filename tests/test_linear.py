"""The exact solver against enumeration, dynamic programming and the plans published with HAWQ-V3."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.solve import highs
from search.solve.front import solve_front
from search.solve.linear import least, near, solve
from search.solve.problem import Link, Problem, Solution

REFERENCE = Path(os.environ.get("BITPLAN_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def enumerated(problem: Problem, limits: dict[str, float]) -> list[Solution]:
    """Every feasible selection, best first."""
    every = (problem.solution(choices, True) for choices in itertools.product(*map(range, problem.sizes)))
    within = (s for s in every if all(s.costs[name] <= most for name, most in limits.items()))
    return sorted((s for s in within if problem.agrees(s.choices)), key=lambda s: s.score)


def random_problem(seed: int, units: int = 5, orders: float = 12.0) -> tuple[Problem, dict[str, float]]:
    """Scores over `orders` of magnitude, costs over six, often a link; limits that some selection meets exactly."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, rng.integers(2, units + 1))
    scores = tuple(10 ** rng.uniform(-orders, 0, size) for size in sizes)
    costs = {
        "bytes": tuple(rng.integers(0, 9, size).astype(float) for size in sizes),
        "seconds": tuple(10 ** rng.uniform(-6, 0, size) for size in sizes),
    }
    links = []
    if rng.random() < 0.6:
        pair = [int(unit) for unit in rng.choice(len(sizes), 2, replace=False)]
        labels = [np.concatenate([[0], rng.integers(0, 3, sizes[unit] - 1)]) for unit in pair]
        links.append(Link(tuple(pair), tuple(labels)))
    problem = Problem(scores, costs, tuple(links))
    met = problem.solution([rng.integers(size) for size in sizes], True).costs
    return problem, {"bytes": met["bytes"], "seconds": met["seconds"] * rng.choice([1.0, 1.3])}


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6))
def test_optimum_is_the_one_enumeration_finds(seed: int) -> None:
    problem, limits = random_problem(seed)
    expected = enumerated(problem, limits)
    found = solve(problem, limits)
    if not expected:
        assert found is None
        return
    assert found is not None
    assert found == problem.solution(found.choices, True, found.score), "totals are exact, and optimality is proved"
    assert found.score == pytest.approx(expected[0].score, rel=1e-15, abs=0)
    assert problem.agrees(found.choices)
    assert all(found.costs[name] <= most for name, most in limits.items())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_next_best_are_the_ones_enumeration_finds(seed: int) -> None:
    problem, limits = random_problem(seed, orders=3)
    expected = enumerated(problem, limits)[1:4]
    best = solve(problem, limits)
    if best is None:
        return
    found = near(problem, best, limits, 3)
    assert [s.score for s in found] == pytest.approx([s.score for s in expected], rel=1e-12)
    assert len({best.choices, *(s.choices for s in found)}) == 1 + len(expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["bytes", "seconds"]))
def test_least_and_cheapest_within_a_score(seed: int, cost: str) -> None:
    problem, limits = random_problem(seed, orders=3)
    lowest = min(enumerated(problem, {}), key=lambda s: (s.costs[cost], s.score))
    assert least(problem, cost).costs[cost] == lowest.costs[cost]
    if cost == "bytes":  # among equally many bytes the score decides
        assert least(problem, cost).score == pytest.approx(lowest.score, rel=1e-12)
    within = enumerated(problem, limits)
    if within:
        most = within[len(within) // 2].score
        found = solve(problem, limits, minimise=cost, max_score=most)
        assert found is not None
        assert found.score <= most
        assert found.costs[cost] == min(s.costs[cost] for s in within if s.score <= most)


@pytest.mark.parametrize("seed", range(5))
def test_optimum_is_the_one_dynamic_programming_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units, budget = 40, 900
    scores = tuple(np.sort(10 ** rng.uniform(-9, 0, 6))[::-1] for _ in range(units))
    costs = tuple(np.sort(rng.integers(1, 60, 6)) for _ in range(units))
    best = np.full(budget + 1, np.inf)  # least score at each total cost so far
    best[0] = 0.0
    for unit_scores, unit_costs in zip(scores, costs, strict=True):
        following = np.full_like(best, np.inf)
        for score, cost in zip(unit_scores, unit_costs, strict=True):
            following[cost:] = np.minimum(following[cost:], best[: budget + 1 - cost] + score)
        best = following
    found = solve(Problem(scores, {"cost": costs}), {"cost": budget})
    assert found is not None
    assert found.optimal
    assert found.score == pytest.approx(best.min(), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e12])
def test_units_of_scores_and_costs_do_not_matter(scale: float) -> None:
    problem, limits = random_problem(3)
    expected = solve(problem, limits)
    scaled = Problem(
        tuple(scores * scale for scores in problem.scores),
        {name: tuple(numbers / scale for numbers in column) for name, column in problem.costs.items()},
        problem.links,
    )
    found = solve(scaled, {name: most / scale * (1 + 1e-12) for name, most in limits.items()})
    assert expected is not None
    assert found is not None
    assert found.choices == expected.choices


def test_an_overshoot_below_the_solvers_tolerance_is_refused() -> None:
    tempting = 1.0 + 1e-12  # HiGHS would take it
    problem = Problem((np.array([5.0, 0.0, 3.0]),), {"cost": (np.array([0.0, tempting, 0.5]),)})
    found = solve(problem, {"cost": 1.0})
    assert found is not None
    assert found.choices == (2,)
    met = solve(problem, {"cost": tempting})
    assert met is not None
    assert met.choices == (1,)


def test_many_overshoots_end_in_tighter_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(highs, "MAX_OVERSHOOTS", 3)
    units = 12
    costs = tuple(np.array([0.0, 1.0 + 1e-9]) for _ in range(units))  # any six overshoot six by a hair
    problem = Problem(tuple(np.array([1.0, 0.0]) for _ in range(units)), {"cost": costs})
    found = solve(problem, {"cost": 6.0})
    assert found is not None
    assert found.costs["cost"] <= 6.0
    assert found.score == 7.0
    assert not found.optimal, "the tightened limit might have cut off a better one"


def test_scores_twelve_orders_apart_are_all_weighed() -> None:
    scores = (np.array([1.0, 0.0]), np.array([2e-12, 1e-12, 0.0]), np.array([3e-6, 0.0]))
    costs = (np.array([0.0, 1.0]), np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0]))
    found = solve(Problem(scores, {"cost": costs}), {"cost": 3.0})
    assert found is not None
    assert found.choices == (1, 1, 1)


def test_zero_budgets_and_zero_costs() -> None:
    scores = (np.array([2.0, 1.0, 0.0]), np.array([1.0, 0.0]))
    problem = Problem(
        scores, {"cost": (np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0])), "free": (np.zeros(3), np.zeros(2))}
    )
    found = solve(problem, {"cost": 0.0, "free": 0.0})
    assert found is not None
    assert found.choices == (1, 0)
    assert solve(problem, {"cost": -1e-9}) is None
    unlimited = solve(problem, {"cost": math.inf})
    assert unlimited is not None
    assert unlimited.choices == (2, 1)
    assert [solve(problem, {"cost": most}) is None for most in (0.0, -1.0)] == [False, True]


def test_a_link_makes_units_agree_on_labels_only() -> None:
    labels = np.array([0, 1, 0, 1])  # weights (a, a, b, b) with inputs (0, 1, 0, 1)
    scores = (np.array([4.0, 3.0, 2.0, 0.0]), np.array([1.0, 9.0, 0.0, 9.0]))
    linked = Problem(scores, {}, (Link((0, 1), (labels, labels)),))
    assert solve(Problem(scores), {}).choices == (3, 2)  # type: ignore[union-attr]
    assert solve(linked, {}).choices == (2, 2)  # type: ignore[union-attr]


def test_contradicting_links_are_infeasible() -> None:
    both = (np.array([0, 1]), np.array([0, 1]))
    crossed = (np.array([0, 1]), np.array([1, 0]))
    problem = Problem(
        (np.zeros(2), np.zeros(2)), {"c": (np.ones(2), np.ones(2))}, (Link((0, 1), both), Link((0, 1), crossed))
    )
    assert solve(problem, {}) is None
    with pytest.raises(ValueError, match="contradict"):
        least(problem, "c")


def test_near_ends_where_there_is_nothing_more() -> None:
    problem = Problem((np.array([0.0, 1.0]), np.array([0.0, 3.0])))
    best = solve(problem, {})
    assert best is not None
    assert [s.score for s in near(problem, best, {}, 10)] == [1.0, 3.0, 4.0]


def test_a_front_runs_from_the_least_cost_to_the_best_score() -> None:
    problem, _ = random_problem(8, orders=3)
    found = solve_front(problem, "seconds", 9)
    best = enumerated(problem, {})[0]
    assert found[0].costs["seconds"] == least(problem, "seconds").costs["seconds"]
    assert found[-1].score == best.score
    assert len({s.choices for s in found}) == len(found) > 2
    scores = [s.score for s in found]
    assert scores == sorted(scores, reverse=True)
    upper = found[0].costs["seconds"] * 1.5
    assert all(s.costs["seconds"] <= upper for s in solve_front(problem, "seconds", 4, {"seconds": upper}))


def layers_problem(seed: int) -> Problem:
    """Twenty layers with six weight formats and three input formats each, neighbours sharing an input."""
    rng = np.random.default_rng(seed)
    bits, inputs = np.array([2, 3, 4, 5, 6, 8]), np.array([4, 6, 8])
    scale = 10 ** rng.uniform(-4, 0, (2, 20, 1, 1))
    scores = tuple((a * 4.0 ** -bits[:, None] + b * 4.0**-inputs).ravel() for a, b in zip(*scale, strict=True))
    costs = tuple(np.repeat(size * bits, 3) for size in 10 ** rng.uniform(2, 6, 20))
    labels = np.tile(np.arange(3), 6)
    links = tuple(Link((unit, unit + 1), (labels, labels)) for unit in range(0, 19, 3))
    return Problem(scores, {"cost": costs}, links)


def test_same_problem_same_solution() -> None:
    problem = layers_problem(0)
    limits = {"cost": 2 * least(problem, "cost").costs["cost"]}
    first = solve(problem, limits)
    assert first is not None
    assert solve(problem, limits) == first
    following = near(problem, first, limits, 4)
    assert [s.optimal for s in following] == [True] * 4
    assert near(problem, first, limits, 4) == following


def test_nothing_is_printed() -> None:
    """HiGHS prints about repaired solutions, to the C standard output, while solving this problem."""
    code = "from test_linear import *; solve_front(layers_problem(1), 'cost', 8); print('done')"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("done\n", 0), run.stderr


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Problem(()), "at least one choice"),
        (lambda: Problem((np.zeros((2, 2)),)), r"scores of unit 0 must be 1-D, got shape \(2, 2\)"),
        (lambda: Problem((np.array([0.0, np.nan]),)), "scores of unit 0 is not finite"),
        (lambda: Problem((np.zeros(2),), {"c": (np.zeros(3),)}), r"cost c has \(3,\) numbers per unit"),
        (lambda: Problem((np.zeros(2),), {"c": (np.array([1, np.inf]),)}), "cost c of unit 0 is not finite"),
        (lambda: Link((0,), (np.array([0]),)), "at least two different units"),
        (lambda: Link((0, 1), (np.array([0]),)), "needs labels for each"),
        (lambda: Link((0, 1), (np.array([0.5]), np.array([0]))), "integer arrays"),
        (lambda: Link((0, 1), (np.array([0]), np.array([1]))), "no label is open to all"),
        (lambda: Problem((np.zeros(1),), {}, (Link((0, 1), (np.array([0]),) * 2),)), "names unit 1, but there are 1"),
        (lambda: Problem((np.zeros(2),) * 2, {}, (Link((0, 1), (np.array([0]),) * 2),)), "1 labels for unit 0"),
        (lambda: solve(Problem((np.zeros(1),)), {"bytes": 1.0}), "no cost 'bytes'; the problem has none"),
        (lambda: solve(Problem((np.zeros(1),), {"c": (np.zeros(1),)}), {"c": np.nan}), "limit is NaN"),
        (lambda: solve_front(Problem((np.zeros(1),), {"c": (np.zeros(1),)}), "c", 1), "at least two budgets"),
    ],
)
def test_wrong_problems_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


@pytest.mark.skipif(not (REFERENCE / "hawq_ilp.json").exists(), reason="BITPLAN_REFERENCE_DATA has no hawq_ilp.json")
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_published_hawq_plans(name: str) -> None:
    network = json.loads((REFERENCE / "hawq_ilp.json").read_text())["networks"][name]

    def column(four: list[float], eight: list[float]) -> tuple[np.ndarray, ...]:
        return tuple(map(np.array, zip(four, eight, strict=True)))

    costs = {cost: column(network["cost_4bit"][cost], network["cost_8bit"][cost]) for cost in network["cost_4bit"]}
    links = tuple(Link(tuple(tie), (np.arange(2),) * len(tie)) for tie in network["ties"])
    problem = Problem(column(network["sensitivity_4bit"], network["sensitivity_8bit"]), costs, links)
    assert len(network["published"]) == 9
    for budget, published in network["published"].items():
        limits = {budget.split("@")[0]: published["limit"]}
        found = solve(problem, limits)
        theirs = problem.solution([0 if bits == 4 else 1 for bits in published["published_bits"]], False)
        assert found is not None
        assert found.optimal
        if published["matches_exact_optimum"]:
            assert found.choices == theirs.choices
        else:
            assert found.score < theirs.score
