"""Coordinates of output changes in closed form: Fisher metric, squared error, any divergence's second derivative."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import TinyTask
from torch import Tensor
from torch.nn import functional as F

from search.errors import UnsupportedError
from search.sensitivity.tangent import Projection, belongs, root_of_curvature, slope, tangent
from search.tasks.function import FunctionTask


def products(a: Tensor, b: Tensor) -> Tensor:
    """The product of every sample's rows."""
    return (a * b).sum(1)


def fisher(logits: Tensor) -> Tensor:
    """`diag p - p p'` of every row."""
    p = logits.softmax(-1)
    return p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)


def squared_error_task() -> FunctionTask:
    return FunctionTask(torch.nn.Identity(), torch.zeros(1), [0], lambda model, split: 0.0, divergence="squared_error")


@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 5), (6, 2, 3, 5)])
def test_logits_have_the_fisher_metric(shape: tuple[int, ...]) -> None:
    z, a, b = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    task = TinyTask()
    expected = torch.einsum("...i,...ij,...j->...", a, fisher(z), b).reshape(6, -1).mean(1)
    assert torch.allclose(products(task.tangent(z, a), task.tangent(z, b)), expected, rtol=1e-12)


def test_linear_softmax_model_in_closed_form() -> None:
    """The Fisher matrix of `z = W x` is the mean of `(diag p - p p') kron x x'`."""
    x, weight = torch.randn(30, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    z = x @ weight.T
    matrix = sum(torch.kron(metric, torch.outer(row, row)) for metric, row in zip(fisher(z), x, strict=True)) / len(x)
    changes = torch.randn(5, 3, 4, dtype=torch.float64)
    rows = torch.stack([tangent(TinyTask(), z, x @ change.T).flatten() for change in changes])
    flat = changes.flatten(1)
    assert torch.allclose(rows @ rows.T / len(x), flat @ matrix @ flat.T, rtol=1e-10)


@pytest.mark.parametrize("task", [TinyTask(), squared_error_task()], ids=["kl", "squared_error"])
def test_half_the_squared_length_is_the_divergence_of_a_small_change(task) -> None:
    z, change = torch.randn(8, 3, 5, dtype=torch.float64), 1e-4 * torch.randn(8, 3, 5, dtype=torch.float64)
    length = tangent(task, z, change).square().sum(1)
    assert torch.allclose(length, 2 * task.divergence(z, z + change), rtol=1e-3)


def test_squared_error_is_exact_at_any_distance() -> None:
    task, z, change = squared_error_task(), torch.randn(8, 7), 10 * torch.randn(8, 7)
    assert torch.allclose(
        task.tangent(z, change).square().sum(1).double(), 2 * task.divergence(z, z + change), rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_computed_in_float32(dtype: torch.dtype) -> None:
    z, change = torch.randn(4, 5).to(dtype), (0.1 * torch.randn(4, 5)).to(dtype)
    found = TinyTask().tangent(z, change)
    assert found.dtype == torch.float32
    assert torch.equal(found, TinyTask().tangent(z.float(), change.float()))


class Own(TinyTask):
    """A divergence of its own and nothing else: the default one, computed another way."""

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        each = F.kl_div(outputs.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True)
        return each.sum(-1).reshape(len(reference), -1).mean(1)


class OwnWithTangent(Own):
    def tangent(self, reference: Tensor, change: Tensor) -> Tensor:
        return 3 * change


def test_methods_belong_to_the_divergence_they_were_written_for() -> None:
    assert belongs(TinyTask(), "tangent")
    assert belongs(TinyTask(), "targets")
    assert belongs(squared_error_task(), "tangent")
    assert not belongs(Own(), "tangent")
    assert not belongs(Own(), "targets")
    assert belongs(OwnWithTangent(), "tangent")
    assert torch.equal(tangent(OwnWithTangent(), torch.zeros(2, 3), torch.ones(2, 3)), torch.full((2, 3), 3.0))


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5)])
def test_divergence_alone_gives_the_same_metric(shape: tuple[int, ...]) -> None:
    z, a, b = (torch.randn(shape) for _ in range(3))
    found = products(tangent(Own(), z, a), tangent(Own(), z, b))
    expected = products(*(TinyTask().tangent(z.double(), change.double()) for change in (a, b)))
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("size", "exact"), [(12, True), (60, False)])
def test_roots_of_any_second_derivative(size: int, exact: bool) -> None:
    """Lengths are exact for any number of outputs, products as long as there are no more than Lanczos steps."""
    roots = torch.randn(3, size, size, dtype=torch.float64)
    curvatures = roots @ roots.mT / size

    def divergence(reference: Tensor, outputs: Tensor) -> Tensor:
        change = outputs - reference
        return torch.einsum("ni,nij,nj->n", change, curvatures, change) / 2 + change.pow(4).sum(1)

    z, a, b = (torch.randn(3, size, dtype=torch.float64) for _ in range(3))
    found = [root_of_curvature(divergence, z, change) for change in (a, b)]
    expected = torch.einsum("ni,nij,nkj->nk", a, curvatures, torch.stack([a, b], 1))
    assert torch.allclose(products(found[0], found[0]), expected[:, 0], rtol=1e-9)
    tolerance = {"rtol": 1e-7} if exact else {"atol": 1e-3 * float(expected[:, 0].max())}
    assert torch.allclose(products(*found), expected[:, 1], **tolerance)


