"""Curvature: a quadratic model's Hessian in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import Decoder
from scoring import Given, Squared, bench_of
from torch import nn
from torch.nn import functional as F

from search.errors import UnsupportedError
from search.sensitivity.choices import choices_of
from search.sensitivity.curvature import curvature, hessian_trace
from search.sensitivity.distortion import distortion


@pytest.fixture
def quadratic():
    """Half the squared error of `W x + b`: second derivative `E x x'` by every row of `W`, `W' W` by `x`."""
    task = Squared(nn.Linear(4, 3), torch.randn(12, 4), torch.randn(12, 3))
    bench, choices = bench_of(task, ["int2", "int4"], ["uint3", "uint8"])
    return task, bench, choices


def test_the_trace_is_that_of_a_quadratic_model(quadratic):
    task, bench, choices = quadratic
    trace = hessian_trace(task, bench.simulated, choices, probes=400)
    weight = bench.simulated.float_weight(bench.simulated.network.names[0])
    expected = np.array([3 * float(task.data.square().sum(1).mean()), float(weight.square().sum())])
    assert (np.abs(trace.mean - expected) < 4 * trace.error).all()
    assert (trace.error < 0.1 * expected).all()
    np.testing.assert_array_equal(trace.values, [12, 4])


def test_diagonal_hessians_need_a_single_probe():
    model = nn.Linear(3, 3, bias=False)
    data = 2 * torch.eye(3).repeat(4, 1)
    task = Squared(model, data, torch.zeros(12, 3))
    bench, choices = bench_of(task, ["int4"], ["float"])
    weights = [choice for choice in choices if choice.decision.side == "weight"]
    trace = hessian_trace(task, bench.simulated, weights, probes=1)
    assert trace.mean[0] == pytest.approx(3 * 4, rel=1e-5)
    assert trace.error[0] == np.inf


def test_scores_are_mean_and_largest_eigenvalues_times_squared_errors(quadratic):
    task, bench, choices = quadratic
    found = curvature(task, bench.simulated, choices, ["hessian_trace", "hessian_eigenvalue"], probes=8, seed=1)
    error = distortion(task, bench.simulated, choices).weight_error
    trace = hessian_trace(task, bench.simulated, choices, probes=8, seed=1)
    mean = np.repeat(trace.mean / trace.values, 2)
    np.testing.assert_allclose(found["hessian_trace"], mean * error)
    weight = bench.simulated.float_weight(bench.simulated.network.names[0])
    first = task.data[:5]  # the first batch
    largest = [float(torch.linalg.eigvalsh(m)[-1]) for m in (first.T @ first / 5, weight.T @ weight)]
    np.testing.assert_allclose(found["hessian_eigenvalue"], np.repeat(largest, 2) * error, rtol=0.05)


def test_fewer_probes_do_where_the_error_is_small_enough(quadratic):
    task, bench, choices = quadratic
    rough = hessian_trace(task, bench.simulated, choices, probes=100, tolerance=0.3)
    assert rough.probes in range(4, 100, 4)
    assert np.linalg.norm(rough.error) <= 0.3 * np.linalg.norm(rough.mean)
    again = hessian_trace(task, bench.simulated, choices, probes=rough.probes)
    np.testing.assert_allclose(again.mean, rough.mean, rtol=1e-5)


def test_without_labels_it_is_the_fisher_of_the_models_own_outputs():
    task = Given(nn.Linear(4, 3), torch.randn(12, 4))
    bench, choices = bench_of(task, ["int2"], ["float"])
    weights = [choice for choice in choices if choice.decision.side == "weight"]
    trace = hessian_trace(task, bench.simulated, weights, probes=400)
    p = F.linear(task.data, bench.simulated.float_weight(bench.simulated.network.names[0]), task.model.bias).softmax(1)
    expected = float(((1 - p.square().sum(1)) * task.data.square().sum(1)).mean().detach())
    assert abs(trace.mean[0] - expected) < 4 * trace.error[0]
    assert trace.error[0] < 0.1 * expected


class Fused(nn.Module):
    """Torch's fused attention, some of whose kernels have no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize(
    ("model", "inputs"), [(Decoder(), torch.randint(20, (6, 8))), (Fused(), torch.randn(6, 1, 5, 8))]
)
def test_shared_weights_and_fused_attention_are_differentiated_twice(model, inputs):
    bench, choices = bench_of(Given(model, inputs), ["int4"], ["int8"])
    found = curvature(bench.task, bench.simulated, choices, ["hessian_trace", "hessian_eigenvalue"], probes=2)
    assert all(np.isfinite(column).all() for column in found.values())


def test_the_model_keeps_its_flags(bench):
    flags = [parameter.requires_grad for parameter in bench.simulated.model.parameters()]
    curvature(bench.task, bench.simulated, choices_of(bench.space), probes=1)
    assert flags == [parameter.requires_grad for parameter in bench.simulated.model.parameters()]


def test_a_loss_that_is_not_differentiable_is_refused(quadratic):
    task, bench, choices = quadratic
    task.loss = lambda outputs, batch: outputs.detach().sum(1)
    with pytest.raises(UnsupportedError, match="cannot be differentiated"):
        hessian_trace(task, bench.simulated, choices)
