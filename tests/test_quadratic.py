"""Solving with interactions, against enumeration of every selection."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.solve.bound import relax
from search.solve.exact import branch
from search.solve.forms import cost_forms, layout_of, linearised, score_form
from search.solve.linear import solve
from search.solve.problem import Boundary, Link, Problem, Solution
from search.solve.quadratic import near_quadratic, search, solve_quadratic
from search.solve.swaps import Swaps

BITS = np.array([2.0, 3.0, 4.0, 6.0, 8.0])


def random_problem(
    seed: int, units: int = 8, choices: int = 5, scale: float = 1.0, parts: bool = False
) -> tuple[Problem, dict[str, float]]:
    """Layers whose errors are vectors, some alike; a budget between the least and the most; often with every part."""
    rng = np.random.default_rng(seed)
    bits = BITS[:choices]
    rank = int(rng.integers(4, 60))
    alike = rng.uniform(0, 0.5)
    common = rng.standard_normal(rank)
    errors = [
        (alike * rng.choice([-1, 1]) * common + rng.standard_normal((choices, rank)))
        * np.sqrt(rng.lognormal(0, 1.5) * 4.0**-bits / rank)[:, np.newaxis]
        for _ in range(units)
    ]
    stacked = np.concatenate(errors)
    sizes = rng.lognormal(4, 1, units) * scale
    costs = {"bytes": tuple(size * bits for size in sizes)}
    gram = 2 * stacked @ stacked.T
    scores = tuple(rng.normal(0, 0.01, choices) * (rng.random() < 0.3) for _ in range(units))
    links: tuple[Link, ...] = ()
    boundaries: tuple[Boundary, ...] = ()
    peaks = {}
    share = rng.uniform(0.25, 0.75)
    limits = {"bytes": float(sizes.sum() * (bits[0] + share * (bits[-1] - bits[0]) / 2))}
    if parts:
        labels = np.arange(choices) % 2
        links = (Link((0, 2, 3), (labels, labels, labels)),)
        meeting = rng.uniform(0, 1, (choices, choices)) * sizes.mean() * (1 - np.eye(choices))
        boundaries = tuple(
            Boundary((u, u + 1), (np.arange(choices),) * 2, {"bytes": meeting}) for u in range(units - 1)
        )
        cuts = [[size * bits * (u in (first, first + 1)) for u, size in enumerate(sizes)] for first in range(units - 1)]
        peaks = {"peak": tuple(map(tuple, cuts))}
        limits["peak"] = float(max(sizes[:-1] + sizes[1:]) * np.median(bits))
    return Problem(scores, costs, links, (gram + gram.T) / 2, boundaries, peaks), limits


def tables(problem: Problem, limits: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of every selection, shape `sizes`, and which keep limits and links, but for rounding at the limits."""
    sizes = problem.sizes
    layout = layout_of(problem)

    def spread(numbers: np.ndarray, *units: int) -> np.ndarray:
        return numbers.reshape([size if unit in units else 1 for unit, size in enumerate(sizes)])

    def filled(form_linear: np.ndarray, pairs: np.ndarray | None) -> np.ndarray:
        table = np.zeros(sizes)
        blocks = np.split(np.arange(len(form_linear)), layout.starts[1:])
        for unit, block in enumerate(blocks):
            table = table + spread(form_linear[block], unit)
        if pairs is not None:
            for one, two in combinations(range(len(sizes)), 2):
                table += spread(pairs[np.ix_(blocks[one], blocks[two])], one, two)
        return table

    score = score_form(problem)
    allowed = np.ones(sizes, dtype=bool)
    for name, most in limits.items():
        for form in cost_forms(problem, name):
            allowed &= filled(form.linear, form.pairs) <= most
    for link in problem.links:
        for one, two in combinations(range(len(link.units)), 2):
            same = np.equal.outer(link.labels[one], link.labels[two])
            order = same if link.units[one] < link.units[two] else same.T
            allowed &= spread(order, link.units[one], link.units[two])
    return filled(score.linear, score.pairs), allowed


def optimum(problem: Problem, limits: dict[str, float]) -> float:
    """The least score of all selections within limits; infinite where there are none."""
    scores, allowed = tables(problem, limits)
    return float(scores[allowed].min(initial=math.inf))


