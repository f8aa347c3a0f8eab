"""SmoothQuant: its factors by the formula, what they win where activations have outliers, and what stays."""

from __future__ import annotations

import pytest
import torch
from rescaled import Block, Given, Of, outputs, parameters, relative_error, simulate, tiny_llama, uniform
from torch import nn
from torch.nn import functional as F

from search.errors import ConfigError
from search.policy import Policy
from search.recover.scaling import largest
from search.recover.smoothquant import smoothquant


def outliers(seed: int = 0, width: int = 64) -> Given:
    """A norm with a few channels a hundred times larger than the others, and two layers that read it."""
    generator = torch.Generator().manual_seed(seed)
    parts = {"norm": nn.LayerNorm(width), "a": nn.Linear(width, 32), "b": nn.Linear(width, 32)}
    model = Of(lambda m, x: (y := m.norm(x), m.a(y) * 2 + m.b(y))[1], **parts)
    with torch.no_grad():
        model.norm.weight[::13] *= 100
        for part in (model.a, model.b):
            part.weight.copy_(torch.randn(part.weight.shape, generator=generator) / 8)
            part.weight[:, ::13] /= 10
    batches = torch.randn(3, 50, width, generator=generator)
    return Given(model, *batches)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_formula(alpha: float) -> None:
    task = outliers()
    before = simulate(task)
    after = smoothquant(before, uniform(before, "int8/int8"), task, alpha=alpha)
    with torch.no_grad():
        x = torch.cat([task.model.norm(batch) for batch in task.batches("calibration")])
    weights = torch.cat([before.float_weight("a"), before.float_weight("b")])
    factors = x.abs().amax(0) ** alpha / weights.abs().amax(0) ** (1 - alpha)
    for layer in ("a", "b"):
        torch.testing.assert_close(after.float_weight(layer), before.float_weight(layer) * factors)
    for name in ("norm.weight", "norm.bias"):
        torch.testing.assert_close(parameters(after)[name], parameters(before)[name] / factors)
    if alpha == 1:
        torch.testing.assert_close((x / factors).abs().amax(0), torch.ones(64))
    if alpha == 0:
        torch.testing.assert_close((weights * factors).abs().amax(0), torch.ones(64))


def test_outliers_cost_less() -> None:
    gains = []
    for seed in range(3):
        task = outliers(seed)
        simulated = simulate(task)
        policy = uniform(simulated, "int8/int8")
        exact = outputs(simulated, task.example_input)
        error = relative_error(outputs(simulated, task.example_input, policy), exact)
        repaired = smoothquant(simulated, policy, task)
        gains.append(error / relative_error(outputs(repaired, task.example_input, policy), exact))
    print("error before / after SmoothQuant:", gains)
    assert min(gains) > 4


@pytest.mark.parametrize("precision", ["int8/int8", "int8/int8-token"])
def test_outliers_cost_less_in_llama(precision: str) -> None:
    task = tiny_llama()
    simulated = simulate(task)
    policy = uniform(simulated, precision)
    exact = outputs(simulated, task.example_input)
    error = relative_error(outputs(simulated, task.example_input, policy), exact)
    repaired = smoothquant(simulated, policy, task)
    gain = error / relative_error(outputs(repaired, task.example_input, policy), exact)
    print(precision, "error before / after SmoothQuant:", gain)
    assert gain > 1.2


MAKE = {
    "outliers": outliers,
    "block": lambda: Given(Block(), torch.randn(2, 5, 32)),
    "gated_by_relu": lambda: Given(Block(gate=F.relu), torch.randn(2, 5, 32)),
    "conv": lambda: Given(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), torch.randn(2, 3, 8, 8)),
    "unbatched": lambda: Given(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), torch.randn(3, 8, 8)),
    "llama": tiny_llama,
}


@pytest.mark.parametrize("name", MAKE)
def test_outputs_stay(name: str) -> None:
    task = MAKE[name]()
    before = simulate(task)
    after = smoothquant(before, uniform(before, "int8/int8"), task)
    assert any(not torch.equal(value, parameters(before)[name]) for name, value in parameters(after).items())
    assert relative_error(outputs(after, task.example_input), outputs(before, task.example_input)) < 1e-5


def test_two_sites_of_one_reader_share_its_columns() -> None:
    task = Given(Block(gate=F.relu), torch.randn(2, 5, 32))
    before = simulate(task)
    after = smoothquant(before, uniform(before, "int8/int8"), task)
    seen: list[torch.Tensor] = []
    after.owner("down").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs(after, task.example_input)
    columns = largest(after.network["down"], after.float_weight("down"), "input")
    torch.testing.assert_close(seen[0].abs().amax((0, 1)), columns, rtol=1e-4, atol=1e-6)


def test_channels_never_seen_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].bias[2] = -1e3
        model[2].weight[:, 4] = 0
    task = Given(model, torch.randn(20, 4))
    before = simulate(task)
    after = smoothquant(before, uniform(before, "int8/int8"), task)
    assert torch.equal(after.float_weight("0")[2], before.float_weight("0")[2])
    assert all(value.isfinite().all() for value in parameters(after).values())
    assert relative_error(outputs(after, task.example_input), outputs(before, task.example_input)) < 1e-5


def test_weight_only_layers_have_no_activations_to_smooth() -> None:
    task = outliers()
    before = simulate(task)
    for policy in (uniform(before, "int4"), {}, Policy.from_dict({"a": "int8/int8"})):
        after = smoothquant(before, policy, task)
        assert all(torch.equal(value, parameters(before)[name]) for name, value in parameters(after).items())


def test_the_argument_is_untouched_and_the_result_the_same_each_time() -> None:
    task = tiny_llama(layers=1)
    simulated = simulate(task)
    policy = uniform(simulated, "int8/int8")
    before, quantized = parameters(simulated), outputs(simulated, task.example_input, policy)
    one, two = smoothquant(simulated, policy, task), smoothquant(simulated, policy, task)
    assert all(torch.equal(value, before[name]) for name, value in parameters(simulated).items())
    assert torch.equal(outputs(simulated, task.example_input, policy)[0], quantized[0])
    assert all(torch.equal(value, parameters(two)[name]) for name, value in parameters(one).items())


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_out_of_range(alpha: float) -> None:
    task = outliers()
    simulated = simulate(task)
    with pytest.raises(ConfigError, match="alpha"):
        smoothquant(simulated, {}, task, alpha=alpha)
