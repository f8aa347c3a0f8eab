"""Intervals of paired drops against worked numbers, scipy and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from search.quality.interval import drop_interval, drop_of_shift, paired_interval, shift_of_drop, worse_by
from search.tasks.task import Task


def outcomes(up: int, down: int, same: int) -> np.ndarray:
    return np.array([1.0] * up + [-1.0] * down + [0.0] * same)


def test_agresti_min_by_hand() -> None:
    # n = 100, b = 12, c = 4: p = (12.5 - 4.5) / 102 = 0.078431; variance (17 - 64 / 102) / 102^2 = 0.00157368
    mean, low, high = paired_interval(outcomes(12, 4, 84))
    assert mean == pytest.approx(0.08)
    assert low == pytest.approx(0.0784314 - 1.959964 * 0.0396697, abs=1e-6)
    assert high == pytest.approx(0.0784314 + 1.959964 * 0.0396697, abs=1e-6)


def test_nothing_changed_still_leaves_doubt() -> None:
    mean, low, high = paired_interval(np.zeros(350))
    assert mean == 0
    assert high == -low == pytest.approx(1.959964 / 352, rel=1e-6)


def test_one_sided_interval_holds_the_mean() -> None:
    mean, low, high = paired_interval(outcomes(5, 0, 0))
    assert mean == high == 1.0
    assert low < 1


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=40))
def test_other_scores_get_students_t(differences: list[float]) -> None:
    values = np.array([*differences, 0.5, 0.25])
    mean, low, high = paired_interval(values)
    expected = stats.ttest_rel(values, np.zeros(len(values))).confidence_interval(0.95)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert low <= mean <= high


def test_students_t_against_scipys_interval() -> None:
    values = np.random.default_rng(0).normal(0.3, 2, 25)
    expected = stats.t.interval(0.95, 24, loc=values.mean(), scale=stats.sem(values))
    assert paired_interval(values)[1:] == pytest.approx(expected)


def test_a_single_sample_says_nothing() -> None:
    assert paired_interval(np.array([0.3])) == (0.3, -math.inf, math.inf)


@pytest.mark.parametrize(("up", "down"), [(0.02, 0.01), (0.05, 0.05), (0.2, 0.02)])
def test_coverage_of_right_or_wrong_scores(up: float, down: float) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(2000):
        draw = rng.choice([1.0, -1.0, 0.0], 350, p=[up, down, 1 - up - down])
        _, low, high = paired_interval(draw)
        covered += low <= up - down <= high
    assert 0.93 <= covered / 2000 <= 0.99


def test_coverage_of_other_scores() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        _, low, high = paired_interval(rng.exponential(1.0, 200))
        covered += low <= 1 <= high
    assert covered / 1000 >= 0.93


class Accuracy(Task):
    """Scores are what the metric is the mean of."""

    def batches(self, split):
        return iter(())

    def score(self, outputs, batch):
        return outputs


class Perplexity(Accuracy):
    """Lower is better, and so are the scores: negative log-likelihoods in nats."""

    higher_is_better = False

    def reduce(self, scores: np.ndarray) -> float:
        return float(np.exp(scores.mean()))


class Saturating(Accuracy):
    """A metric that cannot get below 0."""

    def reduce(self, scores: np.ndarray) -> float:
        return max(float(scores.mean()), 0.0)


def pairs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.gamma(2.0, 1.0, 200)
    return reference + rng.normal(0.05, 0.1, 200), reference


def test_the_drop_of_a_mean_is_the_paired_interval() -> None:
    scores, reference = pairs()
    assert drop_interval(Accuracy(), scores, reference) == pytest.approx(paired_interval(reference - scores))
    right, other = np.array([1.0, 0, 1, 1]), np.array([1.0, 1, 0, 1])
    assert drop_interval(Accuracy(), right, other) == pytest.approx(paired_interval(other - right))


def test_the_drop_of_perplexity_by_hand() -> None:
    """exp(mean) worsens by the factor exp(d): the interval of d, seen through that."""
    scores, reference = pairs()
    mean, low, high = paired_interval(scores - reference)
    expected = [math.exp(reference.mean()) * math.expm1(shift) for shift in (mean, low, high)]
    assert drop_interval(Perplexity(), scores, reference) == pytest.approx(expected)
    assert expected[0] > 0, "worse is positive"
    given = drop_interval(Perplexity(), scores, reference, (0.0, 0.2))
    assert given[1:] == pytest.approx((0.0, math.exp(reference.mean()) * math.expm1(0.2)))


def test_a_given_interval_is_widened_to_hold_the_drop() -> None:
    scores, reference = pairs()
    found, low, high = drop_interval(Accuracy(), scores, reference, (1.0, 2.0))
    assert low == found < high


@pytest.mark.parametrize("task", [Accuracy(), Perplexity()])
@given(st.floats(1e-4, 5.0))
def test_shifts_and_drops_are_inverse(task: Task, wanted: float) -> None:
    _, reference = pairs()
    shift = shift_of_drop(task, reference, wanted)
    assert drop_of_shift(task, reference, shift) == pytest.approx(wanted)
    assert shift_of_drop(task, reference, 0.0) == 0
    worse = reference - shift if task.higher_is_better else reference + shift
    assert worse_by(task, worse, reference) == pytest.approx(np.full(200, shift))


def test_a_drop_that_cannot_be_takes_a_shift_without_end() -> None:
    assert shift_of_drop(Saturating(), np.full(5, 0.5), 0.9) > 1e9


def test_coverage_of_a_metric_that_is_no_mean() -> None:
    """The reference is taken as measured: the interval is about what the policy does to it."""
    task, covered = Perplexity(), 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        reference = rng.gamma(2.0, 1.0, 150)
        _, low, high = drop_interval(task, reference + rng.normal(0.1, 0.3, 150), reference)
        covered += low <= drop_of_shift(task, reference, 0.1) <= high
    assert 0.92 <= covered / 400 <= 0.98
