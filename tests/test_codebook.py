"""Codebooks: k-means against brute force and scikit-learn, NF4 against torchao."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import gaussian
from torch import Tensor

from hwmodels import Format
from search.quantize import codebook
from search.quantize.codebook import NF4, kmeans, nearest
from search.quantize.formats import defined_parameters, quantize_weight


def inertia(rows: Tensor, book: Tensor) -> Tensor:
    """The squared distance of each row's values to their entries, in float64."""
    return (rows.double() - book.gather(1, nearest(rows, book).long()).double()).square().sum(1)


def least_inertia(values: list[float], size: int) -> float:
    """By trying every way to cut the sorted values into at most `size` stretches."""
    values = sorted(values)
    best = float("inf")
    for cuts in itertools.combinations_with_replacement(range(len(values) + 1), size - 1):
        parts = np.split(np.array(values), cuts)
        best = min(best, sum(float(((part - part.mean()) ** 2).sum()) for part in parts if len(part)))
    return best


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9), st.sampled_from([2, 4]))
def test_no_other_clusters_are_better(values: list[int], size: int) -> None:
    rows = torch.tensor([values]).float()
    book = kmeans(rows, size)
    assert book.shape == (1, size)
    assert float(inertia(rows, book)) == pytest.approx(least_inertia(values, size), rel=1e-6, abs=1e-6)


SAMPLES = {
    "normal": lambda: torch.randn(6000),
    "uniform": lambda: torch.rand(6000),
    "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((6000,)),
    "heavy tails": lambda: torch.distributions.StudentT(1.5).sample((6000,)),
    "half zeros": lambda: torch.randn(6000).relu(),
    "two widths": lambda: torch.cat([torch.randn(3000) * 0.01, torch.randn(3000)]),
    "four bumps": lambda: torch.cat([torch.randn(1500) * 0.02 + i**2 for i in range(4)]),
    "one far away": lambda: torch.cat([torch.randn(5999), torch.tensor([1e4])]),
    "few": lambda: torch.randn(300),
}


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", SAMPLES)
def test_inertia_is_at_most_scikit_learns(name: str, bits: int) -> None:
    sklearn = pytest.importorskip("sklearn.cluster")
    rows = SAMPLES[name]()[None]
    reference = sklearn.KMeans(1 << bits, n_init=3 if bits < 8 else 1, random_state=0).fit(rows[0, :, None].double())
    assert float(inertia(rows, kmeans(rows, 1 << bits))) <= 1.001 * reference.inertia_


def test_every_row_has_a_book_of_its_own() -> None:
    rows = torch.randn(5, 70) * torch.logspace(-3, 3, 5)[:, None]
    together = kmeans(rows, 8)
    for row, book in zip(rows, together, strict=True):
        assert torch.equal(kmeans(row[None], 8)[0], book)


def test_rows_are_joined_in_parts_that_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(11, 200)
    expected = kmeans(rows, 4)
    monkeypatch.setattr(codebook, "TABLE_BYTES", 3 * 8 * 129**2)
    assert torch.equal(kmeans(rows, 4), expected)


@given(seed=st.integers(0, 2**16), exponent=st.integers(-60, 60))
def test_books_scale_with_the_values(seed: int, exponent: int) -> None:
    rows = gaussian((2, 300), seed)
    assert torch.equal(kmeans(rows * 2.0**exponent, 8), kmeans(rows, 8) * 2.0**exponent)


def test_padding_has_no_part_in_the_clusters() -> None:
    rows = torch.randn(3, 10) + 5
    padded = torch.cat([rows, torch.zeros(3, 4)], 1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, 10:] = False
    torch.testing.assert_close(kmeans(padded, 4, mask), kmeans(rows, 4))


@pytest.mark.parametrize("size", [2, 16, 256])
@given(seed=st.integers(0, 2**16), share=st.floats(0, 1))
@settings(max_examples=10)
def test_few_distinct_values_are_reproduced_exactly(size: int, seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    distinct = 1 + round(share * (size - 1))
    values = torch.randn(distinct, generator=generator) * 2.0 ** torch.randint(
        -30, 30, (distinct,), generator=generator
    )
    rows = values[torch.randint(distinct, (2, 1000), generator=generator)]
    book = kmeans(rows, size)
    assert torch.equal(book.gather(1, nearest(rows, book).long()), rows)
    assert torch.equal(book.sort(1).values, book)


def test_a_large_row_is_sampled_with_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(1, 20_000)
    rows[0, 7] = 30.0
    exact = inertia(rows, kmeans(rows, 16))
    monkeypatch.setattr(codebook, "LARGEST_SAMPLE", 4000)
    sampled = kmeans(rows, 16, seed=3)
    assert inertia(rows, sampled) < 1.1 * exact
    assert sampled[0, -1] == 30.0
    assert torch.equal(kmeans(rows, 16, seed=3), sampled)
    assert not torch.equal(kmeans(rows, 16, seed=4), sampled)


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=9), st.lists(st.floats(-150, 150, width=32)))
def test_the_nearest_entry_is_found(entries: list[float], values: list[float]) -> None:
    book = torch.tensor([sorted(entries)])
    rows = torch.tensor([[*values, *entries]])
    distances = (rows[0].double()[:, None] - book[0].double()).abs()
    found = distances.gather(1, nearest(rows, book)[0].long()[:, None])[:, 0]
    # Within an ulp of halfway either will do.
    assert (found <= distances.amin(1) + 1e-5).all()
    assert (found[len(values) :] == 0).all()


def test_halfway_the_lower_entry_is_taken() -> None:
    assert nearest(torch.tensor([[-0.5, 0.5, 1.5]]), torch.tensor([[-1.0, 0.0, 1.0, 2.0]])).tolist() == [[0, 1, 2]]


def test_entries_that_are_neighbouring_floats_find_themselves() -> None:
    book = torch.tensor([[1.0, 1 + 2.0**-23, 1 + 2.0**-22, 1.5]])
    assert nearest(book, book).tolist() == [[0, 1, 2, 3]]


def test_nf4_values_are_quantiles_of_the_normal_distribution() -> None:
    """QLoRA, appendix E: 8 quantiles on the positive side, 7 on the negative, and zero, scaled to [-1, 1]."""
    from scipy.stats import norm

    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, [0], negative]))
    assert np.allclose(NF4, values / values.max(), atol=2e-6)


def test_nf4_codes_equal_torchaos() -> None:
    """Whose table has four decimals only, and whose scales are quantized once more; the codes are found alike."""
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor").NF4Tensor
    weight, format = torch.randn(64, 64), Format.parse("nf4")
    table = torch.tensor(NF4)
    torch.testing.assert_close(nf4.from_tensor(weight, 64, 64).nf4, table, rtol=0, atol=5.1e-5)
    parameters = defined_parameters(weight, format, 0)
    assert parameters is not None
    assert torch.equal(parameters["scale"], weight.abs().amax(1))
    codes = nf4.quantize_tensor_nearest((weight / parameters["scale"][:, None]).flatten(), table)
    expected = table[codes].view(64, 64) * parameters["scale"][:, None]
    assert torch.equal(quantize_weight(weight, format, 0, parameters), expected)
