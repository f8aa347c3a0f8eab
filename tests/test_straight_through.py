"""Fake quantization: the engine's values forward; gradients against closed forms and torch's own operators."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hwmodels import Format
from search.quantize.affine import Range
from search.quantize.formats import quantize_weight
from search.quantize.grouping import to_groups
from search.quantize.inputs import input_quantizer
from search.quantize.ranges import weight_parameters
from search.quantize.straight_through import damped, fake_quantize, fake_quantize_input, learned_parameters

WEIGHTS = (
    *("int1", "int2", "int4-full", "int8", "uint3", "int4-asym", "int3-g5", "uint4-tensor", "int16"),
    *("binary", "binary-stochastic", "ternary", "ttq", "ternary-g4", "codebook2", "codebook3-channel", "nf4"),
    *("fp4_e2m1", "fp6_e3m2-tensor", "fp8_e4m3", "fp8_e5m2-g4", "mxfp4", "mxint8", "nvfp4", "fp16", "bf16"),
)
STATIC = ("int4", "uint8", "int8-asym", "uint4-sym", "fp8_e4m3", "fp4_e2m1-tensor")
DYNAMIC = ("int8-token", "uint4-dynamic", "int4-g4", "fp8_e4m3-token", "mxfp6", "mxint8", "nvfp4", "fp16", "bf16")


def parameters_of(weight: Tensor, format: Format, axis: int) -> dict[str, Tensor]:
    return weight_parameters(weight, format, axis)


def requiring(parameters: dict[str, Tensor], format: Format) -> dict[str, Tensor]:
    """The same parameters, those that are learned with a gradient."""
    names = learned_parameters(format)
    return {name: value.clone().requires_grad_(name in names) for name, value in parameters.items()}


def random_weight(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian values, every channel of another magnitude."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = torch.rand(shape[0], generator=generator).view(-1, *[1] * (len(shape) - 1))
    return (torch.randn(shape, generator=generator) * magnitudes).to(dtype)


@pytest.mark.parametrize("name", WEIGHTS)
@settings(max_examples=15)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple),
    axis=st.integers(0, 1),
    seed=st.integers(0, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_weights_take_the_values_of_the_engine(name, shape, axis, seed, dtype):
    format, weight = Format.parse(name), random_weight(shape, seed, dtype)
    parameters = parameters_of(weight, format, axis)
    expected = quantize_weight(weight, format, axis, parameters)
    found = fake_quantize(weight.requires_grad_(), format, axis, requiring(parameters, format))
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    found.float().square().sum().backward()
    assert weight.grad.shape == weight.shape
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("name", [*STATIC, *DYNAMIC])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", [1, -1])
def test_inputs_take_the_values_of_the_engine(name, dtype, axis):
    format = Format.parse(name)
    x = torch.randn(3, 8, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    range_ = Range(0.25, 2 if format.has_zero_point else 0) if name in STATIC else None
    expected = input_quantizer(format, range_, axis)(x.detach())
    scale = torch.tensor(0.25, requires_grad=True) if range_ else None
    found = fake_quantize_input(x, format, axis, scale, range_.zero_point if range_ else 0)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    found.sum().backward()
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    if range_ is None:
        assert (x.grad == 1).all()


def test_float_is_left_alone():
    x = torch.randn(2, 3)
    assert fake_quantize(x, Format.parse("float"), 0, {}) is x
    assert fake_quantize_input(x, Format.parse("float"), -1) is x


LINES = {
    "int2": (-1, 1, 0),
    "int4": (-7, 7, 0),
    "int4-full": (-8, 7, 0),
    "uint4-sym": (0, 15, 0),
    "uint4": (0, 15, 6),
    "int3-asym": (-4, 3, -1),
    "int1": (-1, 1, 0),
}


@pytest.mark.parametrize("name", LINES)
def test_integers_value_by_value(name):
    """LSQ's equations written out for one number at a time, with zero point and per-channel scales."""
    format, (lowest, highest, zero_point) = Format.parse(name), LINES[name]
    weight = (torch.randn(3, 50) * 4).requires_grad_()
    scale = torch.tensor([0.3, 0.7, 1.9], requires_grad=True)
    parameters = {"scale": scale}
    if format.has_zero_point:
        parameters["zero_point"] = torch.full((3,), zero_point, dtype=torch.int32)
    upstream = torch.randn(3, 50)
    values = fake_quantize(weight, format, 0, parameters)
    values.backward(upstream)
    for channel in range(3):
        s, expected = scale[channel].item(), 0.0
        columns = (weight[channel], values[channel], upstream[channel], weight.grad[channel])
        for x, q, g, to_x in zip(*columns, strict=True):
            position = x.item() / s
            is_inside = lowest - zero_point <= position <= highest - zero_point
            assert to_x == (g if is_inside else 0)
            steps = q.item() / s
            expected += g.item() * (steps - position if is_inside else steps)
            if not is_inside:
                assert steps == pytest.approx((lowest if position < 0 else highest) - zero_point)
        assert scale.grad[channel].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_ends_of_the_range_are_inside():
    weight = torch.tensor([[-3.0001, -3.0, 0.2, 3.0, 3.0001]], requires_grad=True)
    scale = torch.tensor([1.0], requires_grad=True)
    fake_quantize(weight, Format.parse("int3"), 0, {"scale": scale}).sum().backward()
    assert weight.grad.tolist() == [[0, 1, 1, 1, 0]]
    assert scale.grad.item() == pytest.approx(-3 + 0 - 0.2 + 0 + 3)


