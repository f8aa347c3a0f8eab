"""AWQ: the exponent it chooses against brute force, what it wins at 3 bits, and what stays."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from rescaled import Block, Given, Of, outputs, parameters, relative_error, simulate, tiny_llama, uniform
from torch import nn
from torch.nn import functional as F

from hwmodels import Format
from search.errors import ConfigError
from search.policy import Policy
from search.quantize.formats import quantize_weight
from search.quantize.ranges import weight_parameters
from search.recover.awq import awq
from search.recover.sites import find_sites
from search.recover.smoothquant import smoothquant


def salient(seed: int = 0, width: int = 128) -> Given:
    """A norm with channels thirty times larger than the others, and a layer whose weights for them are smaller."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))
    with torch.no_grad():
        model[0].weight[5::40] *= 30
        model[1].weight.copy_(torch.randn(64, width, generator=generator) / width**0.5)
        model[1].weight[:, 5::40] /= 4
    return Given(model, *torch.randn(3, 60, width, generator=generator))


def test_the_best_exponent_by_brute_force() -> None:
    task = salient()
    before = simulate(task)
    after = awq(before, uniform(before, "int3-g32"), task, grid=7)
    with torch.no_grad():
        x = torch.cat([task.model[0](batch) for batch in task.batches("calibration")])
    weight, format = before.float_weight("1"), Format.parse("int3-g32")
    tried = {}
    for step in range(8):
        factors = x.abs().mean(0) ** (step / 7)
        factors = factors / (factors.max() * factors.min()).sqrt()
        scaled = weight * factors
        quantized = quantize_weight(scaled, format, 0, weight_parameters(scaled, format, 0, "mse")) / factors
        tried[float((x @ (quantized - weight).T).square().sum())] = factors
    factors = tried[min(tried)]
    assert 0 < list(tried).index(min(tried)) < 7, "neither end of the grid"
    torch.testing.assert_close(after.float_weight("1"), weight * factors, rtol=1e-4, atol=0)
    torch.testing.assert_close(parameters(after)["0.weight"], parameters(before)["0.weight"] / factors)


def test_it_beats_rounding_to_nearest_where_channels_are_salient() -> None:
    gains = []
    for seed in range(3):
        task = salient(seed)
        simulated = simulate(task)
        policy = uniform(simulated, "int3-g32")
        exact = outputs(simulated, task.example_input)
        error = relative_error(outputs(simulated, task.example_input, policy), exact)
        repaired = awq(simulated, policy, task)
        gains.append(error / relative_error(outputs(repaired, task.example_input, policy), exact))
    print("error before / after AWQ:", gains)
    assert min(gains) > 1.5


@pytest.mark.parametrize("precision", ["int3-g32", "int4", "nf4-g16", "mxfp4", "codebook3"])
def test_it_beats_rounding_to_nearest_in_llama(precision: str) -> None:
    task = tiny_llama(layers=1)
    simulated = simulate(task)
    policy = uniform(simulated, precision)
    policy = Policy({**policy, "model.embed_tokens": policy["model.embed_tokens"].parse("float")})
    exact = outputs(simulated, task.example_input)
    error = relative_error(outputs(simulated, task.example_input, policy), exact)
    repaired = awq(simulated, policy, task, grid=8)
    gain = error / relative_error(outputs(repaired, task.example_input, policy), exact)
    print(precision, "error before / after AWQ:", gain)
    assert gain > 1


def encoder() -> Given:
    model = nn.TransformerEncoderLayer(16, 4, 32, norm_first=True, batch_first=True)
    with torch.no_grad():
        model.norm1.weight[::7] *= 20
        model.self_attn.in_proj_weight[:, ::7] /= 5
    return Given(model, torch.randn(2, 5, 16))


MAKE = {
    "salient": salient,
    "block": lambda: Given(Block(), torch.randn(2, 9, 32) * torch.logspace(-1, 1, 32)),
    "gated_by_relu": lambda: Given(Block(gate=F.relu), torch.randn(2, 9, 32) * torch.logspace(-1, 1, 32)),
    "encoder": encoder,
    "convolutions": lambda: Given(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 4, 2, groups=2),
        ),
        torch.randn(4, 3, 8, 8),
    ),
    "llama": tiny_llama,
}


@pytest.mark.parametrize("name", MAKE)
def test_outputs_stay(name: str) -> None:
    task = MAKE[name]()
    before = simulate(task)
    after = awq(before, uniform(before, "int4"), task, grid=5)
    assert any(not torch.equal(value, parameters(before)[name]) for name, value in parameters(after).items())
    assert relative_error(outputs(after, task.example_input), outputs(before, task.example_input)) < 1e-5


@pytest.mark.parametrize(("repair", "precision"), [(awq, "int4-g16"), (smoothquant, "int8/int8")])
def test_bfloat16_models_gain_as_well(repair, precision: str) -> None:
    task = tiny_llama(torch.bfloat16, layers=1)
    simulated = simulate(task)
    policy = uniform(simulated, precision)
    exact = outputs(simulated, task.example_input)
    error = relative_error(outputs(simulated, task.example_input, policy), exact)
    repaired = repair(simulated, policy, task)
    assert {value.dtype for value in repaired.model.parameters()} == {torch.bfloat16}
    assert relative_error(outputs(repaired, task.example_input, policy), exact) < error