def keeps(problem: Problem, solution: Solution, limits: dict[str, float]) -> bool:
    """Whether a solution's numbers are its own, and within limits and links."""
    again = problem.solution(solution.choices, solution.optimal, solution.bound)
    return (
        again == solution
        and problem.agrees(solution.choices)
        and all(solution.costs[name] <= most for name, most in limits.items())
    )


def test_forms_agree_with_the_problem() -> None:
    problem, _ = random_problem(0, parts=True)
    rng = np.random.default_rng(0)
    scores, _ = tables(problem, {})
    for _ in range(20):
        choices = tuple(int(rng.integers(size)) for size in problem.sizes)
        at = problem.positions(choices)
        assert score_form(problem).value(at) == pytest.approx(problem.score(choices), rel=1e-12)
        assert scores[choices] == pytest.approx(problem.score(choices), rel=1e-12)
        for name in problem.cost_names:
            values = [form.value(at) for form in cost_forms(problem, name)]
            assert max(values) == pytest.approx(problem.cost(name, choices), rel=1e-12)


def test_swap_search_is_within_a_hundredth_of_the_optimum() -> None:
    """8 units x 5 choices, without the bound, hence without branch and bound: 95 of 100 are asked for."""
    near = 0
    for seed in range(100):
        problem, limits = random_problem(seed)
        best = optimum(problem, limits)
        found = solve_quadratic(problem, limits, rounds=0)
        assert found is not None
        assert keeps(problem, found, limits)
        assert found.score >= best - 1e-12 * abs(best)
        near += found.score <= best + 0.01 * abs(best)
    assert near >= 95


@pytest.mark.parametrize("seed", range(200, 205))
def test_small_problems_are_solved_exactly(seed: int) -> None:
    problem, limits = random_problem(seed)
    found = solve_quadratic(problem, limits, restarts=2)
    assert found is not None
    assert found.optimal
    assert found.bound == found.score
    assert found.score == pytest.approx(optimum(problem, limits), rel=1e-11)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("seed", range(4))
def test_links_boundaries_and_peaks(seed: int, scale: float) -> None:
    problem, limits = random_problem(seed, units=5, choices=4, scale=scale, parts=True)
    best = optimum(problem, limits)
    found = solve_quadratic(problem, limits, restarts=3)
    assert (found is None) == math.isinf(best)
    if found is not None:
        assert keeps(problem, found, limits)
        assert found.optimal
        assert found.score == pytest.approx(best, rel=1e-11)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_never_worse_than_the_optimum_of_additive_scores(seed: int, parts: bool) -> None:
    problem, limits = random_problem(seed, units=6, choices=3, parts=parts)
    linear = solve(linearised(problem), limits)
    found = solve_quadratic(problem, limits, rounds=0, restarts=0)
    assert (found is None) == (linear is None)
    if linear is not None and found is not None:
        assert keeps(problem, found, limits)
        assert found.score <= problem.score(linear.choices)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6), st.booleans())
def test_bounds_are_below_the_optimum(seed: int, rounds: int, parts: bool) -> None:
    problem, limits = random_problem(seed, units=6, choices=4, parts=parts)
    best = optimum(problem, limits)
    start = search(Swaps(problem, limits), (), 0, np.random.default_rng(0))
    if start is None:
        return
    relaxation = relax(problem, limits, start, rounds)
    noise = 1e-10 * abs(best)
    assert min(relaxation.bound, start.score) <= best + noise
    given_up, bound = branch(relaxation, work=3000)
    assert bound <= best + noise
    assert given_up.score >= best - noise
    ended, bound = branch(relaxation)
    assert ended.score == pytest.approx(best, rel=1e-10)
    assert bound == ended.score


def test_tangents_are_below_the_score_of_every_selection() -> None:
    problem, limits = random_problem(3, units=6, choices=4)
    start = search(Swaps(problem, limits), (), 0, np.random.default_rng(0))
    assert start is not None
    constant, slopes = relax(problem, limits, start, 8, drop=False).tangent()
    scores, _ = tables(problem, {})
    below, _ = tables(linearised(problem, slopes), {})
    assert (below + constant <= scores + 1e-10).all()
    first = relax(problem, limits, start, 0, drop=False)
    later = relax(problem, limits, start, 8, drop=False)
    assert later.bound > first.bound + 0.1 * (start.score - first.bound), "the bound rises from round to round"


