"""Optuna's Gaussian process as a strategy; it thinks for long, hence on small spaces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conformance import StrategyContract
from synthetic import Synthetic
from tiny import make_bench

from search.strategies.samplers import Gp, dialogue


class TestGp(StrategyContract):
    evaluations = 4

    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dialogue, "MOST_IDLE", 10)

    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Gp(evaluations, startup=5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ["limit", "floor"])
def test_reaches_the_optimum_of_81_policies_in_20(kind: str, seed: int, tmp_path: Path) -> None:
    bench = make_bench(input=("uint8",))
    limit = {"weight_bytes": float(np.quantile(bench.costs("weight_bytes"), 0.4))}
    synthetic = Synthetic(bench, limit) if kind == "limit" else Synthetic(bench, {}, quality_drop=0.1)
    trials, objective = synthetic.search_optimum(Gp(20, startup=6), tmp_path / "trials.jsonl", seed)
    assert synthetic.found(trials, objective) == pytest.approx(synthetic.optimum, rel=1e-12)
