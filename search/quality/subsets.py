"""A split in one random order, cut into growing subsets: what races are run on.

Samples lie along the first axis of every tensor of a batch. Where that does not hold, as with batches padded to
different lengths or tensors that all samples share, whole batches are dealt out instead: nothing gets wrong, races only
end later.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from search.tasks.task import tensors_in

AGREEMENT = 0.99
"""Share of the scores that must stay what they were when samples are dealt out anew."""

CLOSENESS = 0.02
"""How close is the same score; other batches are summed in another order, which 16-bit floats show."""


@dataclass(frozen=True)
class Subset:
    """The part of a split that comes next.

    Attributes:
        batches: Its samples, as the task takes them.
        places: Where each of their scores belongs among the scores of the whole split, shape `(scores,)`.
    """

    batches: tuple[Any, ...]
    places: np.ndarray


@dataclass(frozen=True)
class ShuffledSplit:
    """A split in random order.

    Attributes:
        unit: What was shuffled: every `sample`, or every `batch` as a whole.
        subsets: Its parts; the first ones together are the nested subsets that a race looks at.
        order: The places of all scores in random order, shape `(scores,)`, those of one unit side by side.
        starts: Where each unit begins in `order`, shape `(units,)`.
    """

    unit: Literal["sample", "batch"]
    subsets: tuple[Subset, ...]
    order: np.ndarray
    starts: np.ndarray

    def unit_values(self, values: np.ndarray) -> np.ndarray:
        """Sums values by unit, scaled so that the mean over all units is the mean over all values.

        Args:
            values: Values of the scores dealt so far, in random order, ending with a whole unit, shape `(..., scores)`.
        """
        sums: np.ndarray = np.add.reduceat(values, self.starts[self.starts < values.shape[-1]], axis=-1)
        return sums * (len(self.starts) / len(self.order))

    @property
    def largest_unit(self) -> float:
        """The value of the largest unit if each of its scores is 1."""
        return float(self.unit_values(np.ones(len(self.order))).max())


def shuffle_split(
    batches: Sequence[Any],
    score: Callable[[Any], np.ndarray],
    scores: int,
    looks: Callable[[int], Sequence[int]],
    seed: int,
) -> ShuffledSplit:
    """Deals a split out in random order.

    Samples are dealt out one by one where they can be; a probe shows whether scores stay what they were. Where a sample
    has several scores, such as one per token, they stay together.

    Args:
        batches: The split.
        score: Scores of some network on a batch, shape `(scores,)`; called on a few batches, where whole batches are
            dealt out on all of them.
        scores: How many scores the whole split has.
        looks: From a number of units to how many of them each of the nested subsets has, rising, all of them last.
        seed: Seed of the order.
    """
    rng = np.random.default_rng(seed)
    rows = [sample_count(batch) or 0 for batch in batches]
    each, rest = divmod(scores, max(sum(rows), 1))
    if min(rows) and not rest and is_regular(batches) and _can_be_dealt(batches[:2], score, each):
        return _by_sample(batches, rng.permutation(sum(rows)), each, looks(sum(rows)))
    counts = np.array([len(score(batch)) for batch in batches])
    return _by_batch(batches, rng.permutation(len(batches)), counts, looks(len(batches)))


def _can_be_dealt(batches: Sequence[Any], score: Callable[[Any], np.ndarray], each: int) -> bool:
    """Whether samples of these batches, dealt into batches made anew, have the scores they had."""
    before = np.concatenate([score(batch) for batch in batches])
    order = np.random.default_rng(0).permutation(sum(sample_count(batch) or 0 for batch in batches))
    (dealt,) = _by_sample(batches, order, each, [len(order)]).subsets
    after = np.concatenate([score(batch) for batch in dealt.batches])
    if not len(before) == len(after) == len(dealt.places):
        return False
    return bool(np.isclose(after, before[dealt.places], CLOSENESS, CLOSENESS).mean() >= AGREEMENT)


def sample_count(batch: Any) -> int | None:
    """The number of samples of a batch; None where its tensors have no common first axis."""
    sizes = {len(tensor) if tensor.dim() else 0 for tensor in tensors_in(batch)}
    return sizes.pop() or None if len(sizes) == 1 else None


def is_regular(batches: Sequence[Any]) -> bool:
    """Whether batches are built alike from tensors, so that samples can move from one to another."""
    return all(map(_is_plain, batches)) and len({str(_signature(batch)) for batch in batches}) == 1


def select(batches: Sequence[Any], rows: Sequence[Tensor]) -> Any:
    """Makes one batch of some samples of several.

    Args:
        batches: Nested tuples, lists and mappings of tensors, regular.
        rows: Per batch, the indices of the samples to take.
    """
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat([batch[row.to(batch.device)] for batch, row in zip(batches, rows, strict=True)])
    if isinstance(first, MutableMapping):
        made = copy.copy(first)
        for key in first:
            made[key] = select([batch[key] for batch in batches], rows)
        return made
    if isinstance(first, (tuple, list)):
        items = [select(parts, rows) for parts in zip(*batches, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first


def _is_plain(value: Any) -> bool:
    """Whether `select` knows what to do: no other objects, and no lists without tensors, as of names."""
    if isinstance(value, MutableMapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list)):
        return bool(tensors_in(value)) and all(map(_is_plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def _signature(value: Any) -> Any:
    """What must be equal for two batches to be regular: types, keys, shapes but for the first axis, plain entries."""
    if isinstance(value, Tensor):
        return ("tensor", value.dtype, value.shape[1:])
    if isinstance(value, MutableMapping):
        return (type(value), {key: _signature(item) for key, item in value.items()})
    if isinstance(value, (tuple, list)):
        return (type(value), [_signature(item) for item in value])
    return repr(value)


def _by_sample(batches: Sequence[Any], order: np.ndarray, each: int, looks: Sequence[int]) -> ShuffledSplit:
    """Deals samples out, each with `each` scores, in batches no larger than the split's own."""
    rows = np.array([sample_count(batch) for batch in batches])
    ends = rows.cumsum()
    subsets = []
    for start, end in zip((0, *looks), looks, strict=False):
        parts = np.array_split(order[start:end], -(-(end - start) // rows.max()))
        made = []
        for part in map(np.sort, parts):
            owners = np.searchsorted(ends, part, side="right")
            local = part - (ends - rows)[owners]
            made.append(select(batches, [torch.from_numpy(local[owners == i]) for i in range(len(batches))]))
        subsets.append(Subset(tuple(made), _places(np.concatenate([*map(np.sort, parts)]), each)))
    return ShuffledSplit("sample", tuple(subsets), _places(order, each), np.arange(len(order)) * each)


def _places(samples: np.ndarray, each: int) -> np.ndarray:
    places: np.ndarray = (samples[:, np.newaxis] * each + np.arange(each)).ravel()
    return places


def _by_batch(batches: Sequence[Any], order: np.ndarray, counts: np.ndarray, looks: Sequence[int]) -> ShuffledSplit:
    """Deals whole batches out, `counts[i]` scores in batch i."""
    begins = counts.cumsum() - counts
    places = [np.arange(begins[index], begins[index] + counts[index]) for index in order]
    subsets = [
        Subset(tuple(batches[index] for index in order[start:end]), np.concatenate(places[start:end]))
        for start, end in zip((0, *looks), looks, strict=False)
    ]
    starts = counts[order].cumsum() - counts[order]
    return ShuffledSplit("batch", tuple(subsets), np.concatenate(places), starts)
