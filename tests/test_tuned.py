"""Measuring after fine-tuning: what is measured is what fine-tuning leaves, and the winner gets it again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from tiny import Bench, TinyTask, make_bench

from hwmodels import Precision
from search.objective import SpentError
from search.plan import tensor_digests
from search.policy import Policy
from search.quality.evaluate import sample_scores
from search.quality.racing import Racing
from search.quality.store import EvaluationStore
from search.recover import tuned
from search.recover.finetune import finetune
from search.recover.tuned import TunedEvaluator
from search.strategies.baselines import RandomSearch
from search.trials import TrialLog

STEPS = 4


@pytest.fixture
def bench() -> Bench:
    return make_bench(TinyTask(1))


def policy_of(bench: Bench, precision: str = "int4/uint4") -> Policy:
    return Policy.uniform(bench.network, Precision.parse(precision))


def by_hand(bench: Bench, policy: Policy) -> np.ndarray:
    model = finetune(bench.simulated, policy, bench.task, steps=STEPS).apply(policy)
    return sample_scores(bench.task, model, "selection")


@pytest.mark.parametrize("precision", ["int2/uint4", "int4/uint4"])
def test_measures_what_finetuning_leaves(bench: Bench, precision: str) -> None:
    policy = policy_of(bench, precision)
    before = tensor_digests(bench.simulated.apply({}))
    evaluator = TunedEvaluator(bench.evaluator, STEPS)
    assert np.array_equal(evaluator.scores(policy, "selection"), by_hand(bench, policy))
    assert not np.array_equal(evaluator.scores(policy, "selection"), bench.evaluator.scores(policy, "selection"))
    assert tensor_digests(bench.simulated.apply({})) == before, "the network itself is left as it was"
    assert evaluator.seconds > 0


def test_other_policies_measured_before_make_no_difference(bench: Bench) -> None:
    policy, other = policy_of(bench), policy_of(bench, "int2/uint4")
    alone = TunedEvaluator(bench.evaluator, STEPS).measure(policy, "selection")
    evaluator = TunedEvaluator(bench.evaluator, STEPS)
    evaluator.measure(other, "selection")
    assert evaluator.measure(policy, "selection") == alone


def test_drops_are_against_the_float_network(bench: Bench) -> None:
    policy, evaluator = policy_of(bench), TunedEvaluator(bench.evaluator, STEPS)
    assert evaluator.float_quality("selection") == bench.evaluator.float_quality("selection")
    quality = evaluator.measure(policy, "selection")
    assert quality.drop == pytest.approx(bench.evaluator.float_quality("selection").value - quality.value)


def test_races_run_on_the_finetuned_network(bench: Bench) -> None:
    bench.evaluator.racing = Racing(first=40)
    policy, evaluator = policy_of(bench), TunedEvaluator(bench.evaluator, STEPS)
    finish = evaluator.race(policy, [])
    assert finish.fidelity == 1
    assert finish.scores is not None
    assert np.array_equal(finish.scores, by_hand(bench, policy))


def test_the_winner_is_the_network_that_was_measured(bench: Bench, tmp_path: Path) -> None:
    evaluator, strategy = TunedEvaluator(bench.evaluator, STEPS), RandomSearch(evaluations=3)
    bench.evaluator, untuned = evaluator, bench.evaluator
    objective = bench.objective(tmp_path / "trials.jsonl", {}, strategy)
    with suppress(SpentError):
        strategy.search(bench.space, objective, np.random.default_rng(0))
    winner = min(TrialLog(tmp_path / "trials.jsonl").trials, key=objective.rank)
    settled, gain = evaluator.settle(winner.policy, winner.drop)
    assert settled.measure(winner.policy, "selection").value == winner.quality
    assert np.array_equal(settled.scores(winner.policy, "selection"), by_hand(bench, winner.policy))
    assert gain.repair == f"finetune(steps={STEPS})"
    assert (gain.before, gain.after) == (untuned.measure(winner.policy, "selection").drop, winner.drop)


def test_the_store_keeps_finetuned_scores_apart(bench: Bench, tmp_path: Path, monkeypatch) -> None:
    bench.evaluator.store = EvaluationStore(tmp_path, bench.task)
    policy = policy_of(bench, "int2/uint4")
    untuned = bench.evaluator.scores(policy, "selection")
    found = TunedEvaluator(bench.evaluator, STEPS).scores(policy, "selection")
    assert not np.array_equal(found, untuned)
    assert not np.array_equal(TunedEvaluator(bench.evaluator, STEPS + 4).scores(policy, "selection"), found)
    again, made = TunedEvaluator(bench.evaluator, STEPS), []
    monkeypatch.setattr(tuned, "finetune", lambda *given, **options: made.append(given))
    assert np.array_equal(again.scores(policy, "selection"), found)
    assert not made, "what the store holds is not fine-tuned again"
    assert np.array_equal(bench.evaluator.scores(policy, "selection"), untuned)
