"""The sample of logits and the range that keeps their softmax."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hwmodels import Format
from search.quantize.inputs import input_quantizer
from search.quantize.ranges import Histogram, LogitSample, affine_range, input_range, logits


def sampled(*batches: torch.Tensor, seed: int = 0) -> LogitSample:
    sample = LogitSample(seed)
    for batch in batches:
        sample.add(batch)
    return sample


def seen_in(x: torch.Tensor) -> Histogram:
    seen = Histogram()
    seen.add(x)
    return seen


def test_few_rows_are_all_kept() -> None:
    x = torch.randn(20, 5)
    rows = sampled(x[:7], x[7:7], x[7:]).rows
    assert sorted(rows.tolist()) == sorted(x.tolist())
    assert len(LogitSample().rows) == 0


def test_the_sample_is_bounded_and_seeded() -> None:
    batches = torch.arange(40_000.0).reshape(8, 1250, 4)
    rows = sampled(*batches).rows
    assert rows.shape == (logits.MOST_ROWS, 4)
    assert torch.equal(rows, sampled(*batches).rows)
    assert not torch.equal(rows, sampled(*batches, seed=1).rows)
    assert len(rows.unique(dim=0)) == len(rows)
    per_batch = torch.bincount((rows[:, 0] / 5000).long(), minlength=8)
    assert per_batch.min() > 90, "every batch is as likely: 128 rows each, give or take 11"
    assert per_batch.max() < 166
    wide = sampled(*torch.randn(3, 40, 2**15)).rows
    assert wide.shape == (16, 2**15)
    assert sampled(torch.zeros(3, 2**20)).rows.shape == (1, 2**20)


def test_tokens_are_rows_and_types_become_float32() -> None:
    x = torch.randn(2, 3, 4).bfloat16()
    rows = sampled(x).rows
    assert rows.dtype == torch.float32
    assert sorted(rows.tolist()) == sorted(x.float().reshape(6, 4).tolist())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        sampled(torch.tensor([[0.0, torch.nan]]))
    with pytest.raises(ValueError, match="logits of 3 classes came after logits of 2"):
        sampled(torch.zeros(1, 2), torch.zeros(1, 3))


@pytest.mark.parametrize("name", ["uint4", "int4", "uint8", "int3-asym", "fp4_e2m1"])
def test_loses_least_of_all(name: str) -> None:
    format, x = Format.parse(name), torch.randn(200, 10) * 4 + torch.eye(10).repeat(20, 1) * 12
    seen, sample = seen_in(x), sampled(x)

    def lost(range_) -> float:
        return float(-(x.softmax(1) * F.log_softmax(input_quantizer(format, range_, 1)(x), 1)).sum(1).mean())

    found = lost(input_range(seen, format, "cross_entropy", logits=sample))
    others = [lost(input_range(seen, format, method)) for method in ("minmax", "mse", "percentile", "kl")]
    shares = torch.arange(1, 21).tolist()
    if format.grid == "int":
        others += [lost(affine_range(seen.lowest * a / 20, seen.highest * a / 20, format)) for a in shares]
    assert found <= min(others) * 1.002
    assert found >= float(-(x.softmax(1) * F.log_softmax(x, 1)).sum(1).mean()), "no softmax is nearer than itself"
