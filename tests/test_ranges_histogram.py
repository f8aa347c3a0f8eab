"""The histogram of what passes by, against counting everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from search.quantize.ranges import Histogram, histogram

values = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
data = arrays.arrays(np.float32, st.integers(1, 60), elements=values)


def counted(*batches: np.ndarray, half: int = 64) -> Histogram:
    seen = Histogram(half)
    for batch in batches:
        seen.add(torch.from_numpy(batch))
    return seen


def state(seen: Histogram) -> tuple:
    return seen.width, seen.zeros, seen.lowest, seen.highest, seen.counts.tolist()


@given(batch=data, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_counts_alike_however_the_data_are_split(batch: np.ndarray, cuts: list[int]) -> None:
    parts = [part for part in np.split(batch, sorted(min(cut, len(batch)) for cut in cuts)) if len(part)]
    whole, split = counted(batch), counted(*parts)
    assert state(whole) == state(split)
    assert whole.zeros == (batch == 0).sum()
    assert (whole.lowest, whole.highest) == (min(0.0, batch.min()), max(0.0, batch.max()))
    if whole.width:
        bins = np.ceil(batch.astype(np.float64) / whole.width).astype(int) + 63
        assert np.array_equal(whole.counts, np.bincount(bins, minlength=128))
        assert np.abs(batch).max() > whole.width * 31, "at least half of a side's bins are used"


@given(batches=st.lists(data, min_size=1, max_size=5))
def test_widening_loses_nothing(batches: list[np.ndarray]) -> None:
    batches = [batch * np.float32(8**i) for i, batch in enumerate(batches)]
    seen = counted(*batches)
    assert seen.counts.sum() == sum(map(len, batches))
    assert len(seen.counts) == 128
    assert seen.zeros == sum((batch == 0).sum() for batch in batches)


def test_zeros_are_counted_with_and_without_negative_values_and_before_anything_else() -> None:
    assert counted(np.array([0.0, -0.0, 1.0, 2.0], dtype=np.float32)).zeros == 2
    assert counted(np.array([0.0, 0.0, 1.0, -2.0], dtype=np.float32)).zeros == 2
    late = counted(np.zeros(5, dtype=np.float32), np.array([0.0, 3.0], dtype=np.float32))
    assert (late.zeros, late.counts[63], late.counts.sum()) == (6, 6, 7)


def test_moving_averages_follow_the_recursion() -> None:
    seen = Histogram(newest=0.25)
    for low, high in ((-1.0, 4.0), (1.0, 2.0), (-5.0, 0.0)):
        seen.add(torch.tensor([low, high]))
    low = 0.75 * (0.75 * -1 + 0.25 * 1) + 0.25 * -5
    high = 0.75 * (0.75 * 4 + 0.25 * 2) + 0.25 * 0
    assert (seen.average_low, seen.average_high) == (low, high)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed", "strided", "expanded"])
def test_every_memory_layout_counts_the_same(layout: str) -> None:
    x = torch.randn(3, 4, 5, 6)
    laid = {
        "contiguous": x,
        "channels last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3),
        "strided": torch.stack([x, x], -1)[..., 0],
        "expanded": x[:, :1].expand(3, 4, 5, 6),
    }[layout]
    seen = Histogram()
    seen.add(laid)
    assert state(seen) == state(counted(laid.contiguous().numpy(), half=histogram.HALF))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_every_type_is_counted_as_its_float_values(dtype: torch.dtype) -> None:
    x = (torch.randn(500) * 50).to(dtype)
    seen = Histogram()
    seen.add(x)
    assert state(seen) == state(counted(x.float().numpy(), half=histogram.HALF))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1000).numpy()
    whole = counted(x)
    monkeypatch.setattr(histogram, "CPU_BLOCK", 64)
    assert state(counted(x)) == state(whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        Histogram().add(torch.tensor([0.0, bad]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        Histogram().add(torch.tensor([1e300], dtype=torch.float64))


def test_extremes_of_float32_are_counted() -> None:
    largest = torch.finfo(torch.float32).max
    seen = Histogram()
    seen.add(torch.tensor([1e-45, -1e-40, largest, -largest]))
    assert seen.counts.sum() == 4
    assert (seen.lowest, seen.highest) == (-largest, largest)
    tiny = Histogram()
    tiny.add(torch.tensor([1e-45, -1e-40, 0.0]))
    assert tiny.counts.sum() == 3
    assert tiny.zeros == 1


def test_an_empty_batch_counts_nothing() -> None:
    seen = counted(np.array([1.0, -2.0], dtype=np.float32))
    before = state(seen), seen.average_low
    seen.add(torch.empty(0, 3))
    assert (state(seen), seen.average_low) == before


def test_gradients_and_inference_mode_do_not_matter() -> None:
    seen = Histogram()
    with torch.inference_mode():
        seen.add(torch.ones(3))
    seen.add(torch.ones(3, requires_grad=True) * 4)
    assert seen.counts.sum() == 6
