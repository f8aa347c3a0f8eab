"""What repairs gather from a stream: the same as from all of it at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from repairing import LAYERS
from torch import nn

from search.recover.statistics import Gram, Moments, Sample, matrix_error
from search.recover.unfold import as_matrix, output_rows, patches


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(sum), st.floats(-1e3, 1e3), st.sampled_from([1, -1]))
def test_moments_do_not_depend_on_batches(sizes: list[int], offset: float, axis: int) -> None:
    x = torch.randn(sum(sizes), 3, 4, generator=torch.Generator().manual_seed(sum(sizes))) + offset
    moments = Moments(axis)
    for batch in x.split(sizes):
        moments.add(batch)
    rows = x.double().movedim(axis, -1).flatten(0, 1)
    torch.testing.assert_close(moments.mean, rows.mean(0), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(moments.variance, rows.var(0), rtol=1e-5, atol=1e-9)
    assert moments.count == len(rows)


def test_moments_of_half_types_are_summed_in_double() -> None:
    x = (torch.randn(4096, 2) + 100).bfloat16()
    moments = Moments(-1)
    moments.add(x)
    torch.testing.assert_close(moments.mean, x.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.variance, x.double().var(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_gram_gives_the_output_error(name: str) -> None:
    module, shape = LAYERS[name]
    batches, gram = [torch.randn(shape), torch.randn(shape)], Gram(module)
    for batch in batches:
        gram.add(batch)
    error = torch.randn_like(module.weight)
    squares = sum((patches(module, batch) @ as_matrix(module, error).mT).square().sum(1) for batch in batches)
    torch.testing.assert_close(matrix_error(as_matrix(module, error), gram.value).float(), squares)


def test_a_sample_as_large_as_the_stream_is_the_stream() -> None:
    sample, stream = Sample(100, seed=0), torch.arange(30.0).view(1, -1, 1)
    for batch in stream.split(7, 1):
        sample.add(batch.shape[1], lambda rows, batch=batch: batch[:, rows])
    assert sample.rows.flatten().sort().values.tolist() == list(range(30))
    assert sample.batches == [7, 7, 7, 7, 2]


def test_every_row_has_the_same_chance() -> None:
    stream, counts, seeds = torch.arange(20).view(1, -1, 1), torch.zeros(20), 400
    for seed in range(seeds):
        sample = Sample(5, seed)
        for batch in stream.split(6, 1):
            sample.add(batch.shape[1], lambda rows, batch=batch: batch[:, rows])
        assert sample.rows.unique().numel() == 5
        counts[sample.rows.flatten()] += 1
    expected = seeds * 5 / 20
    assert ((counts - expected).square() / expected).sum() < 43.8  # 99.9% of chi squared with 19 degrees of freedom


def test_samples_of_one_seed_choose_the_same_positions() -> None:
    module = nn.Conv2d(2, 4, 3, groups=2)
    seen, wanted = Sample(9, 3), Sample(9, 3)
    for x in torch.randn(12, 2, 6, 6).split(5):
        y = module(x).detach()
        wanted.add(len(y) * 16, lambda rows, y=y: output_rows(module, y, rows))
        seen.add(len(x) * 16, lambda rows, x=x: patches(module, x, rows))
    torch.testing.assert_close(
        seen.rows @ as_matrix(module, module.weight.detach()).mT + module.bias.detach().view(2, 1, -1), wanted.rows
    )
    assert seen.batches == wanted.batches
