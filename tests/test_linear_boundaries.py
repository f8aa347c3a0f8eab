"""Boundaries, peaks, gaps and time limits of the exact solver, against enumeration."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.solve import highs, optimum
from search.solve.front import solve_front
from search.solve.linear import NotFoundError, least, near, solve
from search.solve.problem import Boundary, Link, Problem, Solution


def enumerated(problem: Problem, limits: dict[str, float]) -> list[Solution]:
    """Every feasible selection, best first."""
    every = (problem.solution(choices, True) for choices in itertools.product(*map(range, problem.sizes)))
    within = (s for s in every if all(s.costs[name] <= most for name, most in limits.items()))
    return sorted((s for s in within if problem.agrees(s.choices)), key=lambda s: s.score)


def random_problem(seed: int) -> tuple[Problem, dict[str, float]]:
    """Costs of the order of 1e-9 and 1e9 that boundaries add to, peaks, links; limits that some selection meets."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, rng.integers(2, 6))
    scores = tuple(10 ** rng.uniform(-6, 0, size) for size in sizes)
    costs = {
        "bytes": tuple(1e9 * rng.integers(0, 9, size) for size in sizes),
        "seconds": tuple(1e-9 * 10 ** rng.uniform(-3, 0, size) for size in sizes),
    }
    boundaries = []
    for _ in range(rng.integers(0, 4)):
        first, second = (int(unit) for unit in rng.choice(len(sizes), 2, replace=False))
        labels = tuple(rng.integers(0, 3, sizes[unit]) for unit in (first, second))
        met = {"seconds": 1e-9 * rng.uniform(-0.2, 1, (3, 3)) * rng.integers(0, 2, (3, 3))}
        if rng.random() < 0.5:
            met["bytes"] = 1e9 * rng.integers(0, 5, (3, 3))
        boundaries.append(Boundary((first, second), labels, met))
    links = []
    if rng.random() < 0.5:
        pair = [int(unit) for unit in rng.choice(len(sizes), 2, replace=False)]
        links.append(Link(tuple(pair), tuple(np.append(0, rng.integers(0, 3, sizes[unit] - 1)) for unit in pair)))
    cuts = tuple(
        tuple(rng.integers(0, 9, size) * float(rng.random() < 0.7) for size in sizes) for _ in range(rng.integers(1, 5))
    )
    problem = Problem(scores, costs, tuple(links), boundaries=tuple(boundaries), peaks={"peak": cuts})
    met = problem.solution([rng.integers(size) for size in sizes], True).costs
    limited = rng.permutation(["bytes", "seconds", "peak"])[: rng.integers(1, 4)]
    return problem, {str(name): met[name] for name in limited}


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6))
def test_optimum_is_the_one_enumeration_finds(seed: int) -> None:
    problem, limits = random_problem(seed)
    expected, found = enumerated(problem, limits), solve(problem, limits)
    if not expected:
        assert found is None
        return
    assert found is not None
    assert found == problem.solution(found.choices, True, found.score)
    assert found.score == pytest.approx(expected[0].score, rel=1e-15, abs=0)
    assert problem.agrees(found.choices)
    assert all(found.costs[name] <= most for name, most in limits.items())
    following = near(problem, found, limits, 2)
    assert [s.score for s in following] == pytest.approx([s.score for s in expected[1:3]], rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["bytes", "seconds", "peak"]), st.booleans())
