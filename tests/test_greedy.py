"""Greedy selection: by hand, against brute force where scores and costs add up, and how it walks to a quality floor."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from conformance import StrategyContract
from scipy.spatial import ConvexHull
from synthetic import Synthetic, make_synthetic
from tiny import SlowToUnpack, make_bench

from search.errors import ConfigError
from search.objective import Objective
from search.sensitivity.choices import starts_of
from search.sensitivity.table import SensitivityTable
from search.strategies.asked import Asked
from search.strategies.greedy import Greedy, Slope, _close_in, additive_scores, curve

EVALUATIONS = 25  # in which the optimum of the synthetic problem is reached
BENCH = make_bench()


class TestGreedy(StrategyContract):
    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Greedy(evaluations)


class TestGreedyUp(StrategyContract):
    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Greedy(evaluations, direction="up", walk="interpolation")


class TestGreedyDown(StrategyContract):
    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Greedy(evaluations, direction="down", walk="every")


def objective_with(scores: np.ndarray, limits: dict[str, float], folder: Path, bench=BENCH, **options) -> Objective:
    problem = Synthetic(bench, limits)
    objective = problem.objective(folder / "trials.jsonl", Greedy(), **options)
    objective.__dict__["sensitivity"] = SensitivityTable({"kl": scores})
    return objective


def random_scores(seed: int, bench=BENCH) -> np.ndarray:
    """A score for every choice, falling with its bits."""
    rng = np.random.default_rng(seed)
    sizes = [len(decision.formats) for decision in bench.space.decisions]
    return np.concatenate([np.sort(rng.uniform(0, 1, size))[::-1] for size in sizes])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("options", [{}, {"share": 0.15}, {"quality_drop": 0.08}, {"quality_drop": 0.2}])
def test_reaches_the_optimum(seed: int, options: dict, tmp_path: Path) -> None:
    problem = make_synthetic(seed, **options)
    trials, objective = problem.search(Greedy(EVALUATIONS), tmp_path / "trials.jsonl")
    assert len(trials) <= EVALUATIONS
    assert problem.found(trials, objective) == pytest.approx(problem.optimum)


def test_by_hand(tmp_path: Path) -> None:
    """Two layers to decide about, 24 and 30 weights, in 2, 4 or 8 bits; scores such that the order is known.

    Head, 30 weights: 8 to 4 bits adds 1 to the score and saves 15 bytes, 4 to 2 bits adds 6 and saves 7.5.
    Stem, 36 weights: 8 to 4 bits adds 3 and saves 18 bytes, 4 to 2 bits adds 4 and saves 9.
    Score per byte: head 1/15, stem 3/18, stem 4/9, head 6/7.5. All the way from 8 to 2 bits is never better: 7/22.5
    against 1/15, 7/27 against 3/18.
    """
    bench = make_bench(pins={"left": "int8/uint8", "right": "int8/uint8", "stem": "int8/uint8"}, input=("uint8",))
    free = [bench.space.decisions[index].name for index in bench.space.free]
    assert free == ["head"]
    bench = make_bench(pins={"left": "int8/uint8", "right": "int8/uint8"}, input=("uint8",))
    assert [bench.space.decisions[index].name for index in bench.space.free] == ["stem", "head"]
    assert [bench.network[name].weight_count for name in ("stem", "head")] == [36, 30]
    scores = np.zeros(sum(len(decision.formats) for decision in bench.space.decisions))
    starts = starts_of(bench.space)
    stem, head = bench.space.free
    scores[starts[stem] : starts[stem] + 3] = 7, 3, 0
    scores[starts[head] : starts[head] + 3] = 7, 1, 0
    slope = Slope(objective_with(scores, {}, tmp_path, bench))
    path = slope.down()[:, [stem, head]].tolist()
    assert path == [[2, 2], [2, 1], [1, 1], [0, 1], [0, 0]]
    assert slope.forecast(slope.down()).tolist() == [0, 1, 4, 8, 14]
    assert slope.up()[:, [stem, head]].tolist() == path[::-1], "up is the same way back, where nothing is limited"


@pytest.mark.parametrize("seed", range(5))
def test_the_path_holds_every_corner_of_the_best_front(seed: int, tmp_path: Path) -> None:
    """Where scores and cost add up, all corners of the lower convex hull of (cost, score) over the space lie on it."""
    scores = random_scores(seed)
    slope = Slope(objective_with(scores, {}, tmp_path))
    every = np.array(list(itertools.product(*(range(len(d.formats)) for d in BENCH.space.decisions))))
    plane = np.stack([slope.price(every), slope.forecast(every)], 1)
    hull = ConvexHull(plane)
    lower = {
        corner
        for simplex, equation in zip(hull.simplices, hull.equations, strict=True)
        if equation[0] < -1e-9 and equation[1] < -1e-9
        for corner in simplex
    }
    corners = {tuple(np.round(plane[corner], 9)) for corner in lower}
    for path in (slope.down(), slope.up()):
        walked = {tuple(np.round(pair, 9)) for pair in zip(slope.price(path), slope.forecast(path), strict=True)}
        assert len(corners) > 3
        assert corners <= walked


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("seed", range(3))
def test_the_endpoint_is_near_the_best_score_within_the_limit(seed: int, direction: str, tmp_path: Path) -> None:
    """Its gap to the optimum is at most what the one flip adds that did not fit."""
    scores, limits = random_scores(seed), {"weight_bytes": float(np.quantile(BENCH.costs("weight_bytes"), 0.4))}
    slope = Slope(objective_with(scores, limits, tmp_path))
    path = slope.down() if direction == "down" else slope.up()
    fits = [BENCH.pricing.costs(BENCH.space.decode(p.tolist()))["weight_bytes"] <= limits["weight_bytes"] for p in path]
    end = slope.forecast(path)[fits].min()
    feasible = [p for p in BENCH.space if BENCH.pricing.costs(p)["weight_bytes"] <= limits["weight_bytes"]]
    best = slope.forecast(np.array([BENCH.space.encode(p) for p in feasible])).min()
    steps = np.abs(np.diff(slope.forecast(slope.down())))
    assert best <= end <= best + steps.max()


def test_every_walk_and_direction_finds_the_last_allowed_policy_of_the_path(tmp_path: Path) -> None:
    problem = make_synthetic(3, quality_drop=0.1)
    counts = {}
    for direction, walk in itertools.product(("down", "up"), ("every", "binary", "interpolation")):
        folder = tmp_path / f"{direction}{walk}"
        objective = problem.objective(folder / "trials.jsonl", Greedy())
        path = Slope(objective).down() if direction == "down" else Slope(objective).up()[::-1]
        drops = [problem.evaluator.measure(problem.bench.space.decode(p.tolist()), "selection").drop for p in path]
        assert drops == sorted(drops)
        last = max(index for index, drop in enumerate(drops) if drop <= 0.1)
        trials, _ = problem.search(Greedy(len(path), direction=direction, walk=walk), folder / "trials.jsonl")
        measured = [problem.bench.space.encode(trial.policy) for trial in trials]
        assert tuple(path[last]) in measured
        assert tuple(path[last + 1]) in measured, "the next one is known to be too bad"
        on_path = [point for point in measured if point in set(map(tuple, path.tolist()))]
        counts[direction, walk] = measured.index(tuple(path[last])), len(path)
        if walk == "every":
            ordered = path if direction == "down" else path[::-1]
            assert measured[: last + 1 if direction == "down" else 1] == [
                tuple(point) for point in ordered[: last + 1 if direction == "down" else 1].tolist()
            ]
        assert on_path
    assert counts["down", "binary"][0] <= np.ceil(np.log2(counts["down", "binary"][1] + 1))


@pytest.mark.parametrize("walk", ["binary", "interpolation"])
@pytest.mark.parametrize("allowed", [-1.0, 0.0, 0.02, 0.1, 0.3, 9.0])
def test_closing_in_against_looking_at_all(walk: str, allowed: float, tmp_path: Path) -> None:
    problem = make_synthetic(1, quality_drop=allowed)
    objective = problem.objective(tmp_path / "trials.jsonl", Greedy(100))
    slope, asked = Slope(objective), Asked(objective)
    path = slope.down()
    _close_in(asked, path, slope.forecast(path), allowed, walk)
    drops = [problem.evaluator.measure(problem.bench.space.decode(p.tolist()), "selection").drop for p in path]
    good = [index for index, drop in enumerate(drops) if drop <= allowed]
    known = {index for index, point in enumerate(path.tolist()) if point in asked}
    assert not good or good[-1] in known
    assert len(good) == len(path) or len(good) in known
    assert len(known) <= np.ceil(np.log2(len(path) + 1)) + (walk == "interpolation") * len(path)


def test_interpolation_needs_fewer_looks_where_scores_are_right(tmp_path: Path) -> None:
    """Drops that are the scores themselves: the ends, and then the very place."""
    bench = make_bench(weight=[f"int{bits}" for bits in range(2, 9)], input=[f"uint{bits}" for bits in range(2, 9)])
    scores = random_scores(0, bench)
    problem = Synthetic(bench, {}, quality_drop=1.0)

    class Scores(type(problem.evaluator)):
        def measure(self, policy, split, fidelity=1.0):
            from search.quality.evaluate import Quality

            drop = float(scores[np.array(bench.space.encode(policy)) + starts_of(bench.space)].sum())
            return Quality(1 - drop, 100, drop, drop, drop)

    problem.__dict__["evaluator"] = Scores(bench, 0)
    looks: dict[str, list[int]] = {"interpolation": []}
    for walk, counts in looks.items():
        for target in range(1, 12, 2):
            objective = problem.objective(tmp_path / f"{walk}{target}" / "trials.jsonl", Greedy(100))
            objective.__dict__["sensitivity"] = SensitivityTable({"kl": scores})
            slope, asked = Slope(objective), Asked(objective)
            path = slope.down()
            objective.quality_drop = float(slope.forecast(path)[target] + 1e-9)
            _close_in(asked, path, slope.forecast(path), objective.quality_drop, walk)
            assert path[target].tolist() in asked
            counts.append(len(asked.trials))
    assert max(looks["interpolation"]) <= 4, "the ends, the place itself, and the one after it: however long the path"


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize(
    ("names", "quality_drop", "slow"),
    [
        (("weight_bytes", "bit_ops"), None, False),
        (("activation_bytes",), None, False),
        (("activation_bytes", "weight_bytes"), 0.2, False),
        (("latency_s", "weight_bytes"), None, True),
        (("latency_s", "weight_bytes"), 0.3, True),
    ],
)
def test_several_limits_and_peaks(names, quality_drop, slow: bool, direction: str, tmp_path: Path) -> None:
    bench = make_bench(cost_model=SlowToUnpack()) if slow else BENCH
    limits = {name: float(np.quantile(bench.costs(name), 0.5)) for name in names}
    problem = Synthetic(bench, limits, quality_drop)
    trials, objective = problem.search(Greedy(60, direction=direction), tmp_path / "trials.jsonl")
    assert {trial.state for trial in trials} == {"complete"}, "only policies within the limits are asked for"
    assert len({trial.digest for trial in trials}) == len(trials)
    assert problem.found(trials, objective) == pytest.approx(problem.optimum)


def test_starts_are_measured_first_and_are_centres(tmp_path: Path) -> None:
    problem = make_synthetic(0)
    objective = problem.objective(tmp_path / "none.jsonl", Greedy())
    starts = [policy for policy in problem.policies() if objective.is_feasible(policy)][5:7]
    trials, _ = problem.search(Greedy(10), tmp_path / "trials.jsonl", starts=lambda objective: starts)
    assert [trial.policy for trial in trials[:2]] == starts


def test_ends_when_everything_around_was_seen(tmp_path: Path) -> None:
    problem = make_synthetic(0, share=0.05)
    trials, objective = problem.search(Greedy(1000), tmp_path / "trials.jsonl")
    kept = sum(objective.is_feasible(policy) for policy in problem.policies())
    assert len(trials) == kept == objective.spent_evaluations


def test_additive_scores() -> None:
    kl, drop, form = np.arange(3.0), np.arange(3.0) * 2, np.diag([2.0, 4.0, 6.0])
    assert additive_scores(SensitivityTable({"drop": drop, "kl": kl})).tolist() == drop.tolist()
    assert additive_scores(SensitivityTable({"drop": drop, "kl": kl}, {"forward": form})).tolist() == kl.tolist()
    assert additive_scores(SensitivityTable({"drop": drop, "kl": kl}, predictor="drop")).tolist() == drop.tolist()
    assert additive_scores(SensitivityTable({"drop": drop}, {"forward": form})).tolist() == drop.tolist()
    assert additive_scores(SensitivityTable({}, {"forward": form})).tolist() == [1.0, 2.0, 3.0]
    assert additive_scores(SensitivityTable({"sqnr_db": np.array([0.0, 10.0, 20.0])})).tolist() == [1.0, 0.1, 0.01]


def test_the_curve(tmp_path: Path) -> None:
    problem = make_synthetic(0, quality_drop=0.1)
    trials, objective = problem.search(Greedy(6, walk="every"), tmp_path / "trials.jsonl")
    reference = problem.bench.pricing.reference("float")
    rows = curve(trials, reference)
    assert [row["trial"] for row in rows] == [trial.number for trial in trials]
    assert [row["relative_bit_ops"] for row in rows] == [t.cost["bit_ops"] / reference["bit_ops"] for t in trials]
    assert rows[0]["relative_weight_bytes"] > rows[1]["relative_weight_bytes"] > rows[2]["relative_weight_bytes"]
    assert "relative_latency_s" not in rows[0], "a cost that is not known"
    assert rows[0]["flipped"] == ""
    assert rows[0]["flips"] == 0
    changed = [layer for layer in trials[0].policy if trials[0].policy[layer] != trials[1].policy[layer]]
    assert rows[1]["flips"] == len(changed) == 1
    before, after = trials[0].policy[changed[0]], trials[1].policy[changed[0]]
    assert rows[1]["flipped"] == f"{changed[0]} {before} > {after}"
    part = objective(trials[0].policy, 0.5) if objective.remaining else None
    assert part is None or curve([part], reference) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "dwn"}, r"strategy.direction=dwn is unknown \(did you mean 'down'\?\); allowed: auto, down, up"),
        ({"walk": "brute"}, "strategy.walk=brute is unknown"),
        ({"evaluations": 0}, "strategy.evaluations=0"),
    ],
)
def test_settings_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Greedy(**options)