def test_two_sites_of_one_reader_lower_its_error_in_turn() -> None:
    """The second site must see inputs and weights as the first one left them."""
    model = Of(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=nn.Linear(8, 16), b=nn.Linear(8, 16), c=nn.Linear(32, 8)
    )
    with torch.no_grad():
        model.a.weight[::5] *= 20
        model.b.weight[::7] *= 20
        model.c.weight[:, :16:5] /= 8
        model.c.weight[:, 16::7] /= 8
    task = Given(model, torch.randn(64, 8))
    simulated = simulate(task)
    policy = Policy.from_dict({"a": "float", "b": "float", "c": "int3"})
    exact = outputs(simulated, task.example_input)
    error = relative_error(outputs(simulated, task.example_input, policy), exact)
    repaired = awq(simulated, policy, task)
    assert relative_error(outputs(repaired, task.example_input), exact) < 1e-5
    for name in "ab":
        assert not torch.equal(repaired.float_weight(name), simulated.float_weight(name))
    assert relative_error(outputs(repaired, task.example_input, policy), exact) < 0.8 * error


def test_layers_that_calibration_does_not_reach_stay() -> None:
    body = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    task = Given(Of(lambda m, x: m.branch(x) if x.sum() > 0 else x[:, :4], branch=body), torch.randn(8, 16).abs())
    task._batches = (-task.example_input,)
    simulated = simulate(task)
    assert len(find_sites(simulated, task)) == 2
    for repair, precision in ((awq, "int4"), (smoothquant, "int4/int8")):
        repaired = repair(simulated, uniform(simulated, precision), task)
        assert all(torch.equal(value, parameters(simulated)[name]) for name, value in parameters(repaired).items())


def test_channels_that_are_almost_never_active() -> None:
    task = salient()
    with torch.no_grad():
        task.model[0].weight[:3] = torch.tensor([0.0, 1e-30, 1e-12])
        task.model[0].bias[:3] = 0
    simulated = simulate(task)
    policy = uniform(simulated, "int3-g32")
    exact = outputs(simulated, task.example_input)
    error = relative_error(outputs(simulated, task.example_input, policy), exact)
    repaired = awq(simulated, policy, task)
    assert all(value.isfinite().all() for value in parameters(repaired).values())
    assert torch.equal(repaired.float_weight("1")[:, 0], simulated.float_weight("1")[:, 0])
    assert relative_error(outputs(repaired, task.example_input), exact) < 1e-5
    assert relative_error(outputs(repaired, task.example_input, policy), exact) < error / 2


def test_the_second_site_of_the_same_columns_starts_from_the_first() -> None:
    torch.manual_seed(0)
    parts = {"a": nn.Linear(8, 32), "b": nn.Linear(8, 32), "c": nn.Linear(32, 16)}
    model = Of(lambda m, x: m.c(m.a(x) * F.relu(m.b(x))), **parts)
    with torch.no_grad():
        model.a.weight[::5] *= 20
        model.b.weight[::7] *= 20
        model.c.weight[:, ::5] /= 5
        model.c.weight[:, ::7] /= 5
    task = Given(model, torch.randn(100, 8))
    simulated = simulate(task)
    policy = Policy.from_dict({"a": "float", "b": "float", "c": "int3"})
    after = awq(simulated, policy, task, grid=5)
    with torch.no_grad():
        x = model.a(task.example_input) * F.relu(model.b(task.example_input))
    weight, moved = simulated.float_weight("c"), []
    for _ in range(2):
        tried = {}
        for step in range(6):
            raised = x.abs().mean(0).clamp_min(1e-4 * x.abs().mean(0).max())
            factors = (raised / (raised.max() * raised.min()).sqrt()) ** (step / 5)
            scaled = weight * factors
            error = quantize_weight(scaled, policy["c"].weight, 0, weight_parameters(scaled, policy["c"].weight, 0))
            tried[float((x / factors @ (error - scaled).T).square().sum())] = factors
        moved.append(tried[min(tried)])
        weight, x = weight * moved[-1], x / moved[-1]
    assert all(factors.log().abs().max() > 0.1 for factors in moved), "both sites move"
    torch.testing.assert_close(after.float_weight("c"), weight, rtol=1e-3, atol=0)


def test_nothing_changes_where_nothing_is_won() -> None:
    task = Given(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)), torch.randn(40, 8))
    before = simulate(task)
    for policy in (uniform(before, "fp16"), {}, Policy.from_dict({"1": "float/int8"})):
        with torch.no_grad():
            before.alter({"1.weight": torch.ones(4, 8)})  # exact in any format
        after = awq(before, policy, task)
        assert all(torch.equal(value, parameters(before)[name]) for name, value in parameters(after).items())


def test_the_argument_is_untouched_and_the_result_the_same_each_time() -> None:
    task = tiny_llama(layers=1)
    simulated = simulate(task)
    policy = uniform(simulated, "int3-g16")
    before, quantized = parameters(simulated), outputs(simulated, task.example_input, policy)
    one, two = (awq(simulated, policy, task, grid=5, seed=1) for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in parameters(simulated).items())
    assert torch.equal(outputs(simulated, task.example_input, policy)[0], quantized[0])
    assert all(torch.equal(value, parameters(two)[name]) for name, value in parameters(one).items())


def test_a_bounded_sample_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("search.recover.awq"), "SAMPLE_VALUES", 128 * 40)  # 40 tokens of 180
    task = salient()
    simulated = simulate(task)
    policy = uniform(simulated, "int3-g32")
    exact = outputs(simulated, task.example_input)
    error = relative_error(outputs(simulated, task.example_input, policy), exact)
    repaired = awq(simulated, policy, task)
    assert relative_error(outputs(repaired, task.example_input, policy), exact) < error / 1.5


def test_a_grid_has_steps() -> None:
    task = salient()
    simulated = simulate(task)
    with pytest.raises(ConfigError, match="grid"):
        awq(simulated, {}, task, grid=0)
