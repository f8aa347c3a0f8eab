"""Splits dealt out in random order: every sample once, whatever batches are made of."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from search.quality.subsets import ShuffledSplit, sample_count, select, shuffle_split

Pair = namedtuple("Pair", "x y")
SIZES = (7, 7, 3)
TOTAL = sum(SIZES)


class Ragged:
    """A batch of a kind nobody knows."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def data(kind: str) -> tuple[list[Any], Any]:
    """Batches of samples that know their number, and what reads the numbers from a batch."""
    parts = torch.arange(TOTAL).split(SIZES)
    make, read = {
        "tensor": (lambda x: x, lambda batch: batch),
        "tuple": (lambda x: (torch.stack([x, -x], 1), x), lambda batch: batch[1]),
        "list": (lambda x: [x, x.half()], lambda batch: batch[0]),
        "dict": (lambda x: {"ids": x, "mask": torch.ones(len(x), 2), "pad": 0}, lambda batch: batch["ids"]),
        "nested": (lambda x: (OrderedDict(a=(x, None)), [x]), lambda batch: batch[0]["a"][0]),
        "namedtuple": (lambda x: Pair(x, x * 2.0), lambda batch: batch.x),
        "object": (Ragged, lambda batch: batch.x),
        "strings": (lambda x: (x, [str(int(v)) for v in x]), lambda batch: torch.tensor([int(v) for v in batch[1]])),
        "scalar": (lambda x: (x, torch.tensor(1.0)), lambda batch: batch[0]),
        "padded": (lambda x: torch.nn.functional.pad(x[:, None], (0, len(x))), lambda batch: batch[:, 0]),
    }[kind]
    return [make(part) for part in parts], read


def shuffled(batches: list[Any], read: Any, seed: int = 0, each: int = 1) -> ShuffledSplit:
    def looks(units: int) -> list[int]:
        return [units // 3, units // 2, units] if units > 3 else list(range(1, units + 1))

    def score(batch: Any) -> np.ndarray:
        return np.repeat(read(batch).double().numpy(), each)

    return shuffle_split(batches, score, TOTAL * each, looks, seed)


def check(split: ShuffledSplit, read: Any, each: int = 1) -> None:
    """Every sample is in one subset, in the place that it has in the split, and subsets follow the random order."""
    found = np.full(TOTAL * each, -1.0)
    done = 0
    for subset in split.subsets:
        scores = np.concatenate([np.repeat(read(batch).numpy(), each) for batch in subset.batches])
        found[subset.places] = scores
        assert max(len(read(batch)) for batch in subset.batches) <= max(SIZES)
        done += len(scores)
        assert set(split.order[:done]) == set(np.flatnonzero(found >= 0))
    assert np.array_equal(found, np.repeat(np.arange(TOTAL), each))
    assert sorted(split.order) == list(range(TOTAL * each))


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict", "nested", "namedtuple"])
def test_samples_are_dealt_out_one_by_one(kind: str) -> None:
    batches, read = data(kind)
    split = shuffled(batches, read)
    assert split.unit == "sample"
    assert [len(subset.places) for subset in split.subsets] == [5, 3, 9]
    check(split, read)
    assert type(split.subsets[0].batches[0]) is type(batches[0])
    assert np.array_equal(split.unit_values(np.arange(TOTAL)), np.arange(TOTAL))


@pytest.mark.parametrize("kind", ["object", "strings", "scalar", "padded"])
def test_batches_that_cannot_be_taken_apart_are_dealt_out_whole(kind: str) -> None:
    batches, read = data(kind)
    split = shuffled(batches, read)
    assert split.unit == "batch"
    assert len(split.subsets) == 3
    check(split, read)
    values = np.arange(TOTAL)[split.order] ** 2.0
    assert split.unit_values(values).mean() == pytest.approx((np.arange(TOTAL) ** 2).mean()), "whatever their sizes"
    assert split.largest_unit == pytest.approx(7 * 3 / TOTAL)


def test_samples_along_another_axis_are_noticed() -> None:
    """Steps first, samples second: a batch can be cut along its steps, but scores say that it must not be."""
    batches = [torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    def score(batch: Tensor) -> np.ndarray:
        return (batch[0] - batch[-1]).double().numpy()

    assert shuffle_split(batches, score, 16, lambda units: [units], 0).unit == "batch"
    same_length = [torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    assert shuffle_split(same_length, score, 16, lambda units: [units], 0).unit == "batch"


def test_scores_of_one_sample_stay_together() -> None:
    batches, read = data("tuple")
    split = shuffled(batches, read, each=3)
    assert split.unit == "sample"
    check(split, read, each=3)
    values = np.arange(3.0 * TOTAL)[split.order]
    assert np.array_equal(split.unit_values(values), values.reshape(TOTAL, 3).sum(1) / 3)
    assert np.array_equal(split.unit_values(values[:6]), values[:6].reshape(2, 3).sum(1) / 3)


def test_the_seed_decides_the_order() -> None:
    batches, read = data("tensor")
    first, same, other = (shuffled(batches, read, seed).order for seed in (1, 1, 2))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, np.arange(TOTAL))


def test_sample_count() -> None:
    assert sample_count((torch.zeros(3, 2), torch.zeros(3))) == 3
    assert sample_count((torch.zeros(3, 2), torch.zeros(2))) is None
    assert sample_count((torch.zeros(3), torch.tensor(1.0))) is None
    assert sample_count(["no tensor"]) is None
    assert sample_count(torch.zeros(0, 2)) is None


def test_selecting_keeps_types() -> None:
    batches = [{"x": torch.arange(4, dtype=torch.bfloat16), "y": (torch.arange(4), "text")} for _ in range(2)]
    made = select(batches, [torch.tensor([1, 3]), torch.tensor([0])])
    assert made["x"].dtype == torch.bfloat16
    assert made["y"][0].tolist() == [1, 3, 0]
    assert made["y"][1] == "text"
    images = torch.randn(4, 2, 3, 3).to(memory_format=torch.channels_last)
    assert select([images], [torch.tensor([2, 0])]).is_contiguous(memory_format=torch.channels_last)