def test_cheapest_within_limits_and_a_score(seed: int, cost: str, bounded: bool) -> None:
    problem, limits = random_problem(seed)
    within = enumerated(problem, limits)
    most = within[len(within) // 2].score if bounded and within else None
    within = [s for s in within if most is None or s.score <= most]
    found = solve(problem, limits, minimise=cost, max_score=most)
    if not within:
        assert found is None
        return
    assert found is not None
    lowest = min(s.costs[cost] for s in within)
    assert found.costs[cost] == pytest.approx(lowest, rel=1e-12, abs=0)
    assert found.optimal
    assert found.bound == found.costs[cost]
    assert found.score == pytest.approx(min(s.score for s in within if s.costs[cost] <= found.costs[cost]), rel=1e-12)


def random_large(seed: int, units: int = 60, chained: bool = False) -> tuple[Problem, dict[str, float]]:
    """Units of eight choices under three budgets, in the way of layers with 1 to 8 bits; a chain of conversions."""
    rng = np.random.default_rng(seed)
    bits, labels = np.arange(1.0, 9), np.arange(8)
    size, macs = 10 ** rng.uniform(3, 6, units), 10 ** rng.uniform(5, 8, units)
    scores = tuple(s * 4.0**-bits * np.exp(rng.normal(0, 0.2, 8)) for s in 10 ** rng.uniform(-3, 1, units))
    costs = {
        "bytes": tuple(n * bits / 8 for n in size),
        "seconds": tuple(1e-12 * m * (1 + bits) * np.exp(rng.normal(0, 0.1, 8)) for m in macs),
        "joules": tuple(1e-12 * m * bits**1.5 + 1e-11 * n * bits for m, n in zip(macs, size, strict=True)),
    }
    pairs = range(units - 1) if chained else ()
    converting = 1.0 - np.eye(8)
    boundaries = [Boundary((u, u + 1), (labels, labels), {"seconds": 1e-12 * macs[u] * converting}) for u in pairs]
    limits = {name: sum(float(numbers[3]) for numbers in column) for name, column in costs.items()}
    return Problem(scores, costs, boundaries=tuple(boundaries)), limits


@pytest.mark.parametrize("chained", [False, True])
def test_a_gap_is_proved_and_no_limit_overshot(chained: bool) -> None:
    problem, limits = random_large(0, units=25 if chained else 60, chained=chained)
    found = solve(problem, limits, gap=1e-3)
    assert found is not None
    assert found.score * (1 - 1e-3) <= found.bound <= found.score
    assert all(found.costs[name] <= most for name, most in limits.items())
    best = solve(problem, limits, gap=1e-6)
    assert best is not None
    assert found.bound <= best.score <= found.score * (1 + 1e-6)
    cheapest = solve(problem, {"bytes": limits["bytes"]}, minimise="seconds", max_score=2 * best.score, gap=1e-3)
    assert cheapest is not None
    assert cheapest.costs["seconds"] * (1 - 1e-3) <= cheapest.bound <= cheapest.costs["seconds"] <= limits["seconds"]
    assert cheapest.score <= 2 * best.score


def test_time_is_honoured() -> None:
    problem, limits = random_large(1, units=300)
    start = time.monotonic()
    found = solve(problem, limits, seconds=1.5)
    assert time.monotonic() - start < 6
    assert found is not None
    assert found.score * 0.99 <= found.bound <= found.score
    assert found.optimal == (found.bound == found.score)
    assert all(found.costs[name] <= most for name, most in limits.items())


def test_the_best_so_far_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After so few nodes nothing is proved, on a machine of any speed."""
    problem, limits = random_large(1, units=300)
    monkeypatch.setattr(highs, "MAX_NODES", 1)
    found = solve(problem, limits)
    assert found is not None
    assert not found.optimal
    assert found.score * 0.99 <= found.bound < found.score
    assert all(found.costs[name] <= most for name, most in limits.items())


def test_not_found_is_told_from_infeasible() -> None:
    problem, limits = random_large(2, units=300)
    with pytest.raises(NotFoundError, match="more seconds"):
        solve(problem, limits, seconds=0.0)
    assert solve(problem, {"bytes": 1.0}, seconds=0.0) is None, "seen without solving"


def test_lowest_peak_is_found_where_many_selections_come_close() -> None:
    rng = np.random.default_rng(0)
    cuts = tuple(tuple(1 + 1e-9 * rng.random(3) for _ in range(6)) for _ in range(4))
    problem = Problem(tuple(rng.random(3) for _ in range(6)), peaks={"peak": cuts})
    lowest = min(s.costs["peak"] for s in enumerated(problem, {}))
    found = least(problem, "peak")
    assert found.costs["peak"] == pytest.approx(lowest, rel=1e-15)
    assert found.optimal


def test_a_front_over_a_peak() -> None:
    problem, _ = random_problem(3)
    found = solve_front(problem, "peak", 8)
    every = enumerated(problem, {})
    assert found[0].costs["peak"] == min(s.costs["peak"] for s in every)
    assert found[-1].score == pytest.approx(every[0].score)
    for solution in found:
        assert solution.score == pytest.approx(
            min(s.score for s in every if s.costs["peak"] <= solution.costs["peak"]), rel=1e-12
        )


def test_the_core_may_be_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, limits = random_large(4, units=12)
    expected = solve(problem, limits)
    monkeypatch.setattr(optimum, "CORE", -5)  # a single choice against the relaxation
    found = solve(problem, limits)
    assert expected is not None
    assert found == expected


def test_boundaries_of_costs_that_do_not_matter_are_left_alone() -> None:
    problem, limits = random_large(0, units=8, chained=True)
    alone = Problem(problem.scores, problem.costs)
    within = {"bytes": limits["bytes"]}
    found, expected = solve(problem, within), solve(alone, within)
    assert found is not None
    assert expected is not None
    assert found.choices == expected.choices
    assert found.costs["seconds"] > expected.costs["seconds"], "but they are paid for"


def test_interactions_are_left_out_and_nothing_claimed_about_them() -> None:
    problem, limits = random_problem(5)
    bent = Problem(problem.scores, problem.costs, interactions=np.eye(sum(problem.sizes)))
    limits = {"bytes": problem.solution([0] * len(problem.sizes), False).costs["bytes"] + 1e10}
    found, expected = solve(bent, limits), solve(Problem(problem.scores, problem.costs), limits)
    assert found is not None
    assert expected is not None
    assert found.choices == expected.choices
    assert found.score == pytest.approx(expected.score + len(problem.sizes) / 2)
    assert (found.optimal, found.bound) == (False, -np.inf)
    with pytest.raises(ValueError, match="these interact"):
        solve(bent, limits, max_score=1.0)
