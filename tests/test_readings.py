from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, rel_entr, softmax
from torch.nn import functional as F

from search.solve.readings import (
    NAMES,
    Name,
    cross_entropy,
    divergence_to,
    error,
    margin_error,
    reading,
    squared,
)

READINGS = {f.__name__: f for f in (margin_error, cross_entropy, error, divergence_to, squared)}


def drawn(seed: int, policies: int = 3, rows: int = 40, count: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs of some policies, targets that are mostly met, reference outputs."""
    rng = np.random.default_rng(seed)
    reference = 3 * rng.normal(size=(rows, count))
    targets = np.where(rng.random(rows) < 0.8, reference.argmax(1), rng.integers(0, count, rows))
    return reference + rng.normal(size=(policies, rows, count)), targets, reference


def against(name: Name, targets: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return reference if name in ("divergence_to", "squared") else targets


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_cross_entropy_and_error_are_those_of_torch(seed: int, count: int) -> None:
    outputs, targets, _ = drawn(seed, count=count)
    labels = torch.tensor(targets)
    for policy, nats, wrong in zip(outputs, cross_entropy(outputs, targets), error(outputs, targets), strict=True):
        logits = torch.tensor(policy)
        assert nats == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-12)
        assert wrong == (logits.argmax(1) != labels).double().mean().item()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12))
def test_divergence_and_squared_are_those_of_scipy_and_torch(seed: int, count: int) -> None:
    outputs, _, reference = drawn(seed, count=count)
    expected = rel_entr(softmax(reference, -1), softmax(outputs, -1)).sum(-1).mean(-1)
    np.testing.assert_allclose(divergence_to(outputs, reference), expected, rtol=1e-10)
    mse = [F.mse_loss(torch.tensor(policy), torch.tensor(reference)).item() for policy in outputs]
    np.testing.assert_allclose(squared(outputs, reference), mse, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 3))
def test_margin_error_is_its_formula(seed: int, temperature: float) -> None:
    outputs, targets, _ = drawn(seed)
    for policy, found in zip(outputs, margin_error(outputs, targets, temperature), strict=True):
        margins = np.array([z[y] - np.delete(z, y).max() for z, y in zip(policy, targets, strict=True)])
        spread = np.sqrt(policy.var(axis=1).mean())
        expected = expit(-margins / (temperature * spread)).mean()
        assert found == pytest.approx(expected, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_margin_error_ignores_scale_and_shifts_of_rows(seed: int, factor: float) -> None:
    outputs, targets, _ = drawn(seed)
    shifts = np.random.default_rng(seed).normal(size=(outputs.shape[1], 1))
    np.testing.assert_allclose(
        margin_error(factor * outputs + shifts, targets), margin_error(outputs, targets), rtol=1e-9
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_margin_error_falls_as_margins_rise_at_a_fixed_spread(seed: int) -> None:
    rng = np.random.default_rng(seed)
    margins = rng.normal(size=20)
    margins[:2] = -0.5, 0.5
    righted, risen = margins.copy(), margins.copy()
    righted[0] = 0.5  # one wrong row is right by as much
    risen[:2] = -0.3, np.sqrt(0.5**2 + 0.5**2 - 0.3**2)  # both margins rise, the outputs' spread stays
    targets = np.zeros(20, dtype=int)

    def of(values: np.ndarray) -> float:
        return float(margin_error(np.stack([values, np.zeros(20)], axis=-1), targets))

    assert of(righted) < of(margins)
    assert of(risen) < of(margins)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_cold_margin_error_is_the_error(seed: int) -> None:
    outputs, targets, _ = drawn(seed)
    np.testing.assert_allclose(margin_error(outputs, targets, 1e-9), error(outputs, targets), atol=1e-6)
    warm = margin_error(outputs, targets, 1e9)
    np.testing.assert_allclose(warm, 0.5, atol=1e-6)


def test_margin_error_of_equal_outputs_is_a_half() -> None:
    assert margin_error(np.zeros((5, 3), np.float32), np.zeros(5, dtype=int)) == 0.5
    assert error(np.zeros((5, 3)), np.zeros(5, dtype=int)) == 1.0, "a tie counts as wrong"


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_readings_take_any_leading_axes_and_float32(name: Name, seed: int) -> None:
    outputs, targets, reference = drawn(seed, policies=6)
    compared = against(name, targets, reference)
    expected = [READINGS[name](policy, compared) for policy in outputs]
    np.testing.assert_allclose(READINGS[name](outputs.reshape(2, 3, 40, 6), compared).ravel(), expected, rtol=1e-12)
    single = READINGS[name](outputs.astype(np.float32), compared)
    np.testing.assert_allclose(single, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_coordinates_are_linear(name: Name, seed: int) -> None:
    outputs, targets, reference = drawn(seed)
    read = reading(name, against(name, targets, reference))
    first, second, third = read.coordinates(outputs)
    together = read.coordinates(outputs[0] - 2 * outputs[1] + outputs[2])
    np.testing.assert_allclose(together, first - 2 * second + third, atol=1e-12)
    assert together.shape[-1] == 40
    assert together.flags.c_contiguous


def test_large_outputs_stay_finite() -> None:
    outputs = np.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], np.float32)
    assert cross_entropy(outputs, np.array([0, 0])) == pytest.approx(1e4)
    assert divergence_to(outputs, outputs) == 0.0
    assert divergence_to(outputs, outputs[::-1]) == pytest.approx(2e4)


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        ("accuracy", np.zeros(4, dtype=int), "no reading 'accuracy'; there are margin_error"),
        ("error", np.zeros((4, 3)), "one integer target per row"),
        ("cross_entropy", np.zeros(4), "integer target"),
        ("squared", np.zeros(4, dtype=int), "reference outputs"),
    ],
)
def test_what_does_not_fit_is_refused(name: Name, targets: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reading(name, targets)


def test_targets_and_outputs_must_match() -> None:
    with pytest.raises(ValueError, match="5 rows, but there are 4 targets"):
        error(np.zeros((5, 3)), np.zeros(4, dtype=int))
    with pytest.raises(ValueError, match="indices of at least two outputs"):
        error(np.zeros((4, 3)), np.full(4, 3))
    with pytest.raises(ValueError, match="do not fit reference"):
        squared(np.zeros((5, 3)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="temperature"):
        margin_error(np.zeros((4, 3)), np.zeros(4, dtype=int), 0.0)
