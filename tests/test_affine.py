"""Affine quantization against torch's own kernels and a numpy oracle with rounding half to even."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import Format
from search.quantize.affine import Range, per_channel, quantize_input, quantize_weight, weight_codes

INPUTS = ("uint2", "uint4", "uint6", "uint8", "uint16", "int2", "int3", "int8")
WEIGHTS = ("int2", "int3", "int4", "int5", "int6", "int8", "int16")


def oracle(x: np.ndarray, scale: float, zero_point: int, format: Format) -> np.ndarray:
    """The definition, in float32: codes are rounded half to even, shifted, clamped, and turned back."""
    codes = np.clip(np.round(x / np.float32(scale)) + zero_point, format.lowest, format.highest)
    return ((codes - zero_point) * np.float32(scale)).astype(np.float32)


def away_from_ties(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Marks values whose code does not depend on how the division is rounded: torch multiplies by 1 / scale."""
    return ((x.double() / scale) % 1 - 0.5).abs() > 1e-3


@pytest.mark.parametrize("name", INPUTS)
@given(seed=st.integers(0, 2**16), scale=st.floats(2**-13, 8, width=32), share=st.floats(0, 1))
def test_inputs_equal_the_definition(name: str, seed: int, scale: float, share: float) -> None:
    format = Format.parse(name)
    zero_point = 0 if format.signed else round(share * format.highest)
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * scale * format.highest
    found = quantize_input(x, Range(scale, zero_point), format)
    assert np.array_equal(found.numpy(), oracle(x.numpy(), scale, zero_point, format))


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("scale", [0.25, 0.0371])
def test_inputs_equal_torchs_fake_quantization(name: str, scale: float) -> None:
    format = Format.parse(name)
    zero_point = 0 if format.signed else format.highest // 3
    scale = float(np.float32(scale))
    x = torch.randn(5000) * scale * format.highest
    found = quantize_input(x, Range(scale, zero_point), format)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, format.lowest, format.highest)
    safe = away_from_ties(x, scale)
    assert safe.float().mean() > 0.99
    torch.testing.assert_close(found[safe], expected[safe], rtol=1e-6, atol=0)


def test_halves_round_to_even_and_ends_clamp() -> None:
    x = torch.tensor([-9.0, -1.5, -0.5, 0.5, 1.5, 2.5, 99.0])
    assert quantize_input(x, Range(1.0, 2), Format.parse("uint3")).tolist() == [-2, -2, 0, 0, 2, 2, 5]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_weights_equal_torchs_fake_quantization(name: str, axis: int) -> None:
    format = Format.parse(name)
    weight = torch.randn(6, 5, 3, 4)
    scale = torch.rand(weight.shape[axis]) + 0.1
    found = quantize_weight(weight, scale, format, axis)
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, format.lowest, format.highest)
    safe = away_from_ties(weight, per_channel(scale, weight, axis).double())
    torch.testing.assert_close(found[safe], expected[safe], rtol=1e-6, atol=0)
    codes = weight_codes(weight, scale, format, axis)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= format.lowest
    assert codes.max() <= format.highest


def test_int2_is_a_ternary_grid() -> None:
    scale = torch.tensor([0.5, 2.0])
    values = quantize_weight(torch.randn(2, 500) * 3, scale, Format.parse("int2"), 0)
    assert values[0].unique().tolist() == [-0.5, 0.0, 0.5]
    assert values[1].unique().tolist() == [-2.0, 0.0, 2.0]


def test_given_memory_changes_nothing() -> None:
    x, range_, format = torch.randn(40, 3), Range(0.1, 5), Format.parse("uint4")
    memory = torch.full((40, 3), torch.nan)
    quantized = quantize_input(x, range_, format, memory)
    assert quantized.data_ptr() == memory.data_ptr()
    assert torch.equal(quantized, quantize_input(x, range_, format))


def test_layouts_keep_their_values() -> None:
    x, range_, format = torch.randn(2, 3, 4, 5), Range(0.1, 5), Format.parse("uint4")
    expected = quantize_input(x, range_, format)
    for laid_out in (x.to(memory_format=torch.channels_last), x.transpose(1, 3).contiguous().transpose(1, 3)):
        before = laid_out.clone()
        assert torch.equal(quantize_input(laid_out, range_, format), expected)
        assert torch.equal(laid_out, before), "the input itself must not be altered"
