"""Parameters of weights, against brute force, closed forms and rows placed alone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hwmodels import Format
from search.errors import ConfigError
from search.quantize.formats import Parameters, defined_parameters, quantize_weight
from search.quantize.grouping import to_groups
from search.quantize.ranges import METHODS, WEIGHT_METHODS, weight_parameters, weights

INTEGERS = ("int1", "int2", "int3", "int4", "int4-full", "int8", "int16", "int4-asym", "uint4", "uint8", "uint4-sym")
GROUPED = ("int4-g2", "int4-g4", "uint4-g4", "int4-tensor", "uint3-tensor", "fp4_e2m1-g4")
FLOATS = ("fp8_e4m3", "fp8_e5m2", "fp6_e3m2", "fp4_e2m1")

values = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)


def pairs(*names: str) -> list[tuple[str, str]]:
    return [(name, method) for name in names for method in WEIGHT_METHODS if method != "octav" or name[0] != "f"]


def errors(weight: torch.Tensor, format: Format, parameters: Parameters) -> torch.Tensor:
    """Squared error of every channel."""
    return (quantize_weight(weight, format, 0, parameters) - weight).double().square().flatten(1).sum(1)


def scaled(format: Format, low: torch.Tensor, high: torch.Tensor) -> Parameters:
    """Parameters of channels whose codes cover `[low, high]`, by definition."""
    if format.has_zero_point:
        scale = (high - low) / (format.highest - format.lowest)
        zero_point = (format.lowest - low / scale).round().clamp(format.lowest, format.highest)
        return {"scale": scale, "zero_point": zero_point.int()}
    return {"scale": torch.maximum(-low, high) / format.largest}


@pytest.mark.parametrize("name", INTEGERS + GROUPED + FLOATS)
@settings(max_examples=15)
@given(weight=arrays.arrays(np.float32, (3, 7), elements=values))
def test_mse_is_never_worse_than_minmax(name: str, weight: np.ndarray) -> None:
    format, weight = Format.parse(name), torch.from_numpy(weight)
    best, widest = (errors(weight, format, weight_parameters(weight, format, 0, each)) for each in ("mse", "minmax"))
    assert best.sum() <= widest.sum() * (1 + 1e-5) + 1e-30


@pytest.mark.parametrize("name", ["int1", "int2", "int3", "int4", "int4-full", "uint4-sym", "fp4_e2m1", "fp6_e3m2"])
def test_mse_is_near_a_fine_brute_force(name: str) -> None:
    format, weight = Format.parse(name), torch.randn(4, 300)
    weight = weight.abs() if name == "uint4-sym" else weight
    found = errors(weight, format, weight_parameters(weight, format, 0))
    largest = weight.abs().amax(1)
    shares = torch.arange(1, 1001) / (500 if format.grid == "minifloat" else 1000)
    grid = torch.stack([errors(weight, format, scaled(format, -share * largest, share * largest)) for share in shares])
    assert (found <= grid.amin(0) * 1.01).all()
    if name != "uint4-sym":
        minmax = errors(weight, format, weight_parameters(weight, format, 0, "minmax"))
        assert found.sum() < 0.97 * minmax.sum(), "clipping must pay at few bits"


@pytest.mark.parametrize("name", ["uint2", "uint4", "int4-asym"])
@pytest.mark.parametrize("kind", ["gauss", "skewed", "outlier"])
def test_mse_of_two_ends_is_near_a_brute_force(name: str, kind: str) -> None:
    format, weight = Format.parse(name), torch.randn(4, 200)
    if kind == "skewed":
        weight = weight.exp() - 0.4
    if kind == "outlier":
        weight[:, 0] = -25
    low, high = weight.amin(1), weight.amax(1)
    shares = torch.arange(1, 41) / 40
    grid = [errors(weight, format, scaled(format, a * low, b * high)) for a in shares for b in shares]
    found = errors(weight, format, weight_parameters(weight, format, 0))
    assert (found <= torch.stack(grid).amin(0) * 1.03).all()


def test_mse_of_int1_is_the_mean_magnitude() -> None:
    """The closed form of XNOR-Net: the scale of signs with the least squared error is the mean magnitude."""
    weight = torch.randn(6, 400)
    scale = weight_parameters(weight, Format.parse("int1"), 0)["scale"]
    assert torch.allclose(scale, weight.abs().mean(1), rtol=0.01)


def test_padding_of_groups_does_not_count() -> None:
    weight = torch.randn(2, 10).abs() + 1
    format = Format.parse("int1-g8")
    assert torch.allclose(weight_parameters(weight, format, 0)["scale"][1], weight[0, 8:].mean(), rtol=0.02)
    found = weight_parameters(weight, Format.parse("int4-g8"), 0, "percentile", 50.0)["scale"] * 7
    assert torch.allclose(found[1], weight[0, 8:].median() / 2 + weight[0, 8:].max() / 2)


@pytest.mark.parametrize(("name", "method"), pairs("int4", "uint4", "fp4_e2m1"))
def test_rows_are_placed_alone(name: str, method: str) -> None:
    weight, format = torch.randn(5, 4, 3), Format.parse(name)
    weight[2] = 0
    for axis in range(3):
        together = weight_parameters(weight, format, axis, method)
        for index in range(weight.shape[axis]):
            alone = weight_parameters(weight.select(axis, index)[None], format, 0, method)
            assert all(torch.equal(together[key][index : index + 1], alone[key]) for key in together)


@pytest.mark.parametrize(("name", "method"), pairs("int4", "uint4-g4", "int8-tensor", "fp8_e4m3"))
def test_blocks_change_nothing(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, format = torch.randn(6, 10), Format.parse(name)
    whole = weight_parameters(weight, format, 0, method)
    monkeypatch.setattr(weights, "CPU_BLOCK", 7)
    blocks = weight_parameters(weight, format, 0, method)
    assert whole.keys() == blocks.keys()
    assert all(torch.equal(whole[key], blocks[key]) for key in whole)


@pytest.mark.parametrize(("name", "method"), pairs(*INTEGERS, *GROUPED, *FLOATS))
def test_shapes_types_and_zero(name: str, method: str) -> None:
    weight, format = torch.randn(3, 5, 2) * 0.1, Format.parse(name)
    weight[1] = 0
    found = weight_parameters(weight, format, 0, method)
    groups = format.groups(weight.shape, 0)
    assert found["scale"].shape == (groups,)
    assert found["scale"].dtype == torch.float32
    assert (found["scale"] > 0).all()
    assert found["scale"].isfinite().all()
    assert ("zero_point" in found) == format.has_zero_point
    if format.has_zero_point:
        assert found["zero_point"].shape == (groups,)
        assert found["zero_point"].dtype == torch.int32
        assert found["zero_point"].min() >= format.lowest
        assert found["zero_point"].max() <= format.highest
    if name != "int1":
        assert (quantize_weight(weight, format, 0, found)[1] == 0).all(), "a channel of zeros stays zero"
    if groups >= 3 and groups != 5:
        assert found["scale"][groups // 3] == 1.0
    again = weight_parameters(weight.bfloat16(), format, 0, method)
    same = weight_parameters(weight.bfloat16().float(), format, 0, method)
    assert all(torch.equal(again[key], same[key]) for key in again)


def test_minmax_reaches_the_largest_magnitude() -> None:
    weight = torch.tensor([[0.1, -1.4], [0.7, 0.2]])
    assert weight_parameters(weight, Format.parse("int4"), 0, "minmax")["scale"].tolist() == pytest.approx([0.2, 0.1])
    assert weight_parameters(weight, Format.parse("int4-tensor"), 0, "minmax")["scale"].tolist() == pytest.approx([0.2])
    full = weight_parameters(weight, Format.parse("int4-full"), 0, "minmax")["scale"]
    assert full.tolist() == pytest.approx([1.4 / 8, 0.1])
    assert weight_parameters(weight, Format.parse("fp4_e2m1"), 0, "minmax")["scale"][0] == pytest.approx(1.4 / 6)
    pair = weight_parameters(weight, Format.parse("uint4"), 0, "minmax")
    assert pair["scale"].tolist() == pytest.approx([0.1, 0.7 / 15])
    assert pair["zero_point"].tolist() == [14, 0]


@pytest.mark.parametrize("percentile", [50, 90, 99.99, 100])
def test_percentile_is_numpys_quantile(percentile: float) -> None:
    weight = torch.randn(4, 77)
    found = weight_parameters(weight, Format.parse("int8"), 0, "percentile", percentile)["scale"] * 127
    assert np.allclose(found, np.quantile(weight.abs(), percentile / 100, axis=1), rtol=1e-5)
    both = weight_parameters(weight, Format.parse("uint8"), 0, "percentile", percentile)
    low, high = np.quantile(weight, [1 - percentile / 100, percentile / 100], axis=1)
    assert np.allclose(both["scale"] * 255, high.clip(0) - low.clip(None, 0), rtol=1e-5, atol=1e-6)


def test_percentile_of_almost_only_zeros_keeps_everything() -> None:
    weight = torch.zeros(2, 30_000)
    weight[0, 0], weight[1] = 3.0, torch.randn(30_000)
    for name in ("int4", "uint4"):
        found, widest = (weight_parameters(weight, Format.parse(name), 0, each) for each in ("percentile", "minmax"))
        assert found["scale"][0] == widest["scale"][0]
        assert found["scale"][1] < widest["scale"][1]


@pytest.mark.parametrize(("name", "method"), pairs("int3", "uint3", "int8", "fp4_e2m1"))
@pytest.mark.parametrize("power", [-100, -20, 20, 100])
def test_scaling_a_weight_scales_its_parameters(name: str, method: str, power: int) -> None:
    weight, format = torch.randn(3, 40), Format.parse(name)
    one, other = (weight_parameters(each, format, 0, method) for each in (weight, weight * 2.0**power))
    assert torch.equal(one["scale"] * 2.0**power, other["scale"])
    if "zero_point" in one:
        assert torch.equal(one["zero_point"], other["zero_point"])


@pytest.mark.parametrize(("name", "method"), pairs("int4", "int8", "uint4", "int16", "fp8_e4m3"))
def test_extreme_weights(name: str, method: str) -> None:
    format, largest = Format.parse(name), torch.finfo(torch.float32).max / 2
    weight = torch.tensor([[largest, -largest, 1.0], [1e-45, -1e-40, 0.0], [2.5, 2.5, 2.5], [1e-30, 1e30, -1e-30]])
    found = weight_parameters(weight, format, 0, method)
    assert found["scale"].isfinite().all()
    assert (found["scale"] > 0).all()
    quantized = quantize_weight(weight, format, 0, found)
    assert quantized.isfinite().all()
    assert torch.allclose(quantized[2], weight[2], rtol=1e-6), "a constant channel is held exactly"


def test_more_bits_lose_less() -> None:
    weight = torch.randn(8, 256)
    for method in ("mse", "minmax", "octav"):
        lost = [
            errors(weight, format, weight_parameters(weight, format, 0, method)).sum()
            for format in (Format.parse(f"int{bits}") for bits in (2, 3, 4, 5, 6, 7, 8, 16))
        ]
        assert all(more < less for less, more in itertools.pairwise(lost))


@pytest.mark.parametrize("name", ["ternary", "nf4", "mxfp4", "codebook2", "bf16"])
def test_defined_formats_ignore_the_method(name: str) -> None:
    weight, format = torch.randn(4, 64), Format.parse(name)
    expected = defined_parameters(weight, format, 0)
    for method in ("mse", "octav"):
        found = weight_parameters(weight, format, 0, method)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


def test_refusals() -> None:
    weight, int4 = torch.randn(2, 3), Format.parse("int4")
    for bad, message in ((torch.nan, "NaN"), (torch.inf, "infinite")):
        with pytest.raises(ValueError, match=message):
            weight_parameters(torch.tensor([[1.0, bad]]), int4, 0)
    with pytest.raises(ValueError, match="no value"):
        weight_parameters(torch.empty(2, 0), int4, 0)
    with pytest.raises(ConfigError, match="octav reckons with steps of equal size, which fp4_e2m1 has not"):
        weight_parameters(weight, Format.parse("fp4_e2m1"), 0, "octav")
    for method in set(METHODS) - set(WEIGHT_METHODS):
        with pytest.raises(ConfigError, match=f"{method} is for inputs"):
            weight_parameters(weight, int4, 0, method)


@pytest.mark.parametrize("name", ["int4", "uint4", "int4-g8"])
def test_rows_are_normalised_without_rounding(name: str) -> None:
    """The criterion is judged on the rows as they will be quantized, not on rescaled ones."""
    weight, format = torch.randn(4, 16) * math.pi, Format.parse(name)
    rows = to_groups(weight, format, 0).rows
    found = weight_parameters(weight, format, 0)
    by_hand = weights.rounding_loss(rows, None, format)
    zero_point = found.get("zero_point")
    lost = by_hand(found["scale"][None], None if zero_point is None else zero_point[None].float())[0]
    per_row = to_groups(quantize_weight(weight, format, 0, found) - weight, format, 0).rows.square().sum(1)
    assert torch.allclose(lost, per_row, rtol=1e-5)
