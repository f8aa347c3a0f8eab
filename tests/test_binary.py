"""Binary and ternary weights by the equations of their papers."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from tensors import parameters_for, weights
from torch import Tensor

from hwmodels import Format
from search.quantize.binary import random_signs
from search.quantize.formats import decode, defined_parameters, encode, quantize_weight


def quantized(weight: Tensor, name: str, axis: int = 0) -> Tensor:
    format = Format.parse(name)
    return quantize_weight(weight, format, axis, parameters_for(weight, format, axis))


@given(weights())
def test_bwn_is_the_sign_times_the_mean_magnitude_of_a_channel(drawn: tuple[Tensor, int]) -> None:
    weight, axis = drawn
    others = [dim for dim in range(weight.dim()) if dim != axis]
    scale = weight.abs().mean(others, keepdim=True) if others else weight.abs()
    expected = torch.where(weight >= 0, scale, -scale)
    torch.testing.assert_close(quantized(weight, "binary", axis), expected, rtol=1e-5, atol=0)


def test_no_binary_weights_are_nearer_than_bwns() -> None:
    weight = torch.randn(1, 6)
    least = min(
        float((weight - scale * torch.tensor(signs)).square().sum())
        for signs in itertools.product([-1.0, 1.0], repeat=6)
        for scale in torch.linspace(0, 2, 401)
    )
    assert float((quantized(weight, "binary") - weight).square().sum()) <= least


def test_twn_follows_its_equations() -> None:
    weight = torch.tensor([[0.1, -0.2, 0.9, -1.1, 0.0, 0.3], [5.0, 5.0, 5.0, 5.0, 5.0, 5.0]])
    parameters = defined_parameters(weight, Format.parse("ternary"), 0)
    assert parameters is not None
    mean = 2.6 / 6
    torch.testing.assert_close(parameters["threshold"], torch.tensor([0.7 * mean, 3.5]))
    torch.testing.assert_close(parameters["scale"], torch.tensor([1.0, 5.0]))
    assert quantized(weight, "ternary").tolist() == [[0, 0, 1, -1, 0, 0], [5] * 6]


def test_ttq_starts_from_the_means_on_either_side() -> None:
    weight = torch.tensor([[0.04, 2.0, 1.0, -0.4, -0.049, -0.2], [1.0, 2.0, 3.0, 4.0, 0.0, 0.1]])
    parameters = defined_parameters(weight, Format.parse("ttq"), 0)
    assert parameters is not None
    torch.testing.assert_close(parameters["threshold"], torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(parameters["scale"], torch.tensor([1.5, 2.5]))
    torch.testing.assert_close(parameters["negative_scale"], torch.tensor([0.3, 0.0]))
    expected = torch.tensor([[0, 1.5, 1.5, -0.3, 0, -0.3], [2.5, 2.5, 2.5, 2.5, 0, 0]])
    torch.testing.assert_close(quantized(weight, "ttq"), expected)


def test_learned_scales_are_the_ones_used() -> None:
    format, weight = Format.parse("ttq"), torch.tensor([[-1.0, 0.0, 1.0]])
    parameters = parameters_for(weight, format, 0) | {
        "scale": torch.tensor([0.7]),
        "negative_scale": torch.tensor([3.0]),
    }
    torch.testing.assert_close(quantize_weight(weight, format, 0, parameters), torch.tensor([[-3.0, 0.0, 0.7]]))


@pytest.mark.parametrize("name", ["binary", "ternary", "ttq"])
def test_padding_has_no_part_in_the_means(name: str) -> None:
    weight = torch.randn(4, 6)
    whole = quantized(weight, f"{name}-g4")
    torch.testing.assert_close(whole[:, 4:], quantized(weight[:, 4:], name))
    torch.testing.assert_close(whole[:, :4], quantized(weight[:, :4], name))


@pytest.mark.parametrize("name", ["binary", "binary-stochastic", "ternary", "ttq"])
def test_zeros_stay_zero(name: str) -> None:
    assert torch.equal(quantized(torch.zeros(3, 4), name), torch.zeros(3, 4))


def test_random_signs_have_the_weights_for_their_mean() -> None:
    """BinaryConnect's hard sigmoid: the expected value is the weight, clamped to the scale."""
    rows = torch.linspace(-2, 2, 41)[None]
    scale = torch.tensor([1.25])
    drawn = torch.stack([random_signs(rows, scale, seed) for seed in range(2000)]).float() * scale
    expected = rows.clamp(-1.25, 1.25)
    assert (drawn.mean(0) - expected).abs().amax() < 4.5 * 1.25 / 2000**0.5  # standard errors
    assert torch.equal(drawn.mean(0)[expected.abs() == 1.25], expected[expected.abs() == 1.25])


def test_random_rounding_is_repeated_by_its_seed() -> None:
    format, weight = Format.parse("binary-stochastic"), torch.randn(8, 40)
    runs = [defined_parameters(weight, format, 0, seed) for seed in (1, 1, 2)]
    first, again, other = (quantize_weight(weight, format, 0, run) for run in runs if run is not None)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_codes_are_signs_and_zeros() -> None:
    rows = torch.tensor([[-1.0, -0.01, 0.0, 0.01, 1.0]])
    for name, expected in (("binary", [-1, -1, 1, 1, 1]), ("ternary", [-1, 0, 0, 0, 1]), ("ttq", [-1, 0, 0, 0, 1])):
        format = Format.parse(name)
        parameters = parameters_for(rows, format, 0)
        codes = encode(rows, format, parameters)
        assert codes.tolist() == [expected]
        assert torch.equal(decode(codes, format, parameters), quantize_weight(rows, format, 0, parameters))
