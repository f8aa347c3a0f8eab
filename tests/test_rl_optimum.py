"""The agent's search reaches known optima."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import make_synthetic

from search.strategies.rl.strategy import Rl

QUICK = {"episodes": 8, "warmup": 4, "updates": 1, "batch": 16, "hidden": (8,)}


# 648 policies, of which the predictors know nothing: what they were scored on is not what is measured here. Within 30
# evaluations, under a limit on cost as well as under one on the drop, also without demonstrations.
@pytest.mark.parametrize("quality_drop", [None, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_finds_the_optimum(seed: int, quality_drop: float | None, tmp_path: Path) -> None:
    synthetic = make_synthetic(seed, quality_drop=quality_drop)
    strategy = Rl(30, demonstrations=seed > 2, **QUICK)
    trials, objective = synthetic.search_optimum(strategy, tmp_path / "trials.jsonl", seed)
    assert synthetic.found(trials, objective) == pytest.approx(synthetic.optimum)
    assert {trial.state for trial in trials} == {"complete"}, "every proposal keeps the budget"
    assert len({trial.digest for trial in trials}) == len(trials), "nothing is measured twice"