def away_from_the_ends(x: Tensor, scale: float, lowest: int, highest: int) -> Tensor:
    """Moves values out of the half step beyond either end, where torch calls inside what LSQ calls outside."""
    steps = x / scale
    steps = torch.where((steps > highest) & (steps < highest + 0.51), steps + 0.6, steps)
    return torch.where((steps < lowest) & (steps > lowest - 0.51), steps - 0.6, steps) * scale


@pytest.mark.parametrize(("name", "zero_point"), [("int4-full", 0), ("uint4", 5), ("uint8-sym", 0), ("int2-asym", 1)])
def test_torch_has_the_same_gradients_per_tensor(name, zero_point):
    format = Format.parse(name)
    ends = (format.lowest - zero_point, format.highest - zero_point)
    data, upstream = away_from_the_ends(torch.randn(4, 6, 5, 5) * 2, 0.25, *ends), torch.randn(4, 6, 5, 5)
    x, scale = data.clone().requires_grad_(), torch.tensor(0.25, requires_grad=True)
    found = fake_quantize_input(x, format, 1, damped(scale, data.numel(), format), zero_point)
    found.backward(upstream)
    theirs, their_scale = data.clone().requires_grad_(), torch.tensor([0.25], requires_grad=True)
    factor = 1 / math.sqrt(data.numel() * format.highest)
    expected = torch._fake_quantize_learnable_per_tensor_affine(
        theirs, their_scale, torch.tensor([float(zero_point)]), format.lowest, format.highest, factor
    )
    expected.backward(upstream)
    torch.testing.assert_close(found, expected)
    assert torch.equal(x.grad, theirs.grad)
    torch.testing.assert_close(scale.grad, their_scale.grad[0], rtol=1e-4, atol=1e-5)


def test_torch_has_the_same_gradients_per_channel():
    format, scales = Format.parse("int4-full"), torch.tensor([0.1, 0.25, 0.5])
    data = torch.stack([away_from_the_ends(torch.randn(40), s, -8, 7) for s in scales.tolist()])
    upstream, zeros = torch.randn(3, 40), torch.zeros(3, dtype=torch.int32)
    x, scale = data.clone().requires_grad_(), scales.clone().requires_grad_()
    fake_quantize(x, format, 0, {"scale": scale}).backward(upstream)
    plain = data.clone().requires_grad_()
    torch.fake_quantize_per_channel_affine(plain, scales, zeros, 0, -8, 7).backward(upstream)
    assert torch.equal(x.grad, plain.grad)
    learned, their_scale = data.clone().requires_grad_(), scales.clone().requires_grad_()
    expected = torch._fake_quantize_learnable_per_channel_affine(learned, their_scale, zeros.float(), 0, -8, 7, 1.0)
    expected.backward(upstream)
    assert torch.equal(x.grad, learned.grad)
    torch.testing.assert_close(scale.grad, their_scale.grad, rtol=1e-4, atol=1e-5)


def test_torch_differs_in_the_half_step_beyond_an_end():
    beyond = torch.tensor([[7.3]])
    ours, theirs = beyond.clone().requires_grad_(), beyond.clone().requires_grad_()
    fake_quantize(ours, Format.parse("int4-full"), 0, {"scale": torch.ones(1)}).backward()
    torch.fake_quantize_per_tensor_affine(theirs, 1.0, 0, -8, 7).backward()
    assert (ours.grad.item(), theirs.grad.item()) == (0, 1)


@pytest.mark.parametrize(("name", "largest"), [("fp4_e2m1", 6.0), ("fp8_e4m3", 448.0), ("fp6_e2m3", 7.5)])
def test_minifloats_have_the_gradients_of_integers(name, largest):
    format, upstream = Format.parse(name), torch.randn(2, 60)
    weight = (torch.randn(2, 60) * largest * 0.7).requires_grad_()
    scale = torch.tensor([0.5, 1.1], requires_grad=True)
    values = fake_quantize(weight, format, 0, {"scale": scale})
    values.backward(upstream)
    inside = weight.detach().abs() <= largest * scale.detach()[:, None]
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(weight.grad, upstream * inside)
    units = (values - torch.where(inside, weight, 0)).detach() / scale.detach()[:, None]
    torch.testing.assert_close(scale.grad, (upstream * units).sum(1))


