"""Budgets: what is refused, and ratios turned into limits."""

from __future__ import annotations

import math

import pytest

from search.budget import Budget, budget_words
from search.errors import ConfigError

REFERENCE = {
    "latency_s": 2e-3,
    "energy_j": 4e-3,
    "weight_bytes": 1000.0,
    "activation_bytes": 500.0,
    "bit_ops": 1e6,
    "average_weight_bits": 32.0,
    "effective_bits": 33.0,
}


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, {}),
        ({"size_ratio": 0.14}, {"weight_bytes": 140.0}),
        ({"latency_ratio": 0.5, "energy_ratio": 2}, {"latency_s": 1e-3, "energy_j": 8e-3}),
        ({"bit_ops_ratio": 0.1, "average_weight_bits": 4}, {"bit_ops": 1e5, "average_weight_bits": 4.0}),
        ({"size_ratio": 0.14, "weight_bytes": 100}, {"weight_bytes": 100.0}),
        ({"size_ratio": 0.14, "weight_bytes": 200}, {"weight_bytes": 140.0}),
        ({"effective_bits": 4.5, "activation_bytes": 100}, {"effective_bits": 4.5, "activation_bytes": 100.0}),
        ({"quality_drop": 0.01, "latency_s": 1e-3}, {"latency_s": 1e-3}),
    ],
)
def test_limits(given: dict[str, float], limits: dict[str, float]) -> None:
    budget = Budget(**given)
    assert budget.given() == {name: float(value) for name, value in given.items()}
    assert budget.limits(REFERENCE) == pytest.approx(limits)
    assert set(budget.limits(REFERENCE)) == set(limits)


@pytest.mark.parametrize("name", ["size_ratio", "latency_s", "average_weight_bits", "quality_drop"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_impossible_limits(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"budget\.{name}={value} must be"):
        Budget(**{name: value})


def test_zero_is_a_quality_drop_but_no_cost() -> None:
    assert Budget(quality_drop=0).given() == {"quality_drop": 0.0}
    with pytest.raises(ConfigError, match=r"budget\.size_ratio=0.0 must be above 0"):
        Budget(size_ratio=0)


def test_unknown_reference() -> None:
    with pytest.raises(ConfigError, match=r"budget\.reference=int4 is unknown.*float, int8"):
        Budget(reference="int4")


def test_a_cost_the_hardware_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"budget\.latency_ratio needs a hardware model that knows latency_s"):
        Budget(latency_ratio=0.5).limits(REFERENCE | {"latency_s": math.nan})


def test_budgets_in_words() -> None:
    assert budget_words(Budget(size_ratio=0.3).given()) == "size ≤ 0.3 × float"
    assert budget_words({"bit_ops_ratio": 0.5}, "int8") == "bit ops ≤ 0.5 × int8"
    assert budget_words({"weight_bytes": 2048.0, "quality_drop": 0.01}) == "stored size ≤ 2.00 KiB, drop ≤ 0.01"
    assert budget_words({}) == "no limit"
