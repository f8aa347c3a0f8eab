"""Ranges of inputs, against the values themselves, brute force and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hwmodels import Format
from search.errors import ConfigError
from search.quantize.affine import Range
from search.quantize.inputs import input_quantizer
from search.quantize.ranges import Histogram, LogitSample, affine_range, check_method, input_range
from search.quantize.ranges.density import Density, grid_units, noise_loss, rounding_loss
from search.quantize.ranges.methods import METHODS, WEIGHT_METHODS

FORMATS = ("uint2", "uint4", "uint8", "int2", "int4", "int4-full", "int8", "int8-asym", "uint4-sym", "int16")
FLOATS = ("fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp4_e2m1")
BINNED = ("minmax", "moving_average", "percentile", "mse", "kl", "octav")

values = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
data = arrays.arrays(np.float32, st.integers(1, 60), elements=values)


def counted(*batches: torch.Tensor, half: int = 4096) -> Histogram:
    seen = Histogram(half)
    for batch in batches:
        seen.add(batch)
    return seen


def quantized(x: torch.Tensor, range_: Range, format: Format) -> torch.Tensor:
    return input_quantizer(format, range_, 1)(x)


def error(x: torch.Tensor, range_: Range, format: Format) -> float:
    return float((quantized(x, range_, format) - x).double().square().mean())


def heavy_tailed(count: int = 20_000) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_t(3, count).astype(np.float32))


def pairs() -> list[tuple[str, str]]:
    return [
        (name, method)
        for name in FORMATS + FLOATS
        for method in BINNED
        if method != "octav" or not name.startswith("f")
    ]


@pytest.mark.parametrize(("name", "method"), pairs())
@settings(max_examples=6)
@given(batch=data)
def test_zero_has_a_code_and_scales_are_float32(name: str, method: str, batch: np.ndarray) -> None:
    format = Format.parse(name)
    range_ = input_range(counted(torch.from_numpy(batch), half=64), format, method)
    assert format.lowest <= range_.zero_point <= format.highest
    assert 0 < range_.scale < np.inf
    assert range_.scale == float(np.float32(range_.scale))
    assert quantized(torch.zeros(1), range_, format).item() == 0
    if not format.has_zero_point:
        assert range_.zero_point == 0


@pytest.mark.parametrize(("name", "method"), pairs())
def test_no_method_reaches_beyond_the_values(name: str, method: str) -> None:
    format, x = Format.parse(name), heavy_tailed(3000)
    widest, found = (input_range(counted(x), format, each) for each in ("minmax", method))
    assert found.scale <= widest.scale * (2 if format.grid == "minifloat" else 1)
    assert found == input_range(counted(x), format, method), "the same values give the same range"


@pytest.mark.parametrize("name", FORMATS + FLOATS)
def test_minmax_clips_nothing(name: str) -> None:
    format, x = Format.parse(name), heavy_tailed(3000)
    x = x.abs() if name.endswith("-sym") else x
    range_ = input_range(counted(x), format, "minmax")
    ends = torch.stack([x.min(), x.max()])
    step = range_.scale * (1 if format.grid == "int" else 2.0 ** (2 ** (format.exponent_bits - 1)))
    assert ((quantized(ends, range_, format) - ends).abs() <= step / 2 * (1 + 1e-5)).all()


def test_minmax_by_hand() -> None:
    seen = counted(torch.tensor([-1.0, 3.0]))
    third = pytest.approx(4 / 3)
    assert input_range(seen, Format.parse("uint2"), "minmax") == Range(third, 1)
    assert input_range(seen, Format.parse("int2-asym"), "minmax") == Range(third, -1)
    assert input_range(seen, Format.parse("int4"), "minmax") == Range(pytest.approx(3 / 7), 0)
    assert input_range(seen, Format.parse("int4-full"), "minmax") == Range(pytest.approx(3 / 7), 0)
    assert input_range(seen, Format.parse("uint4-sym"), "minmax") == Range(pytest.approx(3 / 15), 0)
    assert input_range(seen, Format.parse("fp4_e2m1"), "minmax") == Range(0.5, 0)
    negative = counted(torch.tensor([-8.0, -2.0]))
    assert input_range(negative, Format.parse("int4-full"), "minmax") == Range(1.0, 0)
    assert input_range(negative, Format.parse("uint8"), "minmax") == Range(pytest.approx(8 / 255), 255)
    positive = counted(torch.tensor([2.0, 3.0]))
    assert input_range(positive, Format.parse("uint8"), "minmax") == Range(pytest.approx(3 / 255), 0)
    assert affine_range(-1.0, 3.0, Format.parse("uint2")) == Range(third, 1)


def test_moving_average_lies_between_the_batches() -> None:
    seen = counted(torch.tensor([0.0, 10.0]), *[torch.tensor([0.0, 1.0])] * 30)
    high = 1 + 9 * 0.9**30
    assert input_range(seen, Format.parse("uint8"), "moving_average").scale == pytest.approx(high / 255)
    assert input_range(seen, Format.parse("uint8"), "minmax").scale == pytest.approx(10 / 255)
    one = counted(heavy_tailed(100))
    assert input_range(one, Format.parse("int4"), "moving_average") == input_range(one, Format.parse("int4"), "minmax")


@pytest.mark.parametrize("percentile", [90, 99, 99.9, 100])
def test_percentile_is_a_quantile_within_a_bin_and_a_rank(percentile: float) -> None:
    x = heavy_tailed()
    seen = counted(x)

    def check(found: float, values: torch.Tensor, slack: float = 0.0) -> None:
        ordered, rank = values.sort().values, percentile / 100 * (len(values) - 1)
        neighbours = ordered[max(int(rank) - 1, 0)], ordered[min(int(rank) + 2, len(values) - 1)]
        slack += 1.01 * seen.width
        assert neighbours[0] - slack <= found <= neighbours[1] + slack

    signed = input_range(seen, Format.parse("int8"), "percentile", percentile)
    check(signed.scale * 127, x.abs())
    ends = input_range(seen, Format.parse("uint8"), "percentile", percentile)
    check(ends.zero_point * ends.scale, -x, slack=ends.scale / 2)
    check((255 - ends.zero_point) * ends.scale, x, slack=ends.scale / 2)
    check(input_range(seen, Format.parse("uint8-sym"), "percentile", percentile).scale * 255, x)
    if percentile == 100:
        assert signed == input_range(seen, Format.parse("int8"), "minmax")


def test_percentile_of_almost_only_zeros_keeps_everything() -> None:
    x = torch.zeros(100_000)
    x[0] = 5.0
    for name in ("uint8", "int8", "uint8-sym"):
        format = Format.parse(name)
        assert input_range(counted(x), format, "percentile") == input_range(counted(x), format, "minmax")


COARSE = [name for name in (*FORMATS, *FLOATS, "int1", "uint1") if name != "int16"]


@pytest.mark.parametrize(
    ("criterion", "name"), [(rounding_loss, name) for name in COARSE] + [(noise_loss, name) for name in FORMATS]
)
def test_losses_of_binned_values(criterion, name: str) -> None:
    """Against values that lie evenly in their bins, as the density takes them to lie, and zeros."""
    format, rng = Format.parse(name), np.random.default_rng(1)
    counts = torch.from_numpy(rng.integers(0, 5, 16).astype(float))
    density = Density(counts[None], torch.tensor([3.0]), torch.tensor([0.25], dtype=torch.float64))
    fine = (torch.arange(4000) + 0.5) / 4000
    x = ((torch.arange(16)[:, None] - 8 + fine) * 0.25).double()
    for scale, zero_point in ((0.31, 1), (0.05, 0), (1.7, 1)):
        zero = torch.tensor([[zero_point]], dtype=torch.float32) if format.has_zero_point else None
        scale = scale / format.largest * 2 if format.grid == "minifloat" else scale
        found = criterion(density, format)(torch.tensor([[scale]], dtype=torch.float64), zero)[0, 0]
        codes = (grid_units(format, x.device) - (zero_point if format.has_zero_point else 0)) * scale
        if criterion is rounding_loss:
            per_value = (x[..., None] - codes).abs().amin(-1).square()
            of_zeros = codes.abs().amin() ** 2
        else:
            per_value = (x - x.clamp(codes[0], codes[-1])).square()
            per_value[per_value == 0] = scale**2 / 12
            of_zeros = 0.0
        expected = (per_value.mean(1) * counts).sum() + 3 * of_zeros
        assert found.item() * 0.25**2 == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("name", [*FORMATS, *FLOATS, "int1", "uint1"])
@settings(max_examples=15)
@given(batch=data)
def test_mse_is_never_worse_than_minmax(name: str, batch: np.ndarray) -> None:
    format, seen = Format.parse(name), counted(torch.from_numpy(batch), half=512)
    if not (seen.lowest or seen.highest):
        return
    criterion = (noise_loss if format.bits == 16 else rounding_loss)(Density.of_histogram(seen), format)

    def lost(method: str) -> float:
        range_ = input_range(seen, format, method)
        zero = torch.tensor([[float(range_.zero_point)]]) if format.has_zero_point else None
        return float(criterion(torch.tensor([[range_.scale]]), zero))

    assert lost("mse") <= lost("minmax") * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("name", ["uint2", "uint4", "int4", "int4-full", "uint4-sym", "fp4_e2m1", "fp6_e2m3", "int8"])
@pytest.mark.parametrize("kind", ["gauss", "shifted", "rectified", "heavy", "outlier"])
def test_mse_is_near_brute_force_on_the_values(name: str, kind: str) -> None:
    format, rng = Format.parse(name), np.random.default_rng(2)
    gauss = rng.standard_normal(1500)
    x = {
        "gauss": gauss,
        "shifted": gauss + 0.7,
        "rectified": gauss.clip(0),
        "heavy": rng.standard_t(3, 1500),
        "outlier": np.append(gauss, -30),
    }[kind]
    x = torch.from_numpy(x.astype(np.float32))
    low, high = float(min(x.min(), 0)), float(x.max())
    lows, highs = np.arange(1, 31) / 30, np.arange(1, 31) / 30
    if format.has_zero_point and low:
        grid = [affine_range(low * a, high * b, format) for a in lows for b in highs]
    else:
        grid = [affine_range(low * a, high * a, format) for a in np.arange(1, 201) / (100 if name[0] == "f" else 200)]
    best = min(error(x, range_, format) for range_ in grid)
    assert error(x, input_range(counted(x), format), format) <= 1.03 * best


def test_mse_of_gaussian_values_is_the_uniform_quantizer_of_max() -> None:
    """Max, "Quantizing for Minimum Distortion", 1960, table II: steps and errors for 3, 7 and 15 levels."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32))
    seen = counted(x)
    for name, step, distortion in (("int2", 1.224, 0.1902), ("int3", 0.6508, 0.04686), ("int4", 0.3534, 0.01289)):
        range_ = input_range(seen, Format.parse(name))
        assert range_.scale == pytest.approx(step, rel=0.02)
        assert error(x, range_, Format.parse(name)) == pytest.approx(distortion, rel=0.005)


