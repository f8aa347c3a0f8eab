"""Measured quality: paired drops, fidelity, and what is kept on disk."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Bench, TinyTask, make_bench
from torch import nn

from hwmodels import Precision
from search.errors import DataError
from search.policy import Policy
from search.quality import evaluate
from search.quality.evaluate import Evaluator, Quality, sample_scores
from search.quality.racing import Racing
from search.quantize.simulate import exact_inference
from search.tasks.function import FunctionTask
from search.tasks.task import Task


class Loss(TinyTask):
    """The same task judged by cross-entropy, where less is better."""

    metric, higher_is_better = "cross-entropy", False

    def score(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1], reduction="none")


class Perplexity(Loss):
    """A metric that is no mean."""

    metric = "perplexity"

    def reduce(self, scores):
        return float(np.exp(scores.mean()))


class Columns(TinyTask):
    """Returns a column of scores, which is wrong."""

    def score(self, outputs, batch):
        return super().score(outputs, batch)[:, None]


class Empty(TinyTask):
    def batches(self, split):
        return iter(()) if split == "selection" else super().batches(split)


def by_hand(bench: Bench, policy: Policy, count: int) -> np.ndarray:
    """Scores of the first samples of the selection split, all in one batch."""
    images, labels = bench.task._data["selection"]
    with exact_inference():
        outputs = bench.simulated.apply(policy)(images[:count])
        return bench.task.score(outputs, (images[:count], labels[:count])).double().numpy()


@pytest.mark.parametrize("task", [TinyTask(), Loss()], ids=["accuracy", "loss"])
@pytest.mark.parametrize(("fidelity", "count"), [(1.0, 120), (0.5, 80), (0.34, 80), (0.33, 40), (0.01, 40)])
def test_drop_is_paired_and_points_the_right_way(task: Task, fidelity: float, count: int) -> None:
    bench = make_bench(task)
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    quality = bench.evaluator.measure(policy, "selection", fidelity)
    scores, reference = by_hand(bench, policy, count), by_hand(bench, Policy({}), count)
    assert quality.samples == count, "whole batches of 40"
    assert quality.value == pytest.approx(scores.mean(), rel=1e-5)
    worse = reference.mean() - scores.mean() if task.higher_is_better else scores.mean() - reference.mean()
    assert quality.drop == pytest.approx(worse, rel=1e-5)
    assert quality.drop > 0, "two bits must hurt"
    assert quality.drop_low <= quality.drop <= quality.drop_high


@pytest.mark.parametrize("racing", [None, Racing(first=16)])
def test_a_metric_that_is_no_mean(racing: Racing | None) -> None:
    bench = make_bench(Perplexity())
    bench.evaluator.racing = racing
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    quality = bench.evaluator.race(policy, []).quality if racing else bench.evaluator.measure(policy, "selection")
    scores, reference = by_hand(bench, policy, 120), by_hand(bench, Policy({}), 120)
    assert quality.value == pytest.approx(math.exp(scores.mean()), rel=1e-5)
    assert quality.drop == pytest.approx(math.exp(scores.mean()) - math.exp(reference.mean()), rel=1e-5)
    assert bench.evaluator.float_quality("selection").value == pytest.approx(math.exp(reference.mean()), rel=1e-5)
    assert quality.drop_low < quality.drop < quality.drop_high


def test_the_float_network_does_not_drop(bench: Bench) -> None:
    quality = bench.evaluator.measure({}, "report")
    assert quality.drop == 0
    assert quality.value == bench.evaluator.float_quality("report").value
    assert bench.evaluator.float_quality("report") == Quality(quality.value, 120, 0.0, 0.0, 0.0)


def test_a_function_has_no_interval(bench: Bench) -> None:
    images, labels = bench.task._data["selection"]

    def evaluate(model: nn.Module, split: str) -> float:
        return float((model(images).argmax(-1) == labels).double().mean())

    task = FunctionTask(bench.task.model, images[:2], [images], evaluate, metric="accuracy")
    found = make_bench(task)
    policy = Policy.uniform(found.network, Precision.parse("int2/uint4"))
    quality = found.evaluator.measure(policy, "report")
    assert quality.samples == 1
    assert quality.drop == pytest.approx(evaluate(task.model, "") - quality.value)
    assert math.isnan(quality.drop_low)
    assert math.isnan(quality.drop_high)
    assert quality.to_dict()["drop_high"] is None
    again = Quality.from_dict(quality.to_dict())
    assert (again.value, again.drop, math.isnan(again.drop_low)) == (quality.value, quality.drop, True)


def test_trials_and_back(bench: Bench) -> None:
    quality = bench.evaluator.measure({}, "selection")
    row = quality.to_dict()
    assert Quality.of_trial({"quality": row.pop("value"), "predicted": 0.1, **row}) == quality


def test_float_scores_are_kept_on_disk(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = bench.evaluator.float_scores("selection")
    again = Evaluator(bench.task, bench.simulated, tmp_path)
    monkeypatch.setattr(evaluate, "sample_scores", lambda *_: pytest.fail("must not be measured again"))
    assert np.array_equal(again.float_scores("selection"), scores)
    assert again.float_quality("selection") == bench.evaluator.float_quality("selection")
    assert sorted(path.name for path in tmp_path.glob("float_*")) == ["float_selection.npy"]


def test_scores_are_repeatable_and_leave_no_gradients(bench: Bench) -> None:
    first, second = (sample_scores(bench.task, bench.simulated.model, "report") for _ in range(2))
    assert np.array_equal(first, second)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()


def test_another_network_is_held_against_the_same_float_network(bench: Bench, tmp_path: Path) -> None:
    """A repaired network is no reference, also where the float network was not measured before."""
    expected = bench.evaluator.float_scores("report")
    changed = make_bench(TinyTask(seed=1))
    start = Evaluator(bench.task, bench.simulated, None, Racing(first=8))
    other = start.of(changed.simulated)
    assert np.array_equal(other.float_scores("report"), expected)
    assert other.simulated is changed.simulated
    assert other.racing == Racing(first=8)
    assert start.float_scores("report") is other.float_scores("report")
    assert not np.array_equal(other.scores({}, "report"), expected)


def test_what_is_no_number_is_written_as_none() -> None:
    quality = Quality(math.inf, 3, math.nan, -math.inf, 0.5)
    assert quality.to_dict() == {"value": None, "samples": 3, "drop": None, "drop_low": None, "drop_high": 0.5}


def test_wrong_tasks_are_named() -> None:
    with pytest.raises(DataError, match=r"Columns.score returned shape \(40, 1\); it must return one value per sample"):
        make_bench(Columns()).evaluator.float_scores("selection")
    with pytest.raises(DataError, match="the selection split of task tiny is empty"):
        make_bench(Empty()).evaluator.float_scores("selection")
