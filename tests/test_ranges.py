"""Ranges and the histogram they are read from, against one-shot counting and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hwmodels import Format
from search.errors import ConfigError
from search.quantize.affine import quantize_input, quantize_weight
from search.quantize.ranges import Histogram, affine_range, check_method, input_range, weight_scale

WEIGHT_FORMATS = ("int2", "int3", "int4", "int8")
INPUT_FORMATS = ("uint2", "uint4", "uint6", "uint8", "int4", "int8")

values = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
data = arrays.arrays(np.float32, st.integers(1, 60), elements=values)


def errors(weight: torch.Tensor, scale: torch.Tensor, format: Format) -> torch.Tensor:
    """Squared error of every channel, in float64."""
    return (quantize_weight(weight.double(), scale.double(), format, 0) - weight.double()).square().flatten(1).sum(1)


def counted(*batches: np.ndarray, half: int = 64) -> Histogram:
    histogram = Histogram(half)
    for batch in batches:
        histogram.add(torch.from_numpy(batch))
    return histogram


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
@given(weight=arrays.arrays(np.float32, (3, 7), elements=values))
def test_mse_is_never_worse_than_minmax(name: str, weight: np.ndarray) -> None:
    format, weight = Format.parse(name), torch.from_numpy(weight)
    best, widest = (errors(weight, weight_scale(weight, format, 0, method), format) for method in ("mse", "minmax"))
    assert (best <= widest * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_mse_is_near_a_fine_brute_force(name: str) -> None:
    format, weight = Format.parse(name), torch.randn(4, 300)
    found = errors(weight, weight_scale(weight, format, 0), format)
    largest = weight.abs().amax(1) / format.highest
    grid = torch.stack([errors(weight, largest * step / 2000, format) for step in range(1, 2001)])
    assert (found <= grid.amin(0) * (1.02 if format.bits <= 4 else 1.12)).all()  # 64 candidates are coarse at 8 bits
    if format.bits <= 4:
        assert (found < 0.97 * errors(weight, largest, format)).all(), "clipping must pay at few bits"


@pytest.mark.parametrize("method", ["mse", "minmax"])
def test_weight_scales_by_channel(method: str) -> None:
    weight, format = torch.randn(5, 4, 3), Format.parse("int4")
    weight[2] = 0
    for axis in range(3):
        together = weight_scale(weight, format, axis, method)
        alone = [weight_scale(weight.select(axis, i)[None], format, 0, method) for i in range(weight.shape[axis])]
        assert torch.equal(together, torch.cat(alone))
    scale = weight_scale(weight, format, 0, method)
    assert (scale > 0).all()
    assert (quantize_weight(weight, scale, format, 0)[2] == 0).all(), "a channel of zeros stays zero"


def test_minmax_scale_reaches_the_largest_magnitude() -> None:
    weight = torch.tensor([[0.1, -1.4], [0.7, 0.2]])
    assert weight_scale(weight, Format.parse("int4"), 0, "minmax").tolist() == pytest.approx([0.2, 0.1])


@given(batch=data, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_histogram_counts_alike_however_the_data_are_split(batch: np.ndarray, cuts: list[int]) -> None:
    parts = [part for part in np.split(batch, sorted(min(cut, len(batch)) for cut in cuts)) if len(part)]
    whole, split = counted(batch), counted(*parts)
    assert split.width == whole.width
    assert torch.equal(split.counts, whole.counts)
    assert (split.lowest, split.highest) == (min(0.0, batch.min()), max(0.0, batch.max()))
    if whole.width:
        bins = np.floor(batch.astype(np.float64) / whole.width).astype(int) + 64
        assert np.array_equal(whole.counts.numpy(), np.bincount(bins, minlength=128))
        assert np.abs(batch).max() > whole.width * 31, "at least half of a side's bins are used"


@given(batches=st.lists(data, min_size=1, max_size=5))
def test_widening_loses_nothing(batches: list[np.ndarray]) -> None:
    histogram = counted(*(batch * np.float32(8**i) for i, batch in enumerate(batches)))
    assert histogram.counts.sum() == sum(map(len, batches))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_histogram_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        Histogram().add(torch.tensor([0.0, bad]))


def test_an_empty_batch_counts_nothing() -> None:
    histogram = counted(np.array([1.0, -2.0], dtype=np.float32))
    before = histogram.counts.clone()
    histogram.add(torch.empty(0, 3))
    assert torch.equal(histogram.counts, before)


@pytest.mark.parametrize("method", ["mse", "minmax"])
@pytest.mark.parametrize("name", INPUT_FORMATS)
@given(batch=data)
def test_zero_has_a_code_of_its_own(name: str, method: str, batch: np.ndarray) -> None:
    format = Format.parse(name)
    range_ = input_range(counted(batch), format, method)
    assert format.lowest <= range_.zero_point <= format.highest
    assert range_.scale == float(np.float32(range_.scale))
    assert quantize_input(torch.zeros(1), range_, format).item() == 0
    if format.signed:
        assert range_.zero_point == 0


@pytest.mark.parametrize("name", INPUT_FORMATS)
@given(batch=data)
def test_mse_input_range_is_never_worse_than_minmax(name: str, batch: np.ndarray) -> None:
    format, seen = Format.parse(name), counted(batch, half=512)
    centres, counts = torch.from_numpy(seen.centres), seen.counts

    def error(method: str) -> float:
        found = quantize_input(centres, input_range(seen, format, method), format)
        return float(counts @ (found - centres).square())

    assert error("mse") <= error("minmax") * (1 + 1e-9) + 1e-12


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_mse_input_range_is_near_brute_force(seed: int) -> None:
    rng, format = np.random.default_rng(seed), Format.parse("uint4")
    batch = rng.standard_normal(2000).astype(np.float32) + rng.uniform(-1, 1)
    x = torch.from_numpy(batch)

    def error(range_) -> float:
        return float((quantize_input(x, range_, format) - x).square().sum())

    steps = np.arange(1, 41) / 40
    grid = min(
        error(affine_range(min(batch.min(), 0.0) * low, max(batch.max(), 0.0) * high, format))
        for low in steps
        for high in steps
    )
    assert error(input_range(counted(batch, half=2048), format)) <= 1.05 * grid


def test_minmax_range_covers_everything_seen() -> None:
    seen = counted(np.array([-1.0, 3.0], dtype=np.float32))
    range_ = input_range(seen, Format.parse("uint2"), "minmax")
    assert (range_.scale, range_.zero_point) == (pytest.approx(4 / 3), 1)
    positive = input_range(counted(np.array([2.0, 3.0], dtype=np.float32)), Format.parse("uint8"), "minmax")
    assert (positive.scale, positive.zero_point) == (pytest.approx(3 / 255), 0)
    assert input_range(counted(np.zeros(3, dtype=np.float32)), Format.parse("uint8")).scale == 1.0


def test_unknown_method() -> None:
    with pytest.raises(
        ConfigError, match=r"quantizer.weight_range=minmx is unknown.*did you mean 'minmax'.*allowed: mse"
    ):
        check_method("quantizer.weight_range", "minmx")
    with pytest.raises(ConfigError, match=r"=qqq is unknown; allowed: mse, minmax"):
        check_method("quantizer.weight_range", "qqq")
