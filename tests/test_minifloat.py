"""Small floats against ml_dtypes, bit for bit, and block formats against torchao."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import MINIFLOATS, gaussian
from torch import Tensor

from hwmodels import Format
from search.quantize.formats import decode, defined_parameters, encode, quantize_rows, quantize_weight
from search.quantize.minifloat import (
    magnitudes,
    microscale,
    minifloat_codes,
    minifloat_values,
    nvfp4_scales,
    power_of_two,
    round_minifloat,
)

TYPES = {
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "fp6_e2m3": "float6_e2m3fn",
    "fp6_e3m2": "float6_e3m2fn",
    "fp4_e2m1": "float4_e2m1fn",
}


def ml_type(name: str) -> Any:
    return getattr(pytest.importorskip("ml_dtypes"), TYPES[name])


def hard_cases(format: Format) -> Tensor:
    """Every value of the grid, every tie between two, their neighbours, and what lies beyond."""
    values = torch.tensor(magnitudes(format))
    ties = (values[1:] + values[:-1]) / 2
    exact = torch.cat([values, ties, torch.tensor([1e-30, format.largest * 1.01, format.largest * 100])])
    up, down = torch.nextafter(exact, torch.tensor(torch.inf)), torch.nextafter(exact, torch.tensor(0.0))
    x = torch.cat([exact, up, down])
    return torch.cat([x, -x])


@pytest.mark.parametrize("name", MINIFLOATS)
def test_the_grid_is_that_of_ml_dtypes(name: str) -> None:
    format = Format.parse(name)
    kind = ml_type(name)
    codes = np.arange(1 << format.bits, dtype=np.uint8)
    values = codes.view(kind).astype(np.float32)
    finite = np.isfinite(values)
    assert np.array_equal(minifloat_values(torch.from_numpy(codes[finite]).int(), format).numpy(), values[finite])
    import ml_dtypes

    assert format.largest == float(ml_dtypes.finfo(kind).max)
    assert magnitudes(format)[1] == float(ml_dtypes.finfo(kind).smallest_subnormal)


@pytest.mark.parametrize("name", MINIFLOATS)
def test_rounding_is_that_of_ml_dtypes_with_saturation(name: str) -> None:
    """Their casts of 8-bit floats overflow to NaN or infinity; within the largest value all is the same."""
    format = Format.parse(name)
    x = hard_cases(format)
    clamped = x.clamp(-format.largest, format.largest).numpy()
    expected = clamped.astype(ml_type(name))
    found = round_minifloat(x, format)
    assert np.array_equal(found.numpy(), expected.astype(np.float32))
    assert np.array_equal(minifloat_codes(found, format).numpy(), expected.view(np.uint8))


@pytest.mark.parametrize("name", MINIFLOATS)
@given(seed=st.integers(0, 2**16), exponent=st.integers(-30, 20))
def test_random_values_round_as_in_ml_dtypes(name: str, seed: int, exponent: int) -> None:
    format = Format.parse(name)
    x = gaussian(500, seed) * 2.0**exponent
    expected = x.clamp(-format.largest, format.largest).numpy().astype(ml_type(name)).astype(np.float32)
    assert np.array_equal(round_minifloat(x, format).numpy(), expected)


@pytest.mark.parametrize(("name", "kind"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_fp8_is_torchs_own(name: str, kind: torch.dtype) -> None:
    format = Format.parse(name)
    x = hard_cases(format).clamp(-format.largest, format.largest)
    assert torch.equal(round_minifloat(x, format), x.to(kind).float())


@pytest.mark.parametrize("name", MINIFLOATS)
def test_what_is_not_finite(name: str) -> None:
    format = Format.parse(name)
    found = round_minifloat(torch.tensor([torch.inf, -torch.inf, torch.nan]), format)
    assert found[:2].tolist() == [format.largest, -format.largest]
    assert found[2].isnan()


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_casts_are_torchs_own(name: str) -> None:
    format, rows = Format.parse(name), torch.cat([torch.randn(3, 50), torch.full((3, 1), 1e-6)], 1)
    expected = rows.to(torch.float16 if name == "fp16" else torch.bfloat16).float()
    assert torch.equal(quantize_rows(rows, format, {}), expected)
    assert torch.equal(decode(encode(rows, format, {}), format, {}), expected)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_scaled_fp8_equals_torchaos(name: str) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    format = Format.parse(name)
    kind = torch.float8_e4m3fn if name == "fp8_e4m3" else torch.float8_e5m2
    weight = torch.randn(7, 40) * torch.logspace(-3, 3, 7)[:, None]
    scale = primitives._choose_scale_float8(weight, [1, 40], kind)
    expected = primitives._quantize_affine_float8(weight, scale, kind).float() * scale
    torch.testing.assert_close(quantize_rows(weight, format, {"scale": scale[:, 0]}), expected, rtol=0, atol=0)


def to_mx(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The values and the scales that torchao's microscaling gives, by the floor rule of OCP's specification."""
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    kind = {
        "mxfp8_e4m3": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
        "mxfp6_e2m3": "fp6_e2m3",
        "mxfp6_e3m2": "fp6_e3m2",
        "mxfp4": torch.float4_e2m1fn_x2,
    }[name]
    scale, codes = mx.to_mx(x, kind, 32)
    return mx.to_dtype(codes, scale, kind, 32, torch.float32), scale.float()


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"])
@given(seed=st.integers(0, 2**16), exponent=st.integers(-100, 100))
def test_microscaling_equals_torchaos(name: str, seed: int, exponent: int) -> None:
    format = Format.parse(name)
    weight = gaussian((6, 64), seed) * 2.0**exponent * torch.logspace(-3, 3, 6, base=2)[:, None]
    weight[1, :32] = 0
    weight[2] = 2.0**exponent
    parameters = defined_parameters(weight, format, 0)
    expected, scale = to_mx(weight, name)
    assert parameters is not None
    is_zero = (
        weight.view(-1, 32).abs().amax(1) == 0
    )  # torchao stores the smallest scale that e8m0 has, ours is float32's
    assert torch.equal(parameters["scale"][~is_zero], scale.reshape(-1)[~is_zero])
    assert torch.equal(quantize_weight(weight, format, 0, parameters), expected)


