"""What holds for weights in every format: codes and values agree, errors are bounded, edges are defined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tensors import BLOCKS, CASTS, GROUPED, INTEGERS, MINIFLOATS, WEIGHT_FORMATS, gaussian, parameters_for, weights
from torch import Tensor

from hwmodels import Format
from search.quantize.formats import (
    Parameters,
    check_values,
    decode,
    defined_parameters,
    encode,
    parameter_names,
    quantize_rows,
    quantize_weight,
)
from search.quantize.grouping import to_groups

CHOSEN_SCALES = (*INTEGERS, *MINIFLOATS)


def quantized(weight: Tensor, name: str, axis: int = 0) -> Tensor:
    format = Format.parse(name)
    return quantize_weight(weight, format, axis, parameters_for(weight, format, axis))


def sqnr_db(weight: Tensor, name: str) -> float:
    """Signal to quantization noise, in dB."""
    noise = (quantized(weight, name) - weight).square().mean()
    return float(10 * torch.log10(weight.square().mean() / noise))


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
@given(drawn=weights())
@settings(max_examples=20)
def test_values_are_those_of_the_codes(name: str, drawn: tuple[Tensor, int]) -> None:
    weight, axis = drawn
    format = Format.parse(name)
    assume(name != "fp16" or weight.abs().amax() < 65504)
    parameters = parameters_for(weight, format, axis)
    assert set(parameter_names(format)) == set(parameters)
    found = quantize_weight(weight, format, axis, parameters)
    groups = to_groups(weight, format, axis)
    codes = encode(groups.rows, format, parameters)
    assert codes.dtype == torch.int32
    assert torch.equal(groups.restore(decode(codes, format, parameters)), found)
    assert (found.shape, found.dtype, found.stride()) == (weight.shape, weight.dtype, weight.stride())
    assert found.isfinite().all()
    assert torch.equal(quantize_weight(found, format, axis, parameters), found), "quantizing twice is quantizing once"


@pytest.mark.parametrize("name", [name for name in WEIGHT_FORMATS if name not in CASTS])
@given(drawn=weights(), exponent=st.integers(-30, 30))
@settings(max_examples=20)
def test_values_scale_with_the_weight(name: str, drawn: tuple[Tensor, int], exponent: int) -> None:
    weight, axis = drawn
    assume(name != "int1" or bool(weight.all()))  # which has no zero
    scaled = quantized(weight * 2.0**exponent, name, axis)
    assert torch.equal(scaled, quantized(weight, name, axis) * 2.0**exponent)


@pytest.mark.parametrize("name", [name for name in INTEGERS if name != "int1"])
@given(drawn=weights())
@settings(max_examples=20)
def test_errors_are_at_most_half_a_step_inside_the_range(name: str, drawn: tuple[Tensor, int]) -> None:
    weight, axis = drawn
    format = Format.parse(name)
    parameters = parameters_for(weight, format, axis)
    parameters["scale"] = parameters["scale"] * 0.8  # so that some values lie outside
    rows = to_groups(weight, format, axis).rows
    scale, zero = parameters["scale"][:, None].double(), parameters.get("zero_point", torch.zeros(1))[:, None]
    low, high = (format.lowest - zero) * scale, (format.highest - zero) * scale
    inside = (rows >= low) & (rows <= high)
    found = quantize_rows(rows, format, parameters).double()
    slack = 0.5 + 2.0**-22 * format.highest
    assert ((found - rows).abs() <= slack * scale)[inside].all()
    ends = torch.where(rows < low, low, high)
    torch.testing.assert_close(found[~inside], ends[~inside], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [*MINIFLOATS, *(name for name in BLOCKS if "int" not in name)])
@given(seed=st.integers(0, 2**16))
def test_errors_of_small_floats_are_half_a_last_place(name: str, seed: int) -> None:
    format, weight = Format.parse(name), gaussian((4, 64), seed)
    parameters = parameters_for(weight, format, 0)
    rows = to_groups(weight, format, 0).rows.double()
    step = parameters["scale"][:, None].double() * parameters.get("tensor_scale", torch.ones(())).double()
    normal = 2.0 ** (2 - 2 ** (format.exponent_bits - 1))
    bound = torch.maximum(rows.abs(), normal * step) * 2.0 ** -(format.mantissa_bits + 1) * (1 + 1e-6)
    error = (quantize_rows(rows.float(), format, parameters).double() - rows).abs()
    saturated = rows.abs() > format.largest * step
    assert (error <= bound)[~saturated].all()
    assert (error <= rows.abs() - format.largest * step * (1 - 1e-6))[saturated].all()


@pytest.mark.parametrize(
    "family",
    [
        [f"int{bits}" for bits in (2, 3, 4, 5, 6, 7, 8, 16)],
        [f"int{bits}-full" for bits in (2, 3, 4, 5, 6, 7, 8, 16)],
        [f"int{bits}-asym" for bits in (2, 3, 4, 5, 6, 7, 8, 16)],
        [f"uint{bits}" for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16)],
        [f"int{bits}-g32" for bits in (2, 3, 4, 5, 6, 7, 8, 16)],
        [f"codebook{bits}" for bits in range(1, 9)],
        ["binary", "ternary", "codebook2-channel", "codebook3-channel"],
        ["fp4_e2m1", "fp6_e3m2", "fp6_e2m3"],
        ["fp4_e2m1", "fp6_e3m2", "fp8_e5m2", "fp8_e4m3", "bf16", "fp16"],
        ["mxfp4", "mxfp6_e3m2", "mxfp6_e2m3", "mxint8"],
        ["mxfp4", "mxfp8_e5m2", "mxfp8_e4m3", "mxint8"],
        ["int4", "int4-g128", "int4-g32", "int4-g8"],
        ["int4-tensor", "int4"],
        ["int4", "nf4-channel", "codebook4-channel"],
        ["mxfp4", "nvfp4"],
    ],
    ids=lambda family: family[0],
)
def test_more_bits_or_smaller_groups_are_nearer_on_gaussian_weights(family: list[str]) -> None:
    weight = gaussian((16, 1024))
    ratios = [sqnr_db(weight, name) for name in family]
    assert ratios == sorted(ratios)
    assert len(set(ratios)) == len(ratios)


def test_ratios_on_gaussian_weights_are_those_of_the_literature() -> None:
    """Max, "Quantizing for minimum distortion", 1960, table I for codebooks; the binary ratio is 1 / (1 - 2 / pi)."""
    weight = gaussian((1, 200_000))
    for bits, error in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        noise = (quantized(weight, f"codebook{bits}") - weight).square().mean()
        assert float(noise) == pytest.approx(error, rel=0.02)
    assert sqnr_db(weight, "binary") == pytest.approx(4.396, abs=0.05)
    assert sqnr_db(weight, "int8") == pytest.approx(sqnr_db(weight, "int7") + 6.02, abs=0.2)


@pytest.mark.parametrize("name", [name for name in (*GROUPED, "mxfp4", "mxint8") if name != "nvfp4"])
def test_groups_are_quantized_on_their_own(name: str) -> None:
    weight = torch.randn(3, 70)
    size = Format.parse(name).group
    found = quantized(weight, name)
    for start in range(0, 70, size):
        part = weight[:, start : start + size]
        torch.testing.assert_close(found[:, start : start + size], quantized(part, name), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_bfloat16_weights_take_the_values_of_float32_ones(name: str) -> None:
    weight = gaussian((6, 5, 3, 3)).bfloat16()
    found = quantized(weight, name, 1)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, quantized(weight.float(), name, 1).bfloat16())


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_channels_last_weights_take_the_same_values(name: str) -> None:
    weight = gaussian((6, 5, 3, 3))
    laid_out = weight.to(memory_format=torch.channels_last)
    found = quantized(laid_out, name)
    assert torch.equal(found, quantized(weight, name))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_the_weight_itself_is_left_alone(name: str) -> None:
    weight = gaussian((6, 33))
    before = weight.clone()
    quantized(weight, name)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_zeros_and_channels_of_one_value_are_defined(name: str) -> None:
    if name != "int1":  # which has no zero
        assert not quantized(torch.zeros(4, 40), name).any()
    weight = torch.cat([torch.zeros(1, 40), torch.full((1, 40), 3.0), torch.full((1, 40), -2.0), gaussian((1, 40))])
    found = quantized(weight, name)
    assert found.isfinite().all()
    is_per_tensor = name.endswith("-tensor") or (name.startswith("codebook") and "-" not in name)
    if not is_per_tensor and name not in ("uint1-sym", "uint4-sym", "uint8-sym", "binary-stochastic"):
        torch.testing.assert_close(found[1], weight[1], rtol=0.13, atol=0)  # mxfp4 and nvfp4 may clip 1 in 8


def test_unsigned_weights_without_a_zero_point_have_no_negative_values() -> None:
    weight = gaussian((3, 40))
    found = quantized(weight, "uint8-sym")
    assert (found >= 0).all()
    torch.testing.assert_close(found, weight.clamp_min(0), rtol=0, atol=float(weight.amax()) / 255 * 0.51)


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_what_no_format_can_hold_is_refused_by_name(name: str) -> None:
    format = Format.parse(name)
    for value, problem in ((torch.nan, "a value is NaN"), (-torch.inf, "a value is infinite")):
        weight = gaussian((3, 4))
        weight[1, 2] = value
        with pytest.raises(ValueError, match=problem):
            defined_parameters(weight, format, 0)
    with pytest.raises(ValueError, match="there is no value"):
        defined_parameters(torch.zeros(0, 4), format, 0)


def test_values_beyond_half_precision_are_refused() -> None:
    weight = torch.tensor([[-7e4, 1.0]])
    with pytest.raises(ValueError, match="the value 70000 is larger than fp16 can hold"):
        check_values(weight, Format.parse("fp16"))
    check_values(weight, Format.parse("bf16"))


def test_scales_of_plain_integers_and_small_floats_are_left_to_range_methods() -> None:
    weight = gaussian((3, 40))
    for name in ("int4", "uint8-g8", "int1", "fp8_e4m3", "fp4_e2m1-tensor"):
        assert defined_parameters(weight, Format.parse(name), 0) is None
    for name in ("float", "bf16"):
        assert defined_parameters(weight, Format.parse(name), 0) == {}


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_parameters_have_an_entry_for_every_group(name: str) -> None:
    format, weight = Format.parse(name), gaussian((6, 5, 3))
    parameters: Parameters = parameters_for(weight, format, 1)
    for key, value in parameters.items():
        assert value.shape[:1] == (() if key in ("tensor_scale", "seed") else (format.groups(weight.shape, 1),))
        assert value.dtype == {"zero_point": torch.int32, "seed": torch.int64}.get(key, torch.float32)


def test_clustering_of_one_weight_is_the_same_every_time() -> None:
    weight, format = gaussian((8, 300)), Format.parse("codebook4")
    first, again = (parameters_for(weight, format, 0)["codebook"] for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", [name for name in WEIGHT_FORMATS if name != "binary-stochastic"])
def test_everything_happens_on_the_weights_device(name: str) -> None:
    """On torch's device without data, where a tensor made on the CPU would not mix."""
    format, weight = Format.parse(name), gaussian((6, 5, 7))
    parameters = {key: value.to("meta") for key, value in parameters_for(weight, format, 1).items()}
    elsewhere = weight.to("meta")
    assert quantize_weight(elsewhere, format, 1, parameters).device.type == "meta"
    rows = to_groups(elsewhere, format, 1).rows
    assert decode(encode(rows, format, parameters), format, parameters).device.type == "meta"
