from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.solve.descent import Descent, Ground
from search.solve.moves import Moves
from search.solve.predictor import Predictor
from search.solve.problem import Boundary, Choices, Link, Problem, Solution
from search.solve.readings import NAMES, Name, reading
from search.solve.superposition import search_superposition
from search.solve.totals import Totals

ROWS, COUNT = 30, 4


def small(seed: int, units: int = 6, formats: int = 3, bends: bool = False) -> tuple[Problem, dict[str, float]]:
    """Units whose cheaper choices hurt more, a budget in between; with `bends` also a link, a boundary and a peak."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 100, units)
    bits = np.array([2.0, 4.0, 8.0, 16.0])[:formats]
    scores = tuple(np.sort(rng.random(formats))[::-1] for _ in range(units))
    costs = {"bytes": tuple(size * bits for size in sizes), "seconds": tuple(rng.random(formats) for _ in range(units))}
    if not bends:
        return Problem(scores, costs), {"bytes": rng.uniform(0.3, 0.8) * sizes.sum() * bits[-1]}
    labels = np.arange(formats) % 2
    links = (Link((0, 2, 3), (labels, labels[::-1].copy(), labels)),)
    boundary = Boundary((1, 3), (np.arange(formats), labels), {"seconds": rng.random((formats, 2))})
    peaks = {"memory": tuple(tuple(rng.random(formats) for _ in range(units)) for _ in range(2))}
    problem = Problem(scores, costs, links, boundaries=(boundary,), peaks=peaks)
    moves = Moves(problem)
    met = problem.solution(moves.shuffled(agreeing(problem), 1.0, rng), True).costs
    return problem, {name: most * rng.choice([1.0, 1.1]) for name, most in met.items()}


def agreeing(problem: Problem) -> Choices:
    """The first selection that honours the links."""
    return next(c for c in itertools.product(*map(range, problem.sizes)) if problem.agrees(c))


def outputs_of(problem: Problem, seed: int, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A base, changes about as large as the scores, and targets."""
    rng = np.random.default_rng(seed + 1)
    base = (2 * rng.normal(size=(rows, COUNT))).astype(np.float32)
    noise = rng.normal(size=(sum(problem.sizes), rows, COUNT))
    changes = (noise * np.sqrt(np.concatenate(problem.scores))[:, None, None]).astype(np.float32)
    return base, changes, base.argmax(1)


def predicted(problem: Problem, base: np.ndarray, changes: np.ndarray, choices: Choices) -> np.ndarray:
    """Outputs added up in double precision."""
    return base.astype(float) + changes[problem.positions(choices)].astype(float).sum(0)


def enumerated(problem: Problem, limits: dict[str, float]) -> list[Choices]:
    selections = itertools.product(*map(range, problem.sizes))
    return [
        c
        for c in selections
        if problem.agrees(c) and all(problem.cost(name, c) <= most for name, most in limits.items())
    ]


def search(
    problem: Problem,
    limits: dict[str, float],
    seed: int,
    name: Name = "margin_error",
    *,
    starts: Sequence[Choices] = (),
    restarts: int = 3,
    generations: int = 2,
    keep: int = 20,
    threads: int = 1,
) -> list[Solution]:
    base, changes, targets = outputs_of(problem, seed)
    return search_superposition(
        problem,
        base,
        changes,
        base if name in ("divergence_to", "squared") else targets,
        name,
        limits,
        starts=starts,
        keep=keep,
        restarts=restarts,
        generations=generations,
        rng=np.random.default_rng(seed),
        threads=threads,
    )


def test_finds_the_optimum_that_enumeration_finds() -> None:
    hits = 0
    for seed in range(100):
        problem, limits = small(seed)
        base, changes, targets = outputs_of(problem, seed)
        every = enumerated(problem, limits)
        read = reading("margin_error", targets)(np.stack([predicted(problem, base, changes, c) for c in every]))
        found = search(problem, limits, seed, starts=[(0,) * 6], restarts=2, generations=1)[0].choices
        hits += reading("margin_error", targets)(predicted(problem, base, changes, found)) <= read.min() + 1e-6
    assert hits >= 95