@given(seed=st.integers(0, 2**16), exponent=st.integers(-100, 100))
def test_mxint8_is_two_complement_64ths(seed: int, exponent: int) -> None:
    """By the definition in OCP MX 1.0, sections 5.3.4 and 6.3; -2 is left out, so that the grid is symmetric."""
    rows = gaussian((5, 32), seed).double() * 2.0**exponent
    shared = 2.0 ** torch.floor(torch.log2(rows.abs().amax(1, keepdim=True)))
    expected = (rows / shared * 64).round().clamp(-127, 127) / 64 * shared
    format = Format.parse("mxint8")
    parameters = defined_parameters(rows.float(), format, 0)
    assert parameters is not None
    assert torch.equal(parameters["scale"].double() * 64, shared[:, 0])
    assert torch.equal(quantize_rows(rows.float(), format, parameters).double(), expected)


@pytest.mark.parametrize("value", [0.0, 1e-45, 2.0**-126, 1.0, 1.5, 2.0, 1.999999, 3.4e38])
@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4", "mxint8"])
def test_scales_are_powers_of_two_that_e8m0_holds(name: str, value: float) -> None:
    import ml_dtypes

    format = Format.parse(name)
    scale = microscale(torch.tensor([value]), format)
    assert torch.frexp(scale)[0].item() == 0.5
    stored = scale.numpy() * (64 if name == "mxint8" else 1)
    assert stored == stored.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    if value >= 2.0**-100:
        assert format.largest / 2 < value / scale.item() < format.largest * 2


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-126, 128)
    assert power_of_two(exponents).tolist() == [2.0**exponent for exponent in range(-126, 128)]
    assert power_of_two(torch.tensor(-500)).item() == 2.0**-126


def test_a_block_that_is_not_finite_has_no_scale() -> None:
    assert microscale(torch.tensor([torch.inf, torch.nan]), Format.parse("mxfp4")).isnan().all()


@given(seed=st.integers(0, 2**16), exponent=st.integers(-60, 60))
def test_nvfp4_equals_torchaos(seed: int, exponent: int) -> None:
    """But for ties within an ulp, since torchao multiplies by the reciprocal of the step."""
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    weight = gaussian((6, 64), seed) * 2.0**exponent
    weight[1, :16] = 0
    format = Format.parse("nvfp4")
    parameters = defined_parameters(weight, format, 0)
    assert parameters is not None
    tensor = nv.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=nv.per_tensor_amax_to_scale(weight.abs().amax()))
    expected, found = tensor.dequantize(torch.float32), quantize_weight(weight, format, 0, parameters)
    assert parameters["tensor_scale"] == tensor.per_tensor_scale
    is_zero = weight.view(-1, 16).abs().amax(1) == 0  # the smallest scale is another, see nvfp4_scales
    assert torch.equal(parameters["scale"][~is_zero], tensor.scale.float().reshape(-1)[~is_zero])
    near = torch.isclose(found, expected, rtol=1e-5, atol=0)
    assert near.float().mean() > 0.99
    step = parameters["scale"].repeat_interleave(16).view(6, 64) * parameters["tensor_scale"]
    assert ((found - expected).abs() <= 2 * step).all()


def test_nvfp4_keeps_small_blocks_where_torchaos_scale_ends() -> None:
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    weight = torch.cat([torch.ones(1, 16), torch.full((1, 16), 1e-6)], 1)
    format = Format.parse("nvfp4")
    parameters = defined_parameters(weight, format, 0)
    assert parameters is not None
    found = quantize_weight(weight, format, 0, parameters)[0, 16]
    scale = nv.per_tensor_amax_to_scale(weight.abs().amax())
    theirs = nv.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(torch.float32)[0, 16]
    assert float(found) == pytest.approx(1e-6, rel=0.1)
    assert theirs == 0


def test_nvfp4_of_nothing_but_zeros_is_zero() -> None:
    scale, tensor_scale = nvfp4_scales(torch.zeros(3), torch.tensor(0.0))
    assert tensor_scale == 1
    assert scale.tolist() == [2.0**-9] * 3
