"""OCTAV's recursion, against the published optima, its own objective and brute force."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from hwmodels import Format
from search.quantize.ranges import Histogram, input_range, weight_parameters
from search.quantize.ranges.density import Density
from search.quantize.ranges.octav import octav_ends, tails_of_density, tails_of_rows
from search.quantize.ranges.weights import noise_loss

# Banner et al., "Post training 4-bit quantization of convolutional networks", NeurIPS 2019, arXiv 1810.05723: clipping
# in units of sigma, or of Laplace's b, for steps of s / 2**(bits - 1). They let clipped values be rounded too.
ACIQ = {"norm": {4: 2.55913646, 6: 3.28691474, 8: 3.92403714}, "laplace": {4: 5.02864014, 6: 7.41312622, 8: 9.89675982}}


def quantiles(name: str, count: int = 400_000) -> torch.Tensor:
    """Evenly spaced quantiles of a distribution: a sample without noise."""
    return torch.from_numpy(getattr(stats, name).ppf((np.arange(count) + 0.5) / count))


def published(bits: int) -> SimpleNamespace:
    """The paper's quantizer, whose range is `2**(bits - 1)` steps to either side."""
    return SimpleNamespace(has_zero_point=False, lowest=-(2 ** (bits - 1)), highest=2 ** (bits - 1))


def ends_of(rows: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
    return octav_ends(tails_of_rows(rows), low, high, format)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("name", ["norm", "laplace"])
def test_published_optima(name: str, bits: int) -> None:
    low, high = ends_of(quantiles(name)[None], published(bits))
    assert high.item() == pytest.approx(ACIQ[name][bits], rel=0.01)
    assert low.item() == -high.item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_fixed_point_of_a_laplace_distribution_in_closed_form(bits: int) -> None:
    """For b = 1, P(|x| > s) = exp(-s) and E[|x|; |x| > s] = (s + 1) exp(-s)."""
    s = ends_of(quantiles("laplace")[None], published(bits))[1].item()
    outside, noise = np.exp(-s), 4.0**-bits / 3
    assert s == pytest.approx((s + 1) * outside / (noise * (1 - outside) + outside), rel=2e-3 if bits < 8 else 1e-2)


@pytest.mark.parametrize("name", ["int3", "int4", "uint4", "int4-asym", "uint4-sym", "uint8"])
@pytest.mark.parametrize("kind", ["gauss", "skewed", "rectified", "heavy"])
def test_nearly_the_least_of_its_objective(name: str, kind: str) -> None:
    rng, format = np.random.default_rng(0), Format.parse(name)
    gauss = rng.standard_normal(4000)
    x = {"gauss": gauss, "skewed": np.exp(gauss) - 0.5, "rectified": gauss.clip(0), "heavy": rng.standard_t(3, 4000)}[
        kind
    ]
    rows = torch.from_numpy(x)[None]
    criterion = noise_loss(rows, format)

    def lost(low: float, high: float) -> float:
        if format.has_zero_point:  # let the zero point lie between codes, so that the ends are those asked for
            scale = (high - low) / (format.highest - format.lowest)
            return float(criterion(torch.tensor([[scale]]), torch.tensor([[format.lowest - low / scale]])))
        return float(criterion(torch.tensor([[high / format.highest]]), None))

    low, high = (float(end) for end in ends_of(rows, format))
    lows = np.arange(1, 41) / 40 * min(x.min(), 0)
    lows = lows if format.has_zero_point and x.min() < 0 else [0.0]
    best = min(lost(a, b) for a in lows for b in np.arange(1, 41) / 40 * np.abs(x).max())
    # Newton's method leaves out how many values the end passes, which are many where a skewed density ends abruptly.
    assert lost(low, high) <= (1.1 if kind == "skewed" else 1.02) * best


@pytest.mark.parametrize("name", ["int4", "uint4", "uint4-sym", "int8"])
def test_binned_values_have_the_ends_of_the_values(name: str) -> None:
    format, x = Format.parse(name), quantiles("laplace", 50_000) + 0.3
    seen = Histogram()
    seen.add(x)
    density = Density.of_histogram(seen)
    ends = torch.tensor([seen.lowest]).double(), torch.tensor([seen.highest]).double()
    binned = octav_ends(tails_of_density(density), *ends, format)
    for found, expected in zip(binned, ends_of(x[None], format), strict=True):
        assert found.item() == pytest.approx(expected.item(), rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "uint4", "uint8", "int4-asym", "int4-full"])
def test_never_worse_than_minmax_by_its_objective(name: str) -> None:
    format, weight = Format.parse(name), torch.cat([torch.randn(20, 30), torch.rand(20, 30), torch.randn(20, 30).exp()])
    criterion = noise_loss(weight, format)

    def lost(method: str) -> torch.Tensor:
        found = weight_parameters(weight, format, 0, method)
        return criterion(found["scale"][None], found["zero_point"][None].float() if "zero_point" in found else None)

    assert (lost("octav") <= lost("minmax") * (1 + 1e-5)).all()


def test_zeros_change_nothing() -> None:
    x = torch.randn(2000)
    with_zeros = torch.cat([x, torch.zeros(5000)])
    for name in ("int4", "uint4"):
        format = Format.parse(name)
        expected = weight_parameters(x[None], format, 0, "octav")["scale"]
        assert torch.allclose(weight_parameters(with_zeros[None], format, 0, "octav")["scale"], expected, rtol=1e-5)
        seen, seen_with_zeros = Histogram(), Histogram()
        seen.add(x)
        seen_with_zeros.add(with_zeros)
        assert input_range(seen_with_zeros, format, "octav") == input_range(seen, format, "octav")


def test_a_constant_is_not_clipped() -> None:
    rows = torch.full((1, 10), 3.0)
    low, high = ends_of(rows, Format.parse("int4"))
    assert (low.item(), high.item()) == (0.0, 3.0)
    low, high = ends_of(rows, Format.parse("uint4"))
    assert (low.item(), high.item()) == (0.0, 3.0)
    low, high = ends_of(torch.zeros(1, 4), Format.parse("int4"))
    assert (low.item(), high.item()) == (0.0, 0.0)
