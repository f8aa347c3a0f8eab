"""Predictors as sources of candidates, against enumeration of a small space."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import Bench, make_bench

from search.assignment import variable_limits
from search.sensitivity.choices import positions
from search.sensitivity.settings import SensitivitySettings
from search.sensitivity.table import SensitivityTable
from search.strategies.forecaster import Forecaster, forecasters, gap_of, proofs

PREDICTORS = ("kl", "forward", "forward_scaled", "backward_scaled", "superposition")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return make_bench(input=("uint8",))


@pytest.fixture(scope="module")
def table(bench: Bench) -> SensitivityTable:
    return bench.scores(settings=SensitivitySettings(interactions=["forward", "backward"]))


@pytest.fixture(scope="module")
def every(bench: Bench) -> np.ndarray:
    return np.array([bench.space.encode(policy) for policy in bench.space])


@pytest.mark.parametrize("name", PREDICTORS)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_best_point_is_the_one_enumeration_finds(
    bench: Bench, table: SensitivityTable, every: np.ndarray, name: str, share: float
) -> None:
    sizes = bench.pricing.totals(every)["weight_bytes"]
    limits = {"weight_bytes": float(np.quantile(sizes, share))}
    source = Forecaster(name, table, bench.pricing)
    losses = table.predict(np.stack([positions(bench.space, point) for point in every]), name)

    found = source.best(variable_limits(bench.pricing, limits), 3)

    assert len(set(map(tuple, found.tolist()))) == len(found) >= 1
    assert (bench.pricing.totals(found)["weight_bytes"] <= limits["weight_bytes"] * (1 + 1e-12)).all()
    least = losses[sizes <= limits["weight_bytes"]].min()
    assert source.losses(found)[0] == pytest.approx(least, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_front_falls_as_its_cost_rises(bench: Bench, table: SensitivityTable, name: str) -> None:
    source = Forecaster(name, table, bench.pricing)
    found = source.front("weight_bytes", 6, {})

    assert len(found) > 2
    assert (np.diff(bench.pricing.totals(found)["weight_bytes"]) >= 0).all()
    if name != "superposition":  # its points lie along the front of the interactions it starts from
        assert (np.diff(source.losses(found)) < 0).all()


def test_a_limit_that_nothing_keeps_has_no_best_point(bench: Bench, table: SensitivityTable) -> None:
    for name in PREDICTORS:
        assert len(Forecaster(name, table, bench.pricing).best({"weight_bytes": 1.0}, 3)) == 0


def test_the_table_says_who_forecasts(bench: Bench, table: SensitivityTable) -> None:
    several = [source.name for source in forecasters(table, bench.pricing)]
    assert several == ["forward_scaled", "superposition", "backward_scaled", "kl"]
    for name in PREDICTORS:
        assert [source.name for source in forecasters(replace(table, predictor=name), bench.pricing)] == [name]
    plain = replace(table, interactions={}, superposition=None)
    assert [source.name for source in forecasters(plain, bench.pricing)] == ["kl"]


def test_optima_are_proved(bench: Bench, table: SensitivityTable, every: np.ndarray) -> None:
    limit = float(np.median(bench.pricing.totals(every)["weight_bytes"]))
    limits = variable_limits(bench.pricing, {"weight_bytes": limit})
    found = proofs(table, bench.pricing, limits)

    assert set(found) == {"forward_scaled", "backward_scaled", "kl"}, "a superposition has no bound"
    assert found["kl"]["gap"] == 0
    for each in found.values():
        assert each["bound"] <= each["score"] * (1 + 1e-9)
        assert 0 <= each["gap"] <= 1
    solution = Forecaster("kl", table, bench.pricing).proved(limits, 1.0)
    assert solution is not None
    assert gap_of(replace(solution, optimal=False, bound=solution.score / 2)) == pytest.approx(0.5)
