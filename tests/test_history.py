"""The history of a search: its spending, its best loss, and hypervolumes against grids and against Optuna's."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from synthetic import Synthetic, make_synthetic
from tiny import TinyTask, make_bench

from hwmodels import StorageModel
from hwmodels.precision import FLOAT_PRECISION
from search.errors import ConfigError
from search.history import growing_volumes, history_table
from search.objective import Objective
from search.space import SearchSpace
from search.strategies.base import Strategy
from search.trials import Trial, spending

GRID = st.integers(2, 4).flatmap(
    lambda objectives: st.integers(0, 8).flatmap(
        lambda count: arrays(np.float64, (count, objectives), elements=st.integers(-1, 4).map(lambda cell: cell / 3))
    )
)


class Dice(Strategy):
    """Throws policies, over budget or not."""

    name = "dice"

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        while True:
            objective(space.sample(rng))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Trial], Objective]:
    """A search with policies over budget among its trials."""
    return make_synthetic(0, share=0.5).search(Dice(25), tmp_path_factory.mktemp("searched") / "trials.jsonl")


# Hypervolumes


@given(GRID)
def test_volumes_count_the_dominated_cells_of_a_grid(losses: np.ndarray) -> None:
    objectives = losses.shape[1]
    cells = np.stack(np.meshgrid(*[(np.arange(3) + 0.5) / 3] * objectives, indexing="ij"), -1).reshape(-1, objectives)
    covered = [(losses[:, None] <= cells).all(axis=2)[:end].any(axis=0).mean() for end in range(1, len(losses) + 1)]
    np.testing.assert_allclose(growing_volumes(losses), covered, atol=1e-12)


@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_volumes_are_optunas(objectives: int) -> None:
    compute_hypervolume = pytest.importorskip("optuna._hypervolume").compute_hypervolume
    losses = np.random.default_rng(objectives).uniform(0, 1, (25, objectives))
    expected = [compute_hypervolume(losses[:end], np.ones(objectives)) for end in range(1, len(losses) + 1)]
    np.testing.assert_allclose(growing_volumes(losses), expected, rtol=1e-12)


@given(arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(2, 4)), elements=st.floats(-0.2, 1.2)))
def test_volumes_rise_within_the_box_and_end_alike_in_any_order(losses: np.ndarray) -> None:
    volumes = growing_volumes(losses)
    assert (np.diff(volumes) >= 0).all()
    assert (volumes >= 0).all()
    assert (volumes <= 1 + 1e-12).all()
    assert growing_volumes(losses[::-1])[-1] == pytest.approx(volumes[-1], abs=1e-12)


def test_unmeasured_points_cover_nothing() -> None:
    volumes = growing_volumes(np.array([[math.inf, 0.1], [0.5, 0.5], [0.2, math.inf], [1.0, 0.0], [0.0, 0.0]]))
    assert volumes.tolist() == [0, 0.25, 0.25, 0.25, 1]


def test_long_logs_take_about_a_second() -> None:
    rng = np.random.default_rng(0)
    losses = 0.6 * rng.dirichlet(np.ones(3), 2000) * (1 + rng.exponential(0.1, 2000))[:, None]
    started = time.process_time()
    growing_volumes(losses)
    assert time.process_time() - started < 5  # 0.5 on an idle core


# The table


def test_spending_counts_parts_and_what_proposing_took(searched: tuple[list[Trial], Objective]) -> None:
    first, second, third = (replace(trial, seconds=1.0, proposing_seconds=0.5) for trial in searched[0][:3])
    trials = [
        replace(first, state="stopped", fidelity=0.1),
        replace(second, state="infeasible", seconds=0.0),
        replace(third, state="failed", fidelity=0.2),
        replace(first, state="complete", fidelity=1.0),
    ]
    assert [(evaluations, seconds) for _, evaluations, seconds in spending(trials)] == [
        (0.1, 1.5),
        (0.3, 3.5),
        (1.3, 5),
    ]


@pytest.mark.parametrize("costs", [(), ("weight_bytes",), ("weight_bytes", "bit_ops"), ("bit_ops", "weight_bytes")])
def test_table_follows_the_definition(searched: tuple[list[Trial], Objective], costs: tuple[str, ...]) -> None:
    trials, objective = searched
    measured = [trial for trial in trials if trial.state == "complete"]
    assert 5 < len(measured) < len(trials), "the example no longer has infeasible trials"
    table = history_table(objective, trials, costs)
    assert table["trial"].tolist() == [trial.number for trial in measured]
    assert table["evaluations"].tolist() == [*range(1, len(measured) + 1)]
    assert table["seconds"].is_monotonic_increasing
    assert table["best_loss"].tolist() == list(accumulate((trial.drop for trial in measured), min))

    names = costs or ("weight_bytes",)
    reference = objective.pricing.reference("float")
    rng = np.random.default_rng(0)
    darts = rng.uniform(0, 1, (200_000, 1 + len(names)))
    hits = np.zeros(len(darts), dtype=bool)
    for trial in measured:
        corner = [trial.drop / objective.float_quality, *(trial.cost[name] / reference[name] for name in names)]
        hits |= (np.maximum(corner, 0) <= darts).all(axis=1)
    assert table["hypervolume"].iloc[-1] == pytest.approx(hits.mean(), abs=0.005)
    primary = history_table(objective, trials)["hypervolume"].tolist()
    assert table["primary_hypervolume"].tolist() == primary, "whatever the front is about"


def test_costs_that_quantizing_hardly_lowers_count_to_twice_the_8_bit_networks(tmp_path: Path) -> None:
    class SlowInt8(StorageModel):
        def network_cost(self, network, policy, workload):
            report = super().network_cost(network, policy, workload)
            is_float = set(policy.values()) == {FLOAT_PRECISION}
            return replace(report, total=replace(report.total, latency_s=1.0 if is_float else 3.0))

    bench = make_bench(cost_model=SlowInt8())
    synthetic = Synthetic(bench, {})
    trials, objective = synthetic.search(Dice(5), tmp_path / "trials.jsonl")
    best = 1 - min(trial.drop for trial in trials) / objective.float_quality
    assert history_table(objective, trials, ["latency_s"])["hypervolume"].iloc[-1] == pytest.approx(best * 0.5)


def test_best_loss_is_the_cost_where_the_budget_limits_the_drop(tmp_path: Path) -> None:
    synthetic = make_synthetic(0, quality_drop=0.08)
    trials, objective = synthetic.search(Dice(30), tmp_path / "trials.jsonl", primary_cost="weight_bytes")
    table, best = history_table(objective, trials), math.nan
    for trial, found in zip(trials, table["best_loss"], strict=True):
        if trial.certain_drop <= 0.08:
            best = np.fmin(best, trial.cost["weight_bytes"])
        np.testing.assert_equal(found, best)
    assert table["best_loss"].isna().any(), "the example begins within the budget"
    assert table["hypervolume"].iloc[0] > 0, "policies count, whether they keep the limit on the drop or not"


def test_only_whole_measurements_are_best(searched: tuple[list[Trial], Objective]) -> None:
    trials, objective = searched
    measured = [trial for trial in trials if trial.state == "complete"][:3]
    parts = [replace(measured[0], fidelity=0.5), replace(measured[1], state="stopped", fidelity=0.2), measured[2]]
    table = history_table(objective, parts)
    assert table["evaluations"].tolist() == [0.5, 0.7, 1.7]
    assert table["best_loss"].isna().tolist() == [True, True, False]
    assert table["hypervolume"].gt(0).tolist() == [False, False, True]


def test_history_of_nothing_has_its_columns(searched: tuple[list[Trial], Objective]) -> None:
    table = history_table(searched[1], [])
    assert table.empty
    assert list(table) == ["trial", "evaluations", "seconds", "best_loss", "hypervolume", "primary_hypervolume"]


def test_a_float_network_of_no_quality_spans_no_box(searched: tuple[list[Trial], Objective]) -> None:
    trials, objective = searched
    blind = Synthetic(make_bench(TinyTask()), {}).objective(Path("unused"), Dice(1))
    blind.float_quality = 0.0
    assert history_table(blind, trials)[["hypervolume", "primary_hypervolume"]].isna().all(axis=None)
    assert history_table(blind, trials)["best_loss"].tolist() == history_table(objective, trials)["best_loss"].tolist()


def test_unknown_costs_are_named(searched: tuple[list[Trial], Objective]) -> None:
    with pytest.raises(
        ConfigError, match=r"strategy\.costs names 'latency' \(did you mean 'latency_s'\?\); allowed: w"
    ):
        history_table(searched[1], searched[0], ["latency"])
    with pytest.raises(ConfigError, match=r"names energy_j, which is not known on hardware storage; allowed: weight_b"):
        history_table(searched[1], searched[0], ["weight_bytes", "energy_j"])
    with pytest.raises(ConfigError, match=r"names a cost twice"):
        history_table(searched[1], searched[0], ["weight_bytes", "weight_bytes"])