def test_a_sample_that_does_not_change() -> None:
    z, change = torch.randn(3, 5), torch.randn(3, 5)
    change[1] = 0
    found = tangent(Own(), z, change)
    assert not found[1].any()
    assert torch.allclose(found[2], tangent(Own(), z[2:], change[2:])[0])
    assert not tangent(Own(), z, torch.zeros(3, 5)).any()


def test_a_change_that_makes_no_difference() -> None:
    z = torch.randn(3, 5)
    assert tangent(Own(), z, torch.ones(3, 5)).abs().max() < 1e-6, "softmax does not see a constant"


@pytest.mark.parametrize(
    ("divergence", "message"),
    [
        (lambda p, q: (p - q).abs().mean(1), "second derivative zero"),
        (lambda p, q: (q - p).mean(1), "no second derivative"),
        (lambda p, q: torch.from_numpy((p - q).detach().square().mean(1).numpy()), "cannot be differentiated"),
        (lambda p, q: (p - q).norm(dim=1), "no finite second derivative|second derivative zero"),
        (lambda p, q: (p - q).pow(4).mean(1), "second derivative zero"),
    ],
)
def test_divergences_without_second_derivative(divergence, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"({message}).*override `Task.tangent`"):
        root_of_curvature(divergence, torch.randn(4, 5), torch.randn(4, 5))


def test_slope_is_the_derivative() -> None:
    reference, point = torch.randn(4, 5), torch.randn(4, 5)
    expected = point.softmax(-1) - reference.softmax(-1)
    assert torch.allclose(slope(TinyTask(), reference, point), expected.double(), rtol=1e-5, atol=1e-7)


def test_projected_products_keep_their_mean() -> None:
    a, b = torch.randn(2, 5, 300, dtype=torch.float64)
    b += a / 2
    found = torch.stack([products(p(a), p(b)) for p in (Projection(16, (seed,)) for seed in range(2000))])
    size = (products(a, a) * products(b, b) + products(a, b) ** 2).sqrt() / 4  # standard deviation, width 16
    assert ((found.mean(0) - products(a, b)).abs() < 4 * size / 2000**0.5).all()
    assert ((found.std(0) - size).abs() < 0.15 * size).all()


def test_samples_are_projected_apart() -> None:
    rows = torch.randn(1, 300).expand(400, -1)
    lengths = Projection(16)(rows).square().sum(1)
    assert len(lengths.unique()) > 300
    assert lengths.mean() == pytest.approx(float(rows[0].square().sum()), rel=0.1), "errors average out over samples"


def test_projection_is_linear_and_the_same_again() -> None:
    a, b = torch.randn(2, 5, 300, dtype=torch.float64)
    projection = Projection(16, (3, 1))
    assert projection(a).shape == (5, 16)
    assert torch.allclose(projection(a + 2 * b), projection(a) + 2 * projection(b))
    assert torch.equal(projection(a), Projection(16, (3, 1))(a))
    assert not torch.equal(projection(a), Projection(16, (3, 2))(a))


def test_few_coordinates_stay() -> None:
    rows = torch.randn(5, 16)
    assert Projection(16)(rows) is rows
    assert np.shares_memory(Projection(20)(rows).numpy(), rows.numpy())
