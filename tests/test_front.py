"""The front's members, its table and the verdict on a budget."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import spearmanr
from tiny import Bench

from hwmodels import Precision
from search.budget import Budget
from search.front import (
    Member,
    compose_front,
    front_costs,
    front_table,
    measured_front,
    rank_correlation,
    verdict,
)
from search.policy import Policy
from search.quality.evaluate import Quality
from search.shortlist import best_trial
from search.trials import Trial

ALLOW = SimpleNamespace(evaluations=50, seconds=None)


@pytest.fixture
def objective(bench: Bench, tmp_path: Path):
    return bench.objective(tmp_path / "trials.jsonl", {"weight_bytes": 550.0}, ALLOW)


def test_members(bench: Bench, objective) -> None:
    rng = np.random.default_rng(0)
    trials = [objective(bench.space.sample(rng)) for _ in range(25)]
    complete = [trial for trial in trials if trial.state == "complete"]
    assert len(complete) < len(trials), "the example no longer has infeasible trials"
    winner = min(complete, key=objective.rank)
    members = compose_front(objective, trials, winner, bench.network, ["uint4", "uint8"])
    assert [(m.role, m.name) for m in members[:4]] == [
        ("float", "float"),
        ("uniform", "uniform int8/uint8"),
        ("uniform", "uniform int6/uint8"),
        ("uniform", "uniform int4/uint4"),
    ]
    shown = [member.trial for member in members[4:]]
    points = {trial.number: (trial.cost["weight_bytes"], trial.drop) for trial in complete}
    for trial in shown[:-1]:
        if trial is not winner:
            cost, drop = points[trial.number]
            assert not any(c <= cost and d <= drop and (c, d) != (cost, drop) for c, d in points.values())
    kept = {points[trial.number] for trial in shown}
    for cost, drop in points.values():
        assert any(c <= cost and d <= drop for c, d in kept), "every trial is matched by a member"
    assert [member.role for member in members[4:]].count("winner") == 1
    costs = [trial.cost["weight_bytes"] for trial in shown]
    assert costs == sorted(costs, reverse=True)


def test_members_of_two_costs_are_those_no_other_beats(bench: Bench, objective) -> None:
    rng = np.random.default_rng(1)
    trials = [objective(bench.space.sample(rng)) for _ in range(40)]
    complete = [trial for trial in trials if trial.state == "complete"]
    winner = min(complete, key=objective.rank)
    costs = ["bit_ops", "weight_bytes"]
    members = compose_front(objective, trials, winner, bench.network, ["uint8"], costs)[4:]
    points = {trial.number: (trial.cost["bit_ops"], trial.cost["weight_bytes"], trial.drop) for trial in complete}

    def is_beaten(number: int) -> bool:
        own = points[number]
        return any(point != own and all(p <= o for p, o in zip(point, own, strict=True)) for point in points.values())

    best = {points[number] for number in points if not is_beaten(number)}
    assert {points[member.trial.number] for member in members} == best | {points[winner.number]}
    prices = [member.trial.cost["bit_ops"] for member in members]
    assert prices == sorted(prices, reverse=True)
    alone = [compose_front(objective, trials, winner, bench.network, ["uint8"], [cost])[4:] for cost in costs]
    assert len(members) > max(map(len, alone)), "the example has no policy that two costs alone keep"


def test_one_cost_is_the_primary_one_unless_it_is_named(bench: Bench, objective) -> None:
    rng = np.random.default_rng(0)
    trials = [objective(bench.space.sample(rng)) for _ in range(25)]
    winner = best_trial(objective, trials)
    members, named = (
        compose_front(objective, trials, winner, bench.network, ["uint8"], costs) for costs in ([], ["weight_bytes"])
    )
    assert members == named
    assert front_costs(objective) == ("weight_bytes",)
    assert front_costs(objective, ["effective_bits", "bit_ops"]) == ("effective_bits", "bit_ops")


def test_a_cost_that_is_not_known_is_the_worst() -> None:
    known, unknown = (
        Trial(number, Policy({}), 1.0, {"quality": 1.0, "drop": 0.0}, {"latency_s": cost}, 0.1, "complete")
        for number, cost in enumerate([1.0, None])
    )
    assert measured_front([unknown, known], ["latency_s"]) == [known]
    assert measured_front([unknown], ["latency_s"]) == [unknown]
    assert measured_front([], ["latency_s"]) == []


def test_table(bench: Bench, objective) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int4/uint8"))
    trial = objective(policy)
    float_ = Member("float", "float", Policy.uniform(bench.network, Precision()))
    rows = [
        (float_, Quality(0.9, 10, 0.0)),
        (Member("winner", "trial 0", policy, trial), Quality(0.8, 10, 0.1, 0, 0.2)),
    ]
    table = front_table(rows, objective, Budget(weight_bytes=550))
    assert table.role.tolist() == ["float", "winner"]
    assert table.trial.tolist()[1] == 0
    assert table.trial.isna().tolist() == [True, False]
    assert table.verdict.tolist() == ["missed", "met"]
    assert table["size_ratio"].tolist() == [
        1.0,
        trial.cost["weight_bytes"] / bench.pricing.reference("float")["weight_bytes"],
    ]
    assert Policy.from_dict(json.loads(table.policy[1])) == policy
    assert table.selection_quality[1] == trial.quality


@pytest.mark.parametrize(
    ("drop", "low", "high", "limit", "expected"),
    [
        (0.5, 0.4, 0.6, None, "met"),
        (0.01, 0.0, 0.02, 0.02, "met"),
        (0.01, 0.0, 0.03, 0.02, "undecided"),
        (0.03, 0.01, 0.05, 0.02, "undecided"),
        (0.05, 0.03, 0.07, 0.02, "missed"),
        (0.01, math.nan, math.nan, 0.02, "undecided"),
    ],
)
def test_verdict_on_the_drop(drop, low, high, limit, expected) -> None:
    assert verdict({"weight_bytes": 10}, Quality(0.9, 100, drop, low, high), {"weight_bytes": 10}, limit) == expected


def test_verdict_on_costs() -> None:
    quality = Quality(0.9, 100, 0.0, -0.01, 0.01)
    assert verdict({"weight_bytes": 11, "bit_ops": 1}, quality, {"bit_ops": 2, "weight_bytes": 10}, 0.1) == "missed"
    assert verdict({"weight_bytes": 11}, quality, {}, None) == "met"


def trials(predicted: list[float | None], drops: list[float], state: str = "complete") -> list[Trial]:
    return [
        Trial(i, Policy({}), 1.0, {"quality": 1 - d, "drop": d, "predicted": p}, {}, 0.1, state)
        for i, (p, d) in enumerate(zip(predicted, drops, strict=True))
    ]


def test_rank_correlation() -> None:
    predicted, drops = [0.1, 0.5, 0.2, 0.9, 0.3, 0.3], [0.0, 0.1, 0.0, 0.3, 0.2, 0.1]
    assert rank_correlation(trials(predicted, drops)) == pytest.approx(spearmanr(predicted, drops).statistic)
    assert rank_correlation(trials(predicted[:4], drops[:4])) is None
    assert rank_correlation(trials([None, *predicted[:4]], drops[:5])) is None
    assert rank_correlation(trials([0.1] * 6, drops)) is None
    assert rank_correlation(trials(predicted, [0.0] * 6)) is None
    assert rank_correlation(trials(predicted, drops, "infeasible")) is None
