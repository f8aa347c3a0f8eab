"""KL calibration, against the definition in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hwmodels import Format
from search.quantize.ranges import Histogram, input_range
from search.quantize.ranges.density import Density, grid_units
from search.quantize.ranges.entropy import divergence
from search.quantize.ranges.weights import binned


def by_definition(counts: list[float], codes: list[float]) -> float:
    """KL(P || Q) of bins of width 1 around zero, bin by bin; `codes` are values on the same line, ascending."""
    half = len(counts) // 2
    low, high = codes[0], codes[-1]
    inside = [i for i in range(len(counts)) if i + 1 - half > low and i - half < high]
    occupied = [i for i in inside if counts[i]]
    if len(inside) < len(codes) or not occupied:
        return math.inf
    p = {i: counts[i] for i in occupied}
    p[occupied[0]] += sum(counts[: inside[0]])
    p[occupied[-1]] += sum(counts[inside[-1] + 1 :])
    shared: dict[int, list[int]] = {}
    for i in occupied:
        middle = i - half + 0.5
        nearest = min(range(len(codes)), key=lambda code: (abs(codes[code] - middle), -code))
        shared.setdefault(nearest, []).append(i)
    q = {i: sum(counts[j] for j in bins) / len(bins) for bins in shared.values() for i in bins}
    total_p, total_q = sum(p.values()), sum(q.values())
    return sum(p[i] / total_p * math.log(p[i] / total_p / (q[i] / total_q)) for i in occupied)


def test_reference_knows_what_is_obvious() -> None:
    assert by_definition([1, 1, 1, 1], [-2, -1, 0, 2]) == pytest.approx(0)
    assert by_definition([0, 1, 3, 0], [0, 1]) == math.inf
    by_hand = 2 * (1 / 8 * math.log(1 / 2) + 3 / 8 * math.log(3 / 2))
    assert by_definition([1, 3, 1, 3], [-2, 2]) == pytest.approx(by_hand)


@pytest.mark.parametrize("name", ["int1", "int2", "int3", "uint2", "uint3", "int3-asym", "uint3-sym", "fp4_e2m1"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition(name: str, seed: int) -> None:
    rng, format = np.random.default_rng(seed), Format.parse(name)
    counts = np.floor(rng.exponential(3, 64)) * (rng.random(64) > 0.3)
    density = Density(torch.from_numpy(counts)[None], torch.zeros(1), torch.ones(1, dtype=torch.float64))
    criterion, reached = divergence(density, format), 0
    for _ in range(12):
        scale = float(rng.uniform(0.3, 40) / format.largest)
        zero_point = int(rng.integers(format.lowest, format.highest + 1)) if format.has_zero_point else 0
        codes = [float(unit - zero_point) * scale for unit in grid_units(format, torch.device("cpu"))]
        zero = torch.tensor([[float(zero_point)]]) if format.has_zero_point else None
        found = criterion(torch.tensor([[scale]], dtype=torch.float64), zero).item()
        expected = by_definition(counts.tolist(), codes)
        assert found == pytest.approx(expected, abs=1e-9)
        reached += expected < math.inf
    assert reached > 3


def test_several_rows_and_candidates_at_once() -> None:
    rows, format = torch.randn(5, 200).clamp(-1.9, 1.9), Format.parse("uint3")
    density, scale = binned(rows, format), torch.rand(4, 5) * 0.2 + 0.1
    zero_point = torch.randint(8, (4, 5)).float()
    together = divergence(density, format)(scale, zero_point)
    for row in range(5):
        one = Density(density.counts[row : row + 1], density.zeros[row : row + 1], density.width[row : row + 1])
        alone = divergence(one, format)(scale[:, row : row + 1], zero_point[:, row : row + 1])
        assert torch.allclose(together[:, row], alone[:, 0])


def test_binned_rows_are_the_histogram_of_their_values() -> None:
    rows = torch.randn(3, 500).clamp(-1.99, 1.99)
    rows[:, :9] = 0
    density = binned(rows, Format.parse("int4"))
    for row, counts, zeros in zip(rows, density.counts, density.zeros, strict=True):
        seen = Histogram(density.half)
        seen.add(row)
        expected = Density.of_histogram(seen)
        assert expected.width == density.width[0]
        assert torch.equal(counts, expected.counts[0])
        assert zeros == expected.zeros == 9


@pytest.mark.parametrize("name", ["int4", "int8", "uint4", "uint8", "fp4_e2m1"])
def test_never_worse_than_minmax_and_clips_heavy_tails(name: str) -> None:
    x, format = torch.from_numpy(np.random.default_rng(0).standard_t(3, 50_000).astype(np.float32)), Format.parse(name)
    seen = Histogram()
    seen.add(x)
    criterion = divergence(Density.of_histogram(seen), format)

    def lost(method: str) -> float:
        found = input_range(seen, format, method)
        zero = torch.tensor([[float(found.zero_point)]]) if format.has_zero_point else None
        return criterion(torch.tensor([[found.scale]]), zero).item()

    assert lost("kl") < lost("minmax")
    assert input_range(seen, format, "kl").scale < 0.9 * input_range(seen, format, "minmax").scale


def test_zeros_change_nothing() -> None:
    x = torch.randn(20_000).relu()
    seen, fewer_zeros = Histogram(), Histogram()
    seen.add(x)
    fewer_zeros.add(x[x > 0])
    for name in ("uint4", "int4"):
        assert input_range(seen, Format.parse(name), "kl") == input_range(fewer_zeros, Format.parse(name), "kl")
