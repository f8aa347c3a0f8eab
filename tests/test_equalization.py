"""Cross-layer equalization: ranges are equal on both sides of every site, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from rescaled import Block, Given, outputs, parameters, relative_error, simulate, tiny_llama, uniform
from torch import nn
from torch.nn import functional as F

from search.policy import Policy
from search.recover.equalization import equalization
from search.recover.scaling import largest
from search.recover.sites import find_sites
from search.tasks.networks import resnet20


def two_layers(seed: int = 0, width: int = 8) -> Given:
    """Two linear layers whose hidden channels differ in range by three orders of magnitude, outputs alike."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))
    spread = torch.logspace(-1.5, 1.5, width)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(width, 6, generator=generator) * spread[:, None])
        model[0].bias.copy_(torch.randn(width, generator=generator) * spread)
        model[2].weight.copy_(torch.randn(4, width, generator=generator) / spread)
    return Given(model, torch.randn(200, 6, generator=generator))


def ranges(simulated, task) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ranges of rows and of columns, of every site between layers."""
    network = simulated.network
    found = []
    for site in find_sites(simulated, task):
        if site.producer in network:
            rows = largest(network[site.producer], simulated.float_weight(site.producer), "output")
            columns = {name: largest(network[name], simulated.float_weight(name), "input") for name in site.readers}
            found.append((rows, site.gather(columns)))
    return found


def test_the_closed_form_of_two_layers() -> None:
    task = two_layers()
    before = simulate(task)
    after = equalization(before, uniform(before, "int8"), task)
    first, second = before.float_weight("0"), before.float_weight("2")
    rows, columns = first.abs().amax(1), second.abs().amax(0)
    torch.testing.assert_close(after.float_weight("0").abs().amax(1), (rows * columns).sqrt())
    torch.testing.assert_close(after.float_weight("2").abs().amax(0), (rows * columns).sqrt())
    factors = (rows / columns).sqrt()
    torch.testing.assert_close(after.float_weight("0"), first / factors[:, None])
    torch.testing.assert_close(after.float_weight("2"), second * factors)
    torch.testing.assert_close(parameters(after)["0.bias"], parameters(before)["0.bias"] / factors)
    torch.testing.assert_close(parameters(after)["2.bias"], parameters(before)["2.bias"], rtol=0, atol=0)


def depthwise_chain() -> Given:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.Flatten()
    )
    with torch.no_grad():
        for index in (0, 2, 4):
            model[index].weight.mul_(torch.exp(2 * torch.randn(model[index].weight.shape)))
    return Given(model, torch.randn(4, 2, 5, 5))


MAKE = {
    "two_layers": two_layers,
    "depthwise_chain": depthwise_chain,
    "resnet20": lambda: Given(resnet20(), torch.randn(2, 1, 28, 28)),
    "block": lambda: Given(Block(), torch.randn(2, 5, 32)),
    "gated_by_relu": lambda: Given(Block(gate=F.relu), torch.randn(2, 5, 32)),
    "llama": tiny_llama,
}


@pytest.mark.parametrize("name", MAKE)
def test_ranges_become_equal_and_outputs_stay(name: str) -> None:
    task = MAKE[name]()
    before = simulate(task)
    after = equalization(before, uniform(before, "int8"), task)
    found = ranges(after, task)
    assert found
    for rows, columns in found:
        torch.testing.assert_close(rows, columns, rtol=5e-4, atol=0)
    assert relative_error(outputs(after, task.example_input), outputs(before, task.example_input)) < 1e-5
    again = equalization(after, uniform(before, "int8"), task)
    for rows, columns in zip(parameters(again).values(), parameters(after).values(), strict=True):
        torch.testing.assert_close(rows, columns, rtol=1e-3, atol=1e-6)


def test_one_scale_per_tensor_then_serves_all_channels() -> None:
    gains = []
    for seed in range(3):
        task = two_layers(seed, width=32)
        simulated = simulate(task)
        policy = uniform(simulated, "int8-tensor")
        exact = outputs(simulated, task.example_input)
        error = relative_error(outputs(simulated, task.example_input, policy), exact)
        repaired = equalization(simulated, policy, task)
        gains.append(error / relative_error(outputs(repaired, task.example_input, policy), exact))
    print("error before / after equalization:", gains)
    assert min(gains) > 5


def test_channels_without_weights_stay() -> None:
    task = two_layers()
    with torch.no_grad():
        task.model[0].weight[1] = 0
        task.model[2].weight[:, 2] = 0
        task.model[2].weight[:, 5] = 1e-12
    before = simulate(task)
    after = equalization(before, uniform(before, "int8"), task)
    for channel in (1, 2, 5):
        assert torch.equal(after.float_weight("0")[channel], before.float_weight("0")[channel])
        assert torch.equal(after.float_weight("2")[:, channel], before.float_weight("2")[:, channel])
    assert not torch.equal(after.float_weight("0")[0], before.float_weight("0")[0])
    assert all(value.isfinite().all() for value in parameters(after).values())


def test_layers_without_readers_to_quantize_stay() -> None:
    task = depthwise_chain()
    before = simulate(task)
    policy = Policy.from_dict({"0": "int8", "2": "int8", "4": "float"})
    after = equalization(before, policy, task)
    kept = {name for name, value in parameters(after).items() if torch.equal(value, parameters(before)[name])}
    assert kept == {"4.weight", "4.bias", "2.bias"}
    same = equalization(before, {}, task)
    assert all(torch.equal(value, parameters(before)[name]) for name, value in parameters(same).items())


def test_norms_stay() -> None:
    task = tiny_llama()
    before = simulate(task)
    after = equalization(before, uniform(before, "int8"), task)
    changed = {name for name, value in parameters(after).items() if not torch.equal(value, parameters(before)[name])}
    parts = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    assert changed == {f"model.layers.{block}.{part}.weight" for block in range(2) for part in parts}


def test_the_argument_is_untouched_and_the_result_the_same_each_time() -> None:
    task = depthwise_chain()
    simulated = simulate(task)
    policy = uniform(simulated, "int4/uint8")
    before, quantized = parameters(simulated), outputs(simulated, task.example_input, policy)
    one, two = equalization(simulated, policy, task), equalization(simulated, policy, task)
    assert all(torch.equal(value, before[name]) for name, value in parameters(simulated).items())
    assert torch.equal(outputs(simulated, task.example_input, policy)[0], quantized[0])
    assert all(torch.equal(value, parameters(two)[name]) for name, value in parameters(one).items())


def test_inputs_are_observed_anew() -> None:
    task = two_layers()
    simulated = simulate(task)
    policy = uniform(simulated, "int8/uint8")
    repaired = equalization(simulated, policy, task)
    fresh = simulate(Given(repaired.apply({}), task.example_input))
    for layer in ("0", "2"):
        assert repaired.input_range(layer, policy[layer].input) == fresh.input_range(layer, policy[layer].input)
    assert simulated.input_range("2", policy["2"].input) != repaired.input_range("2", policy["2"].input)
