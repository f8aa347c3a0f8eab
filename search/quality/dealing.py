"""Batches dealt out anew: which scores they give, which are still to be measured, and whether they stay the same.

A network hardly ever computes the very same bits for a sample in a batch of another size: kernels for a single row, or
for the last few rows of a batch, sum in another order, and a last bit is enough to round to another quantized value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search.quality.subsets import ShuffledSplit, sample_count, select
from search.quantize.simulate import exact_inference
from search.tasks.task import Task

LEAST = 8
"""Samples in the smallest batch that is made of what is left to measure: kernels for single rows are others."""

Piece = tuple[Any, np.ndarray]  # a batch, and the places of its scores among those of the whole split


def pieces_of(split: ShuffledSplit) -> list[list[Piece]]:
    """Returns every batch of a shuffled split with the places of its scores, subset by subset."""
    ends = iter(np.cumsum(np.diff([*split.starts, len(split.order)])))
    each = len(split.order) // len(split.starts)
    found, begin = [], 0
    for subset in split.subsets:
        if split.unit == "sample":
            stops = np.cumsum([(sample_count(batch) or 0) * each for batch in subset.batches])
        else:
            stops = np.array([next(ends) for _ in subset.batches]) - begin
        found.append(list(zip(subset.batches, np.split(subset.places, stops[:-1]), strict=True)))
        begin += len(subset.places)
    return found


def rest_of(piece: Piece, measured: np.ndarray) -> Piece:
    """Returns the samples of a batch that were not measured yet, as a batch, filled up to `LEAST` from those that were.

    Args:
        piece: The batch. Where some of it was measured, samples of its split can be dealt out.
        measured: Which scores of the whole split were measured.
    """
    batch, places = piece
    if not measured[places].any():
        return piece
    by_sample = places.reshape(sample_count(batch) or 1, -1)
    is_known = measured[by_sample].all(1)
    rows = np.sort(np.argsort(is_known, kind="stable")[: max((~is_known).sum(), LEAST)])
    return select([batch], [torch.from_numpy(rows)]), by_sample[rows].ravel()


def dealing_keeps_bits(task: Task, model: nn.Module, batches: list[Any], split: ShuffledSplit) -> bool:
    """Whether samples keep outputs and scores to the last bit when they are dealt into other batches.

    Tried on samples of the first two batches, in random batches as small and as large as there will be.

    Args:
        task: The task.
        model: Its network.
        batches: A split.
        split: The same, dealt out sample by sample.
    """
    tried = batches[:2]
    rows = [sample_count(batch) or 0 for batch in tried]
    before = [_answers(task, model, batch) for batch in tried]
    if [len(answers) for answers in before] != rows or len({answers.shape[1] for answers in before}) > 1:
        return False
    own, order = np.concatenate(before), np.random.default_rng(0).permutation(sum(rows))
    dealt = [sample_count(batch) or 0 for subset in split.subsets for batch in subset.batches]
    for size in {LEAST, min(dealt), max(dealt)}:
        taken = np.sort(order[:size])
        parts = [taken[taken < rows[0]], taken[taken >= rows[0]] - rows[0]][: len(tried)]
        answers = _answers(task, model, select(tried, [torch.from_numpy(part) for part in parts]))
        if not np.array_equal(answers, own[taken]):
            return False
    return True


def _answers(task: Task, model: nn.Module, batch: Any) -> np.ndarray:
    """The bits of a batch's outputs and scores, shape `(samples, bytes)`; without rows where they are not by sample."""
    rows = sample_count(batch) or 0
    with exact_inference():
        outputs = task.outputs(model, batch)
        found = (outputs, task.score(outputs, batch))
        if any(tensor.numel() % rows for tensor in found):
            return np.empty((0, 0), dtype=np.uint8)
        return np.concatenate([bits(tensor.reshape(rows, -1)) for tensor in found], 1)


def bits(rows: Tensor) -> np.ndarray:
    """The bytes of a tensor's rows, shape `(rows, bytes)`."""
    found: np.ndarray = rows.detach().cpu().contiguous().view(torch.uint8).numpy()
    return found