def test_binary_passes_what_its_scale_reaches():
    weight, upstream = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    scale = weight.detach().abs().mean(1).requires_grad_()
    fake_quantize(weight, Format.parse("binary"), 0, {"scale": scale}).backward(upstream)
    assert torch.equal(weight.grad, upstream * (weight.detach().abs() <= scale.detach()[:, None]))
    torch.testing.assert_close(scale.grad, (upstream * weight.detach().sign()).sum(1))


def test_ternary_passes_everything():
    weight, upstream = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    parameters = parameters_of(weight.detach(), Format.parse("ternary"), 0)
    fake_quantize(weight, Format.parse("ternary"), 0, parameters).backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_ttq_sums_over_the_positive_and_the_negative_set():
    weight = torch.tensor([[-2.0, -0.1, 0.05, 0.3, 3.0]], requires_grad=True)
    parameters = {
        "scale": torch.tensor([1.5], requires_grad=True),
        "negative_scale": torch.tensor([0.7], requires_grad=True),
        "threshold": torch.tensor([0.15]),
    }
    values = fake_quantize(weight, Format.parse("ttq"), 0, parameters)
    torch.testing.assert_close(values, torch.tensor([[-0.7, 0, 0, 1.5, 1.5]]))
    values.backward(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]))
    assert parameters["scale"].grad.item() == 8 + 16
    assert parameters["negative_scale"].grad.item() == -1
    torch.testing.assert_close(weight.grad, torch.tensor([[0.7, 2.0, 4.0, 12.0, 24.0]]))


def test_an_entry_of_a_codebook_sums_over_its_cluster():
    weight, upstream = torch.randn(6, 8, requires_grad=True), torch.randn(6, 8)
    format = Format.parse("codebook2")
    book = parameters_of(weight.detach(), format, 0)["codebook"].requires_grad_()
    values = fake_quantize(weight, format, 0, {"codebook": book})
    values.backward(upstream)
    assert torch.equal(weight.grad, upstream)
    nearest = (weight.detach().reshape(-1, 1) - book.detach()).abs().argmin(1)
    expected = torch.stack([upstream.reshape(-1)[nearest == entry].sum() for entry in range(4)])
    torch.testing.assert_close(book.grad[0], expected)


@pytest.mark.parametrize("name", ["mxfp4", "mxint8", "nvfp4", "nf4", "fp16", "bf16"])
def test_what_follows_from_the_values_passes_everything(name):
    format = Format.parse(name)
    assert learned_parameters(format) == ()
    weight, upstream = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    fake_quantize(weight, format, 0, parameters_of(weight.detach(), format, 0)).backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_padding_has_no_part_in_the_gradients():
    format = Format.parse("int3-g4")
    weight, upstream = torch.randn(2, 6, requires_grad=True), torch.randn(2, 6)
    scale = torch.full((4,), 0.4, requires_grad=True)
    fake_quantize(weight, format, 0, {"scale": scale}).backward(upstream)
    padded = torch.zeros(2, 8)
    padded[:, :6] = weight.detach()
    rows = padded.view(4, 4).requires_grad_()
    alone = torch.full((4,), 0.4, requires_grad=True)
    fake_quantize(rows, Format.parse("int3"), 0, {"scale": alone}).backward(to_groups(upstream, format).rows)
    torch.testing.assert_close(scale.grad, alone.grad)
    assert torch.equal(weight.grad, rows.grad.view(2, 8)[:, :6])


@given(values=st.integers(1, 10_000), name=st.sampled_from(["int2", "uint8", "fp4_e2m1"]))
def test_damping_changes_the_gradient_alone(values, name):
    format, scale = Format.parse(name), torch.tensor([0.1, 0.7], requires_grad=True)
    found = damped(scale, values, format)
    assert torch.equal(found, scale)
    found.sum().backward()
    top = {"int2": 1, "uint8": 255, "fp4_e2m1": 6}[name]
    torch.testing.assert_close(scale.grad, torch.full((2,), (values * top) ** -0.5))


def test_an_input_may_be_overwritten_afterwards():
    x, scale = torch.randn(5, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    inner = x * 2
    values = fake_quantize_input(inner, Format.parse("int4"), -1, scale)
    inner.zero_()
    values.relu_().sum().backward()
    assert x.grad is not None


def test_all_zeros_and_empty_batches():
    scale = torch.tensor([1e-38], requires_grad=True)
    weight = torch.zeros(1, 4, requires_grad=True)
    fake_quantize(weight, Format.parse("int4"), 0, {"scale": scale}).sum().backward()
    assert scale.grad.item() == 0
    empty = torch.zeros(0, 4, requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    fake_quantize_input(empty, Format.parse("uint8"), -1, damped(step, 0, Format.parse("uint8"))).sum().backward()
    assert step.grad.item() == 0
