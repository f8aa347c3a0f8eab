from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from tiny import Bench

from search.report.plan_diff import best_uniform, plan_diff
from search.report.sentences import versus_words
from search.report.tables import change_rows, versus_rows

PRICES = pd.DataFrame(
    [
        {"layer": layer, "precision": f"int{bits}/uint8", "weight_bytes": weights * bits / 8, "latency_s": 1e-6 / bits}
        for layer, weights in (("a", 800), ("b", 80))
        for bits in (2, 4, 8)
    ]
).assign(energy_j=math.nan, bit_ops=1.0)


def row(name: str, size: float, drop: float, verdict: str, role: str = "uniform", bits: int = 4) -> dict[str, object]:
    costs = {"latency_s": math.nan, "energy_j": 0.0, "activation_bytes": 8.0, "bit_ops": 9.0}
    bits_ = {"average_weight_bits": float(bits), "effective_bits": bits + 0.5}
    policy = json.dumps({"a": f"int{bits}/uint8", "b": f"int{bits}/uint8"})
    quality = {"quality": 0.9 - drop, "drop": drop, "drop_low": drop - 0.01, "drop_high": drop + 0.01}
    return (
        {"role": role, "name": name, "weight_bytes": size, "verdict": verdict, "policy": policy}
        | quality
        | costs
        | bits_
    )


def about(**budget: float) -> dict[str, object]:
    return {"primary_cost": "weight_bytes", "budget": budget, "metric": "accuracy", "higher_is_better": True}


def test_changes_are_the_layers_that_differ_and_what_each_costs() -> None:
    before = {"a": "int8/uint8", "b": "int4/uint8"}
    (change,) = plan_diff(before, before | {"a": "int2/uint8"}, PRICES)
    assert (change.layer, str(change.before), str(change.after)) == ("a", "int8/uint8", "int2/uint8")
    assert change.weight_bits == -6
    assert change.costs["weight_bytes"] == 200 - 800
    assert change.costs["latency_s"] == pytest.approx(1e-6 / 2 - 1e-6 / 8)
    assert math.isnan(change.costs["energy_j"])
    assert plan_diff(before, before, PRICES) == []


def test_what_is_not_priced_is_not_known() -> None:
    for costs in (None, PRICES):
        (change,) = plan_diff({"a": "float/float"}, {"a": "int2/uint8"}, costs)
        assert all(math.isnan(more) for more in change.costs.values())
        assert [cell if isinstance(cell, str) else cell[0] for cell in change_rows([change])[0][5:]] == ["–"] * 4


def test_bytes_of_the_changes_add_up_to_the_difference_of_the_plans(bench: Bench) -> None:
    costs, rng = bench.pricing.to_frame(), np.random.default_rng(0)
    policies = [bench.space.sample(rng) for _ in range(20)]
    for one, other in pairwise(policies):
        changes = plan_diff(one.to_dict(), other.to_dict(), costs)
        sizes = [bench.pricing.costs(policy)["weight_bytes"] for policy in (one, other)]
        assert sum(change.costs["weight_bytes"] for change in changes) == pytest.approx(sizes[1] - sizes[0])
        assert {change.layer for change in changes} == {name for name, kept in one.items() if other[name] != kept}


BOTH = pd.DataFrame(
    [
        row("float", 3200, 0.0, "missed", "float", 32),
        row("int8", 800, 0.01, "met", bits=8),
        row("int6", 600, 0.01, "met", bits=6),
        row("int4", 400, 0.03, "met"),
        row("winner", 300, 0.005, "met", "winner", 3),
    ]
)


def test_the_best_uniform_plan_is_that_of_the_best_quality_or_cost_within_the_budget() -> None:
    assert best_uniform(BOTH, about(size_ratio=0.3))["name"] == "int6"  # as good as int8, and smaller
    assert best_uniform(BOTH, about(quality_drop=0.05))["name"] == "int4"
    assert best_uniform(BOTH, about())["policy"] == {"a": "int6/uint8", "b": "int6/uint8"}


def test_where_none_keeps_the_budget_it_is_the_nearest() -> None:
    missed = BOTH.assign(verdict="missed")
    assert best_uniform(missed, about(size_ratio=0.1))["name"] == "int4"
    assert best_uniform(missed, about(quality_drop=0.001))["name"] == "int6"


def test_the_winner_is_held_against_it_in_words_and_numbers() -> None:
    uniform, winner = best_uniform(BOTH, about()), BOTH.to_dict("records")[-1]
    winner["policy"] = {"a": "int2/uint8", "b": "int6/uint4"}
    changes = plan_diff(uniform["policy"], winner["policy"], PRICES)
    first, second = versus_words(uniform, winner, changes, about())
    assert first == "The best uniform plan that keeps the budget is int6."
    assert "the winner is 0.0050 better in accuracy, at 50.0% less stored size" in second
    assert "2 of 2 layers differently: 0 with more weight bits, 1 with fewer, 1 with the same" in second
    worse = about() | {"higher_is_better": False}
    assert "0.0050 worse" in versus_words(uniform, winner, changes, worse)[1]
    for verdict, words in (("missed", "No uniform plan keeps"), ("undecided", "No uniform plan surely keeps")):
        assert versus_words(uniform | {"verdict": verdict}, winner, changes, about())[0].startswith(words)
    same = versus_words(uniform, uniform, [], about())[1]
    assert "the same in accuracy, at as much stored size" in same

    rows = {name: cells for name, *cells in versus_rows(uniform, winner, "accuracy")}
    assert rows["accuracy on the report split"] == ["0.8900", "0.8950", "+0.0050"]
    assert rows["stored size"] == ["600.0 B", "300.0 B", "−300 B (−50.0%)"]
    assert rows["peak activations"] == ["8.000 B", "8.000 B", "the same"]
    assert "latency" not in rows, "what is not known is left out"
