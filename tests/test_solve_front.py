"""Whole fronts: exact where scores add up, as good as enumeration or single solves where they interact."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quadratic import keeps, random_problem, tables

from search.solve.forms import linearised
from search.solve.front import non_dominated, solve_front
from search.solve.linear import solve
from search.solve.problem import Problem, Solution
from search.solve.quadratic import solve_quadratic


def assert_front(problem: Problem, found: list[Solution], limits: dict[str, float]) -> None:
    """Costs rise, scores fall, limits and links hold."""
    costs, scores = ([s.costs["bytes"] for s in found], [s.score for s in found])
    assert costs == sorted(set(costs))
    assert scores == sorted(set(scores), reverse=True)
    assert all(keeps(problem, solution, limits) for solution in found)


def best_within(found: list[Solution], budget: float) -> float:
    """The best score of a front at a budget."""
    return min(solution.score for solution in found if solution.costs["bytes"] <= budget)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_additive_front_is_exact_at_every_budget(seed: int, parts: bool) -> None:
    quadratic, limits = random_problem(seed, units=5, choices=4, parts=parts)
    problem = linearised(quadratic)
    others = {name: most for name, most in limits.items() if name != "bytes"}
    found = solve_front(problem, "bytes", 5, others)
    assert_front(problem, found, others)
    if not found:
        assert solve(problem, others) is None
        return
    least, most = found[0].costs["bytes"], found[-1].costs["bytes"]
    assert found[-1].score == solve(problem, others).score  # type: ignore[union-attr]
    for budget in np.linspace(least, most, 5):
        exact = solve(problem, {**others, "bytes": float(budget)})
        assert exact is not None
        assert best_within(found, float(budget)) == pytest.approx(exact.score, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("parts", [False, True])
def test_front_with_interactions_is_near_the_true_one(seed: int, parts: bool) -> None:
    problem, limits = random_problem(seed, units=5, choices=4, parts=parts)
    others = {name: most for name, most in limits.items() if name != "bytes"}
    scores, allowed = tables(problem, others)
    costs = np.array([problem.cost("bytes", choices) for choices in np.ndindex(problem.sizes)]).reshape(problem.sizes)
    found = solve_front(problem, "bytes", 12, others)
    assert_front(problem, found, others)
    if not found:
        assert not allowed.any()
        return
    assert found[0].costs["bytes"] == pytest.approx(costs[allowed].min(), rel=1e-12)
    for budget in np.linspace(found[0].costs["bytes"], found[-1].costs["bytes"] * (1 + 1e-9), 12):
        true = scores[allowed & (costs <= budget)].min()
        assert true - 1e-9 <= best_within(found, budget) <= true + 0.02 * abs(true) + 1e-9


def test_given_budgets_and_an_own_limit_are_kept() -> None:
    problem, limits = random_problem(4, units=12)
    budget = limits["bytes"]
    found = solve_front(problem, "bytes", [0.0, 0.7 * budget, 0.8 * budget, budget, 2 * budget], limits)
    assert_front(problem, found, limits)
    assert 1 < len(found) <= 4
    single = solve_quadratic(problem, limits, rounds=0, restarts=0)
    assert single is not None
    assert found[-1].score <= single.score + 0.01 * abs(single.score)
    assert solve_front(problem, "bytes", 3, {"bytes": 0.0}) == []
    assert solve_front(problem, "bytes", [0.0]) == []


def test_same_seed_same_front() -> None:
    problem, _ = random_problem(6, units=10)
    assert solve_front(problem, "bytes", 6, seed=2) == solve_front(problem, "bytes", 6, seed=2)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_what_is_beaten_is_left_out(points: list[tuple[int, int]]) -> None:
    solutions = [
        Solution((number,), float(score), {"c": float(cost)}, False) for number, (cost, score) in enumerate(points)
    ]
    kept = non_dominated(solutions, "c")
    for cost, score in points:
        assert any(s.costs["c"] <= cost and s.score <= score for s in kept)
    for one in kept:
        assert not any(two is not one and two.costs["c"] <= one.costs["c"] and two.score <= one.score for two in kept)


def test_wrong_questions_are_refused() -> None:
    problem, _ = random_problem(0, units=3)
    with pytest.raises(ValueError, match="no cost 'watts'"):
        solve_front(problem, "watts", 3)
    with pytest.raises(ValueError, match="at least two budgets, got 1"):
        solve_front(problem, "bytes", 1)