@pytest.mark.parametrize("name", NAMES)
def test_every_reading_is_minimised_under_links_boundaries_and_peaks(name: Name) -> None:
    hits = 0
    for seed in range(12):
        problem, limits = small(seed, bends=True)
        base, changes, targets = outputs_of(problem, seed)
        read = reading(name, base if name in ("divergence_to", "squared") else targets)
        every = enumerated(problem, limits)
        losses = read(np.stack([predicted(problem, base, changes, c) for c in every]))
        found = search(problem, limits, seed, name, starts=[agreeing(problem)])
        hits += read(predicted(problem, base, changes, found[0].choices)) <= losses.min() * (1 + 1e-5) + 1e-6
        assert {s.choices for s in found} <= set(every)
    assert hits >= 11


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 8), st.booleans())
def test_links_and_budgets_always_hold(seed: int, units: int, bends: bool) -> None:
    problem, limits = small(seed, units, 4, bends)
    starts = [agreeing(problem)] if bends else ()
    found = search(problem, limits, seed, starts=starts, keep=7, restarts=2, generations=1)
    assert found or bends, "repairs can fail, but one additive limit is always met"
    assert len({s.choices for s in found}) == len(found) <= 7
    for solution in found:
        assert problem.agrees(solution.choices)
        assert solution == problem.solution(solution.choices, False)
        assert all(solution.costs[name] <= most for name, most in limits.items())
    base, changes, targets = outputs_of(problem, seed)
    read = reading("margin_error", targets)
    losses = [read(predicted(problem, base, changes, s.choices)) for s in found]
    assert (np.diff(losses) >= -1e-6).all(), "best first"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(NAMES))
