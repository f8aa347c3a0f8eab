"""Gram matrices: sums over shards, positive semidefinite, scaled to what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.errors import DataError
from search.sensitivity.gram import Gram, merge_grams, scaled


def features(seed: int, choices: int = 7, samples: int = 5) -> np.ndarray:
    """Features of choices of very different sizes, one of them zero."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(choices, samples)) * 10.0 ** rng.uniform(-6, 3, (choices, 1))
    found[2] = 0
    return found


def is_semidefinite(form: np.ndarray) -> bool:
    """Whether it is so up to rounding, with every row in units of its own."""
    size = np.sqrt(np.maximum(np.diag(form), 1e-300))
    return bool(np.array_equal(form, form.T) and np.linalg.eigvalsh(form / size / size[:, None]).min() > -1e-9)


def test_products_are_summed_over_samples() -> None:
    rows = features(0)
    gram = Gram.of(rows, 5)
    for i in range(7):
        for j in range(7):
            assert gram.mean[i, j] == pytest.approx(sum(rows[i, n] * rows[j, n] for n in range(5)) / 5, rel=1e-12)


def test_shards_add_up() -> None:
    rows = features(1)
    parts = [Gram.of(rows[:, part], rows[:, part].shape[1]) for part in (slice(0, 2), slice(2, 3), slice(3, 5))]
    merged = merge_grams(parts)
    assert merged.count == 5
    assert merged.total == pytest.approx(Gram.of(rows, 5).total, rel=1e-12)
    assert (parts[0] + Gram.empty(7)).total.tolist() == parts[0].total.tolist()


def test_nothing_to_add_up() -> None:
    with pytest.raises(DataError, match="at least one shard"):
        merge_grams([])
    with pytest.raises(DataError, match="at least one"):
        _ = Gram.empty(3).mean


@given(st.integers(0, 2**32 - 1))
def test_scaling_keeps_what_it_must(seed: int) -> None:
    rng = np.random.default_rng(seed)
    form = Gram.of(features(seed), 5).mean
    divergences = 10.0 ** rng.uniform(-8, 1, 7)
    divergences[rng.integers(7)] = 0
    found = scaled(form, divergences)
    assert is_semidefinite(form)
    assert is_semidefinite(found)
    assert np.diag(found).tolist() == (2 * divergences).tolist()
    assert not found[2, [0, 1, 3, 4, 5, 6]].any(), "no interaction where the diagonal is zero"
    for i, j in ((0, 1), (3, 5), (6, 4)):
        expected = form[i, j] * np.sqrt(4 * divergences[i] * divergences[j] / (form[i, i] * form[j, j]))
        assert found[i, j] == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_scaling_to_its_own_diagonal_changes_nothing() -> None:
    form = Gram.of(features(3), 5).mean
    assert scaled(form, np.diag(form) / 2) == pytest.approx(form, rel=1e-12)


@pytest.mark.parametrize("wrong", [-1e-3, np.nan, np.inf])
def test_divergences_that_are_none(wrong: float) -> None:
    with pytest.raises(DataError, match="finite divergences of at least 0"):
        scaled(np.eye(2), np.array([1.0, wrong]))