def test_uniform_values_are_not_clipped_at_many_bits() -> None:
    x = torch.linspace(0, 1, 100_001)
    for name in ("uint6", "uint8"):
        format = Format.parse(name)
        assert input_range(counted(x), format).scale == pytest.approx(1 / format.highest, rel=0.02)


def test_far_outliers_among_many_values_are_clipped() -> None:
    x = torch.cat([torch.randn(2_000_000), torch.tensor([500.0])])
    for method in ("mse", "octav", "percentile"):
        assert 1 < input_range(counted(x), Format.parse("int4"), method).scale * 7 < 8
    assert input_range(counted(x), Format.parse("int16")).scale * 32767 == pytest.approx(500, rel=1e-3)


@pytest.mark.parametrize("method", BINNED)
def test_what_codes_can_hold_exactly_is_held_exactly(method: str) -> None:
    """Where bins cannot tell that clipping gains, nothing is clipped: discrete values keep their grid."""
    masks = (torch.rand(1000) > 0.5).float() * 3
    pixels = torch.arange(256).repeat(20) / 255
    for x, name in ((masks, "uint8"), (masks, "int4"), (torch.full((50,), -2.5), "int8"), (pixels, "uint8")):
        if x is pixels and method in ("kl", "percentile", "octav"):
            continue  # these clip a few values whatever they are
        format = Format.parse(name)
        tolerance = counted(x).width if method == "octav" else 1e-6
        assert torch.allclose(quantized(x, input_range(counted(x), format, method), format), x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("value", [2.0001, 2.5, 3.9])
@pytest.mark.parametrize("name", ["uint2", "uint4", "uint6", "uint8", "int3", "int4", "int8"])
def test_an_end_moves_only_for_more_than_bins_can_tell(name: str, value: float) -> None:
    seen, format = counted(torch.tensor([0.0, value]).repeat(50)), Format.parse(name)
    assert input_range(seen, format) == input_range(seen, format, "minmax")


def test_all_zeros_have_scale_one() -> None:
    for method in BINNED:
        assert input_range(counted(torch.zeros(9)), Format.parse("uint8"), method) == Range(1.0, 0)
    assert input_range(counted(-torch.ones(9)), Format.parse("uint8-sym")) == Range(1.0, 0)


@pytest.mark.parametrize("power", [-120, -20, 20, 100])
@pytest.mark.parametrize("method", BINNED)
def test_scaling_the_values_scales_the_range(method: str, power: int) -> None:
    x, format = heavy_tailed(2000), Format.parse("uint4")
    one, other = (input_range(counted(each), format, method) for each in (x, x * 2.0**power))
    assert other == Range(pytest.approx(one.scale * 2.0**power, rel=1e-6), one.zero_point)


def test_refusals() -> None:
    seen = counted(torch.randn(100))
    with pytest.raises(ConfigError, match=r"quantizer.weight_range=minmx is unknown.*did you mean 'minmax'.*allowed"):
        check_method("quantizer.weight_range", "minmx")
    with pytest.raises(ConfigError, match=r"moving_average is for inputs.*allowed: mse, minmax, percentile, kl, octav"):
        check_method("quantizer.weight_range", "moving_average", WEIGHT_METHODS)
    for method in METHODS:
        check_method("quantizer.input_range", method)
    with pytest.raises(ConfigError, match="octav reckons with steps of equal size, which fp8_e4m3 has not; use mse"):
        input_range(seen, Format.parse("fp8_e4m3"), "octav")
    with pytest.raises(ValueError, match="int8-token inputs take no static range"):
        input_range(seen, Format.parse("int8-token"))
    with pytest.raises(ConfigError, match="cross_entropy needs a sample of logits"):
        input_range(seen, Format.parse("uint8"), "cross_entropy")
    with pytest.raises(ConfigError, match="cross_entropy needs a sample of logits"):
        input_range(seen, Format.parse("uint8"), "cross_entropy", logits=LogitSample())