def test_losses_near_a_selection_are_those_added_up_from_the_base(seed: int, name: Name) -> None:
    problem, _ = small(seed, 7, 4, bends=True)
    base, changes, targets = outputs_of(problem, seed)
    read = reading(name, base if name in ("divergence_to", "squared") else targets)
    predictor = Predictor(read, base, changes)
    rng = np.random.default_rng(seed)
    moves = Moves(problem)
    start = np.array(moves.shuffled(agreeing(problem), 1.0, rng))
    rows, starts = moves.all(start.tolist()), np.cumsum([0, *problem.sizes[:-1]])
    exact = read(np.stack([predicted(problem, base, changes, row) for row in rows]))
    np.testing.assert_allclose(predictor.losses(rows + starts), exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(predictor.losses_near(start + starts, rows + starts), exact, rtol=1e-4, atol=1e-5)
    groups = moves.group[(rows != start).argmax(1)]
    first, second = np.nonzero(groups[:, None] < groups)
    paired = predictor.losses_of_pairs(start + starts, rows + starts, first, second)
    both = np.where(rows[first] != start, rows[first], rows[second])
    np.testing.assert_allclose(paired, predictor.losses(both + starts), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_moves_lead_to_all_neighbours_that_honour_links(seed: int) -> None:
    problem, _ = small(seed, 6, 3, bends=True)
    moves, rng = Moves(problem), np.random.default_rng(seed)
    start = moves.shuffled(agreeing(problem), 1.0, rng)
    assert problem.agrees(start)
    reached = set(map(tuple, moves.all(start).tolist()))
    assert start not in reached
    assert all(problem.agrees(row) for row in reached)
    alone = {
        (*start[:unit], choice, *start[unit + 1 :])
        for unit in range(6)
        for choice in range(3)
        if choice != start[unit] and problem.agrees((*start[:unit], choice, *start[unit + 1 :]))
    }
    assert alone <= reached
    crossed = moves.crossed(start, moves.shuffled(start, 0.5, rng), rng)
    assert problem.agrees(crossed)


def test_units_that_follow_keep_their_weight_format() -> None:
    inputs = np.array([0, 0, 0, 1, 1, 1])  # three weight formats at each of two input formats
    scores = tuple(np.zeros(6) for _ in range(3))
    moves = Moves(Problem(scores, {}, (Link((0, 1, 2), (inputs, inputs, inputs)),)))
    assert moves.made((0, 1, 2), 0, 5) == (5, 4, 5)
    assert moves.made((0, 1, 2), 1, 2) == (0, 2, 2)


def test_links_pass_moves_on_and_some_moves_cannot_be() -> None:
    same = np.array([0, 1])
    chain = (Link((0, 1), (same, same)), Link((1, 2), (same, same)))
    moves = Moves(Problem(tuple(np.zeros(2) for _ in range(4)), {}, chain))
    assert moves.made((0, 0, 0, 0), 0, 1) == (1, 1, 1, 0)
    assert moves.group[0] == moves.group[2] != moves.group[3]
    pinned = Link((0, 1), (same, np.array([0])))
    moves = Moves(Problem((np.zeros(2), np.zeros(1)), {}, (pinned,)))
    assert moves.made((0, 0), 0, 1) is None
    assert len(moves.all((0, 0))) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_totals_are_those_of_the_problem(seed: int) -> None:
    problem, limits = small(seed, 6, 3, bends=True)
    totals = Totals(problem, limits | {"bytes": np.inf})
    rows = np.random.default_rng(seed).integers(0, 3, (20, 6))
    sums = totals.of(rows)
    for row, found in zip(rows.tolist(), sums, strict=True):
        expected = [
            problem.cost("seconds", row),
            *(sum(c[i] for c, i in zip(cut, row, strict=True)) for cut in problem.peaks["memory"]),
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    fits = [all(problem.cost(n, row) <= limits[n] * (1 + 1e-9) for n in ("seconds", "memory")) for row in rows.tolist()]
    assert totals.fit(sums).tolist() == fits
    assert (totals.excess(sums) == 0).tolist() == fits


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_repairs_end_within_limits_or_say_so(seed: int) -> None:
    problem, limits = small(seed, 8, 3)
    base, changes, targets = outputs_of(problem, seed)
    ground = Ground(problem, limits, Predictor(reading("margin_error", targets), base, changes))
    descent = Descent(ground, tuple([2] * 8))
    cheapest = problem.cost("bytes", (0,) * 8)
    assert descent.repair() == (cheapest <= limits["bytes"])
    assert ground.totals.meets(descent.at) == descent.repair()


def test_same_seed_same_answer_whatever_the_threads() -> None:
    problem, limits = small(5, 9, 4)
    once = search(problem, limits, 5, generations=4)
    assert search(problem, limits, 5, generations=4) == once
    assert search(problem, limits, 5, generations=4, threads=3) == once


def test_scores_break_ties() -> None:
    problem = Problem((np.array([3.0, 1.0, 2.0]), np.array([1.0, 0.0])), {})
    base, targets = np.eye(4, dtype=np.float32), np.arange(4)
    found = search_superposition(
        problem,
        base,
        np.zeros((5, 4, 4), np.float32),
        targets,
        "error",
        {},
        starts=[(0, 0)],
        rng=np.random.default_rng(0),
    )
    assert [s.score for s in found] == [1.0, 2.0, 2.0, 3.0, 3.0, 4.0]


def test_pins_stay_and_infeasible_limits_give_nothing() -> None:
    problem = Problem((np.zeros(1), np.array([0.0, 1.0])), {"bytes": (np.ones(1), np.array([2.0, 1.0]))})
    base, changes, targets = outputs_of(problem, 0)
    assert [s.choices for s in search(problem, {"bytes": 2.0}, 0)] == [(0, 1)]
    assert search(problem, {"bytes": 1.5}, 0) == []
    with pytest.raises(ValueError, match="no cost 'joules'"):
        search(problem, {"joules": 1.0}, 0)
    with pytest.raises(ValueError, match="3 choices, but there are changes of 2"):
        search_superposition(problem, base, changes[:2], targets, "error", {}, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="a start must choose"):
        search(problem, {}, 0, starts=[(0,)])
    with pytest.raises(ValueError, match="finite"):
        search_superposition(problem, base, changes * np.nan, targets, "error", {}, rng=np.random.default_rng(0))


def test_time_limit_is_kept() -> None:
    problem, limits = small(1, 10, 4)
    base, changes, targets = outputs_of(problem, 1, rows=2000)
    found = search_superposition(
        problem,
        base,
        changes,
        targets,
        "cross_entropy",
        limits,
        generations=10**6,
        rng=np.random.default_rng(1),
        seconds=0.2,
    )
    assert found
    assert problem.agrees(found[0].choices)
