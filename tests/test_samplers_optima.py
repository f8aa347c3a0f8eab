"""What Optuna's samplers reach: optima and fronts of a small space, held against brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import Synthetic, make_synthetic

from search.pareto import front, hypervolume
from search.strategies.samplers import CmaEs, Nsga2, Nsga3, OptunaSearch, Qmc, Tpe

KINDS: dict[str, type[OptunaSearch]] = {kind.name: kind for kind in (Tpe, Nsga2, Nsga3, CmaEs, Qmc)}
ENOUGH = 70  # evaluations of 648 policies within which TPE, NSGA-II, NSGA-III and CMA-ES reach the optimum, any seed


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing every trial to disk takes longer than the searches here."""
    monkeypatch.setattr("search.files.os.fsync", lambda descriptor: None)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["tpe", "nsga2", "nsga3", "cmaes"])
@pytest.mark.parametrize(
    "synthetic", [make_synthetic(0, 0.4), make_synthetic(1, quality_drop=0.1)], ids=["limit", "floor"]
)
def test_reaches_the_optimum(synthetic: Synthetic, name: str, seed: int, tmp_path: Path) -> None:
    trials, objective = synthetic.search_optimum(KINDS[name](ENOUGH), tmp_path / "trials.jsonl", seed)
    assert synthetic.found(trials, objective) == pytest.approx(synthetic.optimum, rel=1e-12)


def test_qmc_learns_nothing_and_comes_near(tmp_path: Path) -> None:
    """It covers the space: with 70 of 648 policies it comes into the best twentieth, reaching the best in 1 of 5."""
    synthetic = make_synthetic(0, 0.4)
    objective = synthetic.objective(tmp_path / "none.jsonl", Qmc())
    within = [policy for policy in synthetic.policies() if objective.is_feasible(policy)]
    drops = np.array([synthetic.evaluator.measure(policy, "selection").drop for policy in within])
    found = [synthetic.found(*synthetic.search(Qmc(ENOUGH), tmp_path / f"{s}.jsonl", s)) for s in range(5)]
    assert max(found) <= np.quantile(drops, 0.05)
    assert sum(drop == drops.min() for drop in found) == 1


# Least share of the true front's hypervolume, and members of it found, after 60 evaluations of 648 policies.
FRONTS = [("tpe", 0.99, 14), ("nsga2", 0.94, 5), ("nsga3", 0.92, 4), ("qmc", 0.9, 2)]


@pytest.mark.parametrize(("name", "share", "members"), FRONTS)
def test_finds_the_front(name: str, share: float, members: int, tmp_path: Path) -> None:
    synthetic = make_synthetic(0)
    synthetic.limits = {}
    truth = np.array(
        [
            (
                synthetic.evaluator.measure(policy, "selection").drop,
                synthetic.bench.pricing.costs(policy)["weight_bytes"],
            )
            for policy in synthetic.policies()
        ]
    )
    best = {tuple(point) for point in truth[front(truth, (False, False))]}
    assert len(best) == 21
    corner = truth.max(0)
    for seed in range(3):
        trials, _ = synthetic.search(KINDS[name](60, costs=["weight_bytes"]), tmp_path / f"{seed}.jsonl", seed)
        found = np.array([(trial.drop, trial.cost["weight_bytes"]) for trial in trials])
        covered = hypervolume(found, corner, (False, False)) / hypervolume(truth, corner, (False, False))
        assert share <= covered <= 1
        assert len({tuple(point) for point in found} & best) >= members
