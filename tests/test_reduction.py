"""What is kept of large outputs: which of it is exact, and what it bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_tangent import Own, squared_error_task
from tiny import TinyTask
from torch import Tensor
from torch.nn import functional as F

from search.errors import DataError
from search.sensitivity.reduction import Extent, choose_rows, extent_of, quotas, shared_width, targets_of
from search.tasks.task import Task
from search.tasks.text import Text

CLASSES = 40


def log_softmax(rows: Tensor) -> Tensor:
    return rows.double().log_softmax(-1)


def divergence(reference: Tensor, outputs: Tensor) -> Tensor:
    p, q = log_softmax(reference), log_softmax(outputs)
    return (p.exp() * (p - q)).sum(-1)


def logits(*shape: int) -> tuple[Tensor, Tensor]:
    """A reference and outputs near it."""
    reference = 2 * torch.randn(*shape)
    return reference, reference + 0.3 * torch.randn(shape)


def test_small_outputs_are_kept_as_they_are() -> None:
    reference, outputs = logits(6, 5)
    labels = torch.randint(5, (6,))
    rows = choose_rows(TinyTask(), (None, labels), reference, 6)
    assert rows.is_complete
    assert not rows.has_rest
    assert torch.equal(rows(outputs), outputs)
    assert torch.equal(rows.targets, labels)
    assert rows.samples.tolist() == list(range(6))


def test_many_classes_keep_the_target_the_best_and_the_rest() -> None:
    reference, outputs = logits(30, CLASSES)
    labels = torch.randint(CLASSES, (30,))
    rows = choose_rows(TinyTask(), (None, labels), reference, 30, outputs=8)
    assert rows.has_rest
    assert not rows.is_complete
    assert rows.targets.eq(0).all()
    assert torch.equal(rows.classes[:, 0], labels)
    assert all(len(set(classes.tolist())) == 7 for classes in rows.classes)
    top = reference.topk(7).indices
    for classes, best in zip(rows.classes.tolist(), top.tolist(), strict=True):
        assert set(best[:6]) <= set(classes)

    kept, exact = rows(outputs), log_softmax(outputs)
    assert kept.shape == (30, 8)
    assert torch.equal(kept[:, :-1], outputs.gather(1, rows.classes)), "logits"
    assert torch.allclose(log_softmax(kept)[:, :-1], exact.gather(1, rows.classes), atol=1e-6), "probabilities"
    nats = F.cross_entropy(outputs.double(), labels)
    assert F.cross_entropy(kept.double(), rows.targets) == pytest.approx(float(nats), abs=1e-6)


def test_divergence_of_what_is_kept_bounds_the_true_one() -> None:
    reference, outputs = logits(30, CLASSES)
    true, before = divergence(reference, outputs), 0.0
    for width in (2, 4, 8, 16, 32, CLASSES):
        rows = choose_rows(TinyTask(), None, reference, 30, outputs=width)
        found = divergence(rows(reference), rows(outputs))
        assert (found <= true + 1e-6).all()
        assert found.mean() >= before - 1e-6, "more is never less"
        before = found.mean()
    assert torch.allclose(found, true, atol=1e-6)


def test_rows_of_sequences() -> None:
    reference, outputs = logits(4, 10, CLASSES)
    text = Text(context=10)
    tokens = torch.randint(CLASSES, (4, 10))
    every = choose_rows(text, tokens, reference, 36, outputs=CLASSES)
    assert every.rows.tolist() == [n for n in range(40) if n % 10 != 9], "the last predicts nothing"
    assert torch.equal(every.targets.view(4, 9), tokens[:, 1:])
    assert every.samples.tolist() == [n for n in range(4) for _ in range(9)]
    assert float(F.cross_entropy(every(outputs), every.targets)) == pytest.approx(
        float(text.score(outputs, tokens).mean()), rel=1e-6
    )
    some = choose_rows(text, tokens, reference, 12, outputs=8, seed=(0, 3))
    assert some(outputs).shape == (12, 8)
    assert set(some.rows.tolist()) < set(every.rows.tolist())
    assert torch.equal(some.samples, some.rows // 10)
    assert torch.equal(some.rows, choose_rows(text, tokens, reference, 12, outputs=8, seed=(0, 3)).rows)
    assert not torch.equal(some.rows, choose_rows(text, tokens, reference, 12, outputs=8, seed=(0, 4)).rows)


def test_targets_that_are_no_class_leave_rows_out() -> None:
    reference, _ = logits(5, 6)
    rows = choose_rows(TinyTask(), (None, torch.tensor([0, -100, 5, 6, 2])), reference, 5)
    assert rows.rows.tolist() == [0, 2, 4]
    assert rows.targets.tolist() == [0, 5, 2]
    assert not rows.is_complete


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(5, 3), (torch.zeros(5, 3), torch.rand(5)), (torch.zeros(5), torch.zeros(5, 2, dtype=torch.long)), {}],
)
def test_without_labels_the_float_model_says_what_is_right(batch) -> None:
    reference, _ = logits(5, 6)
    assert torch.equal(targets_of(TinyTask(), batch, reference), reference.argmax(1))


def test_labels_of_any_integer_type_and_shape() -> None:
    labels = torch.randint(6, (5, 2, 3), dtype=torch.uint8)
    assert torch.equal(targets_of(TinyTask(), (None, labels), torch.randn(5, 2, 3, 6)), labels.flatten().long())


@pytest.mark.parametrize("task", [Own(), squared_error_task()], ids=["own divergence", "squared error"])
def test_outputs_that_are_no_logits_keep_the_same_places(task: Task) -> None:
    outputs = torch.randn(9, 4, 10)
    rows = choose_rows(task, None, outputs, 6, outputs=12, seed=(0, 0))
    other = choose_rows(task, None, torch.randn(9, 4, 10), 6, outputs=12, seed=(0, 1))
    assert rows.targets is None
    assert not rows.has_rest
    assert torch.equal(rows.classes, other.classes)
    assert not torch.equal(rows.rows, other.rows)
    assert torch.equal(rows(outputs), outputs.flatten(1)[rows.rows][:, rows.classes])
    assert choose_rows(task, None, outputs, 9, outputs=40).is_complete


def test_outputs_of_one_number_a_sample() -> None:
    rows = choose_rows(squared_error_task(), None, torch.randn(9), 9, outputs=1)
    assert rows(torch.arange(9.0)).shape == (9, 1)


def test_quotas_share_what_is_allowed() -> None:
    extents = [Extent((40, 10, 100), 360, True), Extent((40, 10, 100), 360, True), Extent((7, 10, 100), 63, True)]
    assert shared_width(extents, 64) == 64
    assert shared_width(extents, 500) == 100
    assert sum(quotas(extents, 64, 64 * 100)) == 100
    assert quotas(extents, 64, 64 * 100) == [45, 46, 9]
    assert quotas(extents, 64, 10**6) == [360, 360, 63]
    assert sum(quotas(extents, 64, 1)) == 1


def test_no_row_has_a_target() -> None:
    extent = extent_of(TinyTask(), (None, torch.full((5,), -100)), torch.randn(5, 6))
    assert extent.rows == 0
    with pytest.raises(DataError, match=r"let `Task.targets` return such"):
        quotas([extent], 6)


def test_bfloat16_is_kept_in_float32() -> None:
    outputs = torch.randn(3, CLASSES, dtype=torch.bfloat16)
    rows = choose_rows(TinyTask(), None, outputs, 3, outputs=8)
    assert rows(outputs).dtype == torch.float32
    assert np.isfinite(rows(outputs).numpy()).all()
