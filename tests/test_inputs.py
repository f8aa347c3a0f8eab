"""What inputs go through: static ranges, and scales found at run time for tokens, samples and groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import INTEGERS, MINIFLOATS, gaussian, parameters_for
from torch import Tensor

from hwmodels import Format
from search.quantize.affine import Range
from search.quantize.formats import input_quantizer, quantize_weight
from search.quantize.grid import on_grid

STATIC = (*INTEGERS, *MINIFLOATS)
PER_TOKEN = tuple(f"{name}-token" for name in ("int8", "int4", "uint8", "int8-asym", "uint4-sym", "fp8_e4m3"))
PER_SAMPLE = tuple(f"{name}-dynamic" for name in ("int8", "uint8", "int8-full", "fp8_e5m2"))
IN_GROUPS = ("int8-g8", "uint4-g5", "fp4_e2m1-g16", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4")
DYNAMIC = (*PER_TOKEN, *PER_SAMPLE, *IN_GROUPS)


def dynamic(name: str, axis: int = -1) -> Any:
    return input_quantizer(Format.parse(name), None, axis)


@pytest.mark.parametrize("name", STATIC)
def test_static_inputs_lie_on_the_grid_of_their_range(name: str) -> None:
    format = Format.parse(name)
    range_ = Range(0.037, (format.lowest + format.highest) // 2 if format.has_zero_point else 0)
    x = gaussian((4, 5, 6))
    quantize = input_quantizer(format, range_, 1)
    found = quantize(x)
    assert torch.equal(found, on_grid(x, format, 0.037, range_.zero_point))
    assert torch.equal(quantize(found), found)
    memory = torch.full_like(x, torch.nan)
    assert quantize(x, memory).data_ptr() == memory.data_ptr()
    assert torch.equal(memory, found)


def test_float_and_casts_need_no_range() -> None:
    x = gaussian((3, 4))
    assert input_quantizer(Format.parse("float"), None, -1)(x) is x
    assert torch.equal(input_quantizer(Format.parse("fp16"), None, -1)(x), x.half().float())
    assert torch.equal(input_quantizer(Format.parse("bf16"), None, -1)(x), x.bfloat16().float())


def oracle(x: np.ndarray, format: Format) -> np.ndarray:
    """One value at a time would do the same: min-max scales of the last axis, in float32."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    if format.has_zero_point:
        scale = (high - low) / np.float32(format.highest - format.lowest)
        zero = np.clip(np.round(format.lowest - low / scale), format.lowest, format.highest)
    else:
        scale = high / np.float32(format.highest)
        scale = np.maximum(scale, low / np.float32(format.lowest)) if format.lowest else scale
        zero = np.float32(0)
    codes = np.clip(np.round(x / scale), format.lowest - zero, format.highest - zero)
    return codes * scale


