"""Affine quantization against a numpy oracle, torch's fake quantization, torchao, and ONNX's own operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import INTEGERS, gaussian
from torch import Tensor

from hwmodels import Format
from search.quantize.affine import SMALLEST_SCALE, affine_steps, minmax_scale, per_channel, weight_codes
from search.quantize.formats import decode, encode
from search.quantize.grid import on_grid

MORE_BITS = tuple(name for name in INTEGERS if name != "int1")
STORED = ("int4-full", "uint4", "int8-full", "uint8", "int16-full", "uint16", "int4-asym", "int8-asym", "int16-asym")


def oracle(x: np.ndarray, scale: float, zero_point: int, format: Format) -> np.ndarray:
    """The definition, in float32: codes are rounded half to even, shifted, clamped, and turned back."""
    codes = np.clip(np.round(x / np.float32(scale)) + zero_point, format.lowest, format.highest)
    return ((codes - zero_point) * np.float32(scale)).astype(np.float32)


def zero_point_at(share: float, format: Format) -> int:
    return round(format.lowest + share * (format.highest - format.lowest)) if format.has_zero_point else 0


def away_from_ties(x: Tensor, scale: Tensor | float) -> Tensor:
    """Marks values whose code does not depend on how the division is rounded.

    Torch and torchao multiply by 1 / scale, so that values within an ulp of a tie may go the other way.
    """
    steps = x.double() / scale
    return (steps % 1 - 0.5).abs() > 1e-3 + steps.abs() * 2.0**-22


@pytest.mark.parametrize("name", MORE_BITS)
@given(seed=st.integers(0, 2**16), scale=st.floats(2**-13, 8, width=32), share=st.floats(0, 1))
@settings(max_examples=25)
def test_values_equal_the_definition(name: str, seed: int, scale: float, share: float) -> None:
    format = Format.parse(name)
    zero_point = zero_point_at(share, format)
    x = gaussian(200, seed) * scale * format.highest
    found = on_grid(x, format, scale, zero_point)
    assert np.array_equal(found.numpy(), oracle(x.numpy(), scale, zero_point, format))


@pytest.mark.parametrize("name", MORE_BITS)
@pytest.mark.parametrize("scale", [0.25, 0.0371])
def test_values_equal_torchs_fake_quantization_per_tensor(name: str, scale: float) -> None:
    format = Format.parse(name)
    zero_point = zero_point_at(1 / 3, format)
    scale = float(np.float32(scale))
    x = torch.randn(5000) * scale * format.highest
    found = on_grid(x, format, scale, zero_point)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, format.lowest, format.highest)
    safe = away_from_ties(x, scale)
    assert safe.float().mean() > 0.95
    torch.testing.assert_close(found[safe], expected[safe], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MORE_BITS)
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=4), axis=st.integers(-4, 3), seed=st.integers(0, 2**16))
@settings(max_examples=25)
def test_values_equal_torchs_fake_quantization_per_channel(name: str, shape: list[int], axis: int, seed: int) -> None:
    format, axis = Format.parse(name), axis % len(shape)
    weight = gaussian(shape, seed)
    scale = gaussian(shape[axis], seed + 1).abs() + 0.1
    zero_point = torch.full((len(scale),), zero_point_at(1 / 3, format), dtype=torch.int32)
    step = per_channel(scale, weight, axis)
    found = on_grid(weight, format, step, per_channel(zero_point, weight, axis))
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zero_point, axis, format.lowest, format.highest)
    safe = away_from_ties(weight, step.double())
    torch.testing.assert_close(found[safe], expected[safe], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int8", "uint4", "uint8", "int4-full", "int8-asym"])
@pytest.mark.parametrize("group", [4, 12])
def test_values_equal_torchaos_in_groups(name: str, group: int) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    format = Format.parse(name)
    weight = torch.randn(5, 24)
    rows = weight.reshape(-1, group)
    scale, zero_point = minmax_scale(rows.amin(1), rows.amax(1), format)
    zeros = torch.zeros_like(scale) if zero_point is None else zero_point
    shared = [(1, group), scale.view(5, -1), zeros.int().view(5, -1)]
    integers = torch.int8 if format.signed else torch.uint8
    codes = primitives.quantize_affine(weight, *shared, integers, format.lowest, format.highest)
    expected = primitives.dequantize_affine(codes, *shared, integers, format.lowest, format.highest)
    found = on_grid(rows, format, scale[:, None], zeros[:, None])
    safe = away_from_ties(rows, scale[:, None].double())
    assert safe.float().mean() > 0.95
    torch.testing.assert_close(found[safe], expected.reshape(rows.shape)[safe], rtol=1e-6, atol=0)


def onnx_model(kind: str, rows: Tensor, scale: Tensor, zero_point: Tensor) -> Any:
    """A graph that quantizes rows with a scale each, and turns the codes back."""
    onnx = pytest.importorskip("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    initializers = [
        helper.make_tensor("scale", types.FLOAT, [len(scale)], scale.tolist()),
        helper.make_tensor("zero_point", types.DataType.Value(kind.upper()), [len(scale)], zero_point.tolist()),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"], axis=0),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["values"], axis=0),
    ]
    ends = [helper.make_tensor_value_info(name, types.FLOAT, list(rows.shape)) for name in ("x", "values")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def placed_rows(format: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with values on ties and beyond the ends, with scales that divide them exactly and others."""
    scale = torch.tensor([0.5, 2.0, 0.0371, 1.7e-3, 1.0])
    share = torch.linspace(0, 1, len(scale))
    zero_point = (format.lowest + share * (format.highest - format.lowest)).round() * format.has_zero_point
    ties = torch.arange(-2 * format.highest, 2 * format.highest, max(format.highest // 50, 1)) / 2
    return torch.cat([ties, torch.randn(500) * format.highest]) * scale[:, None], scale, zero_point.int()


@pytest.mark.parametrize("name", STORED)
def test_codes_and_values_equal_onnx_by_definition(name: str) -> None:
    format = Format.parse(name)
    rows, scale, zero_point = placed_rows(format)
    model = onnx_model(f"{'' if format.signed else 'u'}int{format.bits}", rows, scale, zero_point)
    from onnx.reference import ReferenceEvaluator

    (expected,) = ReferenceEvaluator(model).run(None, {"x": rows.numpy()})
    parameters = {"scale": scale, "zero_point": zero_point}
    assert np.array_equal(decode(encode(rows, format, parameters), format, parameters).numpy(), expected)


@pytest.mark.parametrize("name", STORED)
def test_codes_and_values_equal_onnxruntimes(name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    format = Format.parse(name)
    rows, scale, zero_point = placed_rows(format)
    model = onnx_model(f"{'' if format.signed else 'u'}int{format.bits}", rows, scale, zero_point)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": rows.numpy()})
    assert np.array_equal(on_grid(rows, format, scale[:, None], zero_point[:, None]).numpy(), expected)


def test_halves_round_to_even_and_ends_clamp() -> None:
    x = torch.tensor([-9.0, -1.5, -0.5, 0.5, 1.5, 2.5, 99.0])
    assert on_grid(x, Format.parse("uint3"), 1.0, 2).tolist() == [-2, -2, 0, 0, 2, 2, 5]
    assert on_grid(x, Format.parse("int3"), 1.0).tolist() == [-3, -2, 0, 0, 2, 2, 3]
    assert on_grid(x, Format.parse("int3-full"), 1.0).tolist() == [-4, -2, 0, 0, 2, 2, 3]
    assert on_grid(x, Format.parse("int3-asym"), 1.0, -2).tolist() == [-2, -2, 0, 0, 2, 2, 5]
    assert on_grid(x, Format.parse("uint3-sym"), 1.0).tolist() == [0, 0, 0, 0, 2, 2, 7]


def test_int1_is_a_sign_that_is_positive_at_zero() -> None:
    x = torch.tensor([-9.0, -0.1, -0.0, 0.0, 0.1, 9.0])
    assert affine_steps(x, 2.0, Format.parse("int1")).tolist() == [-1, -1, 1, 1, 1, 1]
    assert on_grid(x, Format.parse("int1"), 2.0).tolist() == [-2, -2, 2, 2, 2, 2]


def test_int2_is_a_ternary_grid() -> None:
    values = on_grid(torch.randn(2, 500) * 3, Format.parse("int2"), torch.tensor([[0.5], [2.0]]))
    assert values[0].unique().tolist() == [-0.5, 0.0, 0.5]
    assert values[1].unique().tolist() == [-2.0, 0.0, 2.0]


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_codes_of_weights_are_whole_numbers_in_range(axis: int) -> None:
    format, weight = Format.parse("int3"), torch.randn(6, 5, 3, 4)
    codes = weight_codes(weight, torch.full((weight.shape[axis],), 0.3), format, axis)
    assert torch.equal(codes, codes.round())
    assert (codes.amin(), codes.amax()) == (format.lowest, format.highest)


@pytest.mark.parametrize("name", INTEGERS)
@given(
    low=st.floats(-(2.0**100), 2.0**100, width=32),
    high=st.floats(-(2.0**100), 2.0**100, width=32),
)
@settings(max_examples=25)
def test_the_smallest_range_that_clips_nothing(name: str, low: float, high: float) -> None:
    format = Format.parse(name)
    if not format.signed and format.span == "sym":
        low, high = max(low, 0.0), max(high, 0.0)
    low, high = min(low, high), max(low, high)
    ends = torch.tensor([low, high])
    scale, zero_point = minmax_scale(ends[0], ends[1], format)
    assert (zero_point is not None) == format.has_zero_point
    zero = 0 if zero_point is None else int(zero_point)
    assert scale.dtype == torch.float32
    assert format.lowest <= zero <= format.highest
    if format.bits == 1 and format.signed:
        assert float(scale) == max(
            abs(low), abs(high), SMALLEST_SCALE
        )  # its values are the ends themselves; nothing lies between
        return
    # Zero has a code of its own, which may move the ends by half a step and rounding.
    values = on_grid(ends, format, scale, zero)
    assert ((values - ends).abs() <= scale * (0.5 + 1e-3)).all()
    assert on_grid(torch.zeros(1), format, scale, zero).item() == 0
    low, high = min(low, 0.0), max(high, 0.0)
    both = [high / format.highest, low / format.lowest if format.lowest else 0.0]
    finest = (high - low) / (format.highest - format.lowest) if format.has_zero_point else max(both)
    assert float(scale) == pytest.approx(finest, rel=1e-6, abs=SMALLEST_SCALE)


@pytest.mark.parametrize("name", MORE_BITS)
def test_a_range_of_one_value_is_defined(name: str) -> None:
    format = Format.parse(name)
    for value in (0.0, 5.0, -5.0, 1e-45):
        x = torch.tensor(value)
        scale, zero_point = minmax_scale(x, x, format)
        found = on_grid(x, format, scale, 0 if zero_point is None else zero_point)
        expected = max(value, 0.0) if format.lowest == 0 and zero_point is None else value
        assert found.item() == pytest.approx(expected, abs=1e-37)


def test_given_memory_changes_nothing() -> None:
    x = torch.randn(40, 3)
    for name in ("uint4", "int1", "fp4_e2m1"):
        memory = torch.full((40, 3), torch.nan)
        quantized = on_grid(x, Format.parse(name), 0.1, out=memory)
        assert quantized.data_ptr() == memory.data_ptr()
        assert torch.equal(quantized, on_grid(x, Format.parse(name), 0.1))


def test_layouts_keep_their_values() -> None:
    x, format = torch.randn(2, 3, 4, 5), Format.parse("uint4")
    expected = on_grid(x, format, 0.1, 5)
    for laid_out in (x.to(memory_format=torch.channels_last), x.transpose(1, 3).contiguous().transpose(1, 3)):
        before = laid_out.clone()
        assert torch.equal(on_grid(laid_out, format, 0.1, 5), expected)
        assert torch.equal(laid_out, before), "the input itself must not be altered"