def test_a_time_limit_and_a_gap_are_honoured() -> None:
    problem, limits = random_problem(11, units=40)
    found = solve_quadratic(problem, limits, seconds=1.0, restarts=10**6)
    assert found is not None
    assert keeps(problem, found, limits)
    assert found.score - 0.5 * abs(found.score) < found.bound < found.score
    coarse = solve_quadratic(problem, limits, restarts=0, gap=0.9)
    assert coarse is not None
    assert coarse.optimal
    assert coarse.bound < coarse.score


def test_same_seed_same_solution() -> None:
    problem, limits = random_problem(5, units=12)
    first = solve_quadratic(problem, limits, restarts=5, rounds=3, seed=1)
    assert first == solve_quadratic(problem, limits, restarts=5, rounds=3, seed=1)


@pytest.mark.parametrize("seed", range(6))
def test_cheapest_within_a_score(seed: int) -> None:
    problem, limits = random_problem(seed, units=6, choices=4)
    scores, _ = tables(problem, {})
    costs, _ = tables(Problem(problem.costs["bytes"]), {})
    most = float(np.quantile(scores, 0.3))
    least = costs[scores <= most].min()
    found = solve_quadratic(problem, {}, minimise="bytes", max_score=most)
    assert found is not None
    assert keeps(problem, found, {})
    assert found.score <= most
    assert found.bound <= least * (1 + 1e-9)
    assert least * (1 - 1e-9) <= found.costs["bytes"] <= least * 1.02
    assert solve_quadratic(problem, limits, minimise="bytes", max_score=scores.min() - 1) is None
    anything = solve_quadratic(problem, limits, minimise="bytes")
    assert anything is not None
    assert anything.costs["bytes"] == pytest.approx(costs.min())
    assert anything.optimal


@pytest.mark.parametrize("parts", [False, True])
def test_near_solutions_are_distinct_and_good(parts: bool) -> None:
    problem, limits = random_problem(1, units=5, choices=4, parts=parts)
    scores, allowed = tables(problem, limits)
    best = solve_quadratic(problem, limits)
    assert best is not None
    found = near_quadratic(problem, best, limits, 6)
    assert len({best.choices, *(each.choices for each in found)}) == 7
    assert all(keeps(problem, each, limits) for each in found)
    ranked = np.sort(scores[allowed])[1:7]
    assert [each.score for each in found] == sorted(each.score for each in found)
    assert found[0].score == pytest.approx(ranked[0], rel=1e-9)
    assert found[-1].score <= ranked[-1] * 1.2
    assert near_quadratic(problem, best, limits, 0) == []


def test_without_interactions_the_optimum_is_linear() -> None:
    problem, limits = random_problem(2)
    assert solve_quadratic(linearised(problem), limits) == solve(linearised(problem), limits)


def test_errors_that_cancel_are_found() -> None:
    """Two pairs of layers whose 2-bit errors cancel: additive scores cannot see it."""
    one = np.array([[0.0, 0.0], [3.0, 0.0]])  # choices: float, 2 bits
    rows = np.concatenate([one, -one, one[:, ::-1], -one[:, ::-1]])
    costs = tuple(np.array([8.0, 2.0]) for _ in range(4))
    problem = Problem(tuple(np.zeros(2) for _ in range(4)), {"bits": costs}, (), rows @ rows.T)
    found = solve_quadratic(problem, {"bits": 20.0})
    assert found is not None
    assert found.choices in {(1, 1, 0, 0), (0, 0, 1, 1), (1, 1, 1, 1)}
    assert found.score == 0.0
    assert found.optimal


def test_wrong_questions_are_refused() -> None:
    problem, limits = random_problem(0, units=3)
    assert solve_quadratic(problem, {"bytes": 0.0}) is None
    with pytest.raises(ValueError, match="no cost 'watts'"):
        solve_quadratic(problem, {"watts": 1.0})
    indefinite = Problem(problem.scores, problem.costs, (), -np.asarray(problem.interactions))
    with pytest.raises(ValueError, match="positive semidefinite"):
        solve_quadratic(indefinite, limits)