@pytest.mark.parametrize("name", ["int8-token", "int4-token", "uint8-token", "int8-asym-token", "int4-full-token"])
@given(seed=st.integers(0, 2**16), shape=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_every_token_has_a_scale_of_its_own(name: str, seed: int, shape: list[int]) -> None:
    format, x = Format.parse(name), gaussian((*shape, 9), seed) + 0.3
    expected = torch.from_numpy(oracle(x.numpy(), format))
    assert torch.equal(dynamic(name)(x), expected)
    assert torch.equal(dynamic(name, 1)(x.movedim(-1, 0).unsqueeze(0)), expected.movedim(-1, 0).unsqueeze(0))


@pytest.mark.parametrize("name", ["int8-dynamic", "uint8-dynamic"])
def test_every_sample_has_a_scale_of_its_own(name: str) -> None:
    x = gaussian((5, 3, 4, 4)) * torch.logspace(-2, 2, 5).view(5, 1, 1, 1)
    expected = oracle(x.reshape(5, -1).numpy(), Format.parse(name)).reshape(x.shape)
    assert np.array_equal(dynamic(name, 1)(x).numpy(), expected)


@pytest.mark.parametrize("name", [*IN_GROUPS, "int8-token", "uint4-token", "fp8_e4m3-token"])
@pytest.mark.parametrize("features", [64, 40, 7])
def test_inputs_in_groups_are_quantized_as_weights_are(name: str, features: int) -> None:
    """A token is to inputs what an output channel is to weights."""
    x = gaussian((1, 6, features)) * torch.logspace(-1, 1, 6)[:, None]
    format, rows = Format.parse(name), x[0]
    as_weight = Format.parse(name.removesuffix("-token"))
    expected = quantize_weight(rows, as_weight, 0, parameters_for(rows, as_weight, 0))[None]
    assert torch.equal(input_quantizer(format, None, -1)(x), expected)
    convolved = x.permute(0, 2, 1).unsqueeze(-1)  # features along axis 1
    assert torch.equal(input_quantizer(format, None, 1)(convolved), expected.permute(0, 2, 1).unsqueeze(-1))


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize(("shape", "axis"), [((5, 12), -1), ((5, 3, 12), -1), ((5, 12, 4, 4), 1)])
def test_a_sample_does_not_depend_on_its_batch(name: str, shape: tuple[int, ...], axis: int) -> None:
    x = gaussian(shape) * torch.logspace(-2, 2, 5).view(5, *[1] * (len(shape) - 1))
    alone = torch.cat([dynamic(name, axis)(sample) for sample in x.split(1)])
    assert torch.equal(dynamic(name, axis)(x), alone)


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("axis", [-1, 1])
def test_given_memory_changes_nothing(name: str, axis: int) -> None:
    x = gaussian((4, 12, 3, 20))
    before, memory = x.clone(), torch.full_like(x, torch.nan)
    found = dynamic(name, axis)(x, memory)
    assert found.data_ptr() == memory.data_ptr()
    assert torch.equal(found, dynamic(name, axis)(x))
    assert torch.equal(memory, found)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", [*DYNAMIC, "fp16", "bf16", "float"])
def test_type_shape_and_layout_are_kept(name: str) -> None:
    x = gaussian((4, 12, 3, 20))
    expected = dynamic(name, 1)(x)
    laid_out = x.to(memory_format=torch.channels_last)
    found = dynamic(name, 1)(laid_out)
    assert torch.equal(found, expected)
    assert found.stride() == laid_out.stride()
    half = dynamic(name, 1)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, dynamic(name, 1)(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("name", DYNAMIC)
def test_everything_happens_on_the_inputs_device(name: str) -> None:
    assert dynamic(name, 1)(torch.empty(4, 12, 5, device="meta")).device.type == "meta"


@pytest.mark.parametrize("name", DYNAMIC)
def test_odd_inputs_have_a_defined_result(name: str) -> None:
    quantize = dynamic(name)
    assert quantize(torch.zeros(0, 8)).shape == (0, 8)
    assert torch.equal(quantize(torch.zeros(2, 8)), torch.zeros(2, 8))
    assert quantize(gaussian((8,))).shape == (8,)
    x = gaussian((3, 8))
    x[1, 3] = torch.nan
    x[2, 0] = torch.inf
    found = quantize(x)
    assert found[1:, :5].isnan().all(), "what shares a scale with them is no number either"
    assert torch.equal(found[:1], quantize(x[:1]))


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "mxint8"])
@given(seed=st.integers(0, 2**16))
def test_powers_of_two_make_quantizing_twice_quantizing_once(name: str, seed: int) -> None:
    once = dynamic(name)(gaussian((6, 70), seed))
    assert torch.equal(dynamic(name)(once), once)


@pytest.mark.parametrize("name", ["int8-token", "int4-dynamic", "fp8_e4m3-token", "int8-g8"])
@given(seed=st.integers(0, 2**16))
def test_quantizing_twice_moves_values_by_rounding_only(name: str, seed: int) -> None:
    """The largest value is `highest * scale` rounded, whose scale may be another by an ulp."""
    once = dynamic(name)(gaussian((6, 16), seed))
    torch.testing.assert_close(dynamic(name)(once), once, rtol=3e-7, atol=0)


def test_uint8_per_sample_is_onnxs_dynamic_quantization() -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    helper, types = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["values"]),
    ]
    ends = [helper.make_tensor_value_info(name, types.FLOAT, [1, 400]) for name in ("x", "values")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for seed in range(20):
        x = gaussian((1, 400), seed) * 3 + seed / 10
        (expected,) = session.run(None, {"x": x.numpy()})
        assert np.array_equal(dynamic("uint8-dynamic")(x).numpy(), expected)


@pytest.mark.parametrize("name", ["binary", "codebook4", "nf4", "int8-channel"])
def test_formats_of_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"for weights|no kernel can sum"):
        input_quantizer(Format.parse(name), Range(1.0), -1)


def test_a_static_format_needs_a_range() -> None:
    with pytest.raises(ValueError, match="uint8 inputs are static and need a range; uint8-token finds its own"):
        input_quantizer(Format.parse("uint8"), None, -1)


def test_ranges_wider_than_float32_have_a_scale() -> None:
    found: Tensor = dynamic("uint8-token")(torch.tensor([[-3.0e38, 3.0e38, 1.0e38]]))
    torch.testing.assert_close(found, torch.tensor([[-3.0e38, 3.0e38, 1.0e38]]), rtol=0.02, atol=0)
