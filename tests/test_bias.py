"""Bias correction: the shift it takes back, measured and expected."""

from __future__ import annotations

import networks
import pytest
import torch
from repairing import LAYERS, correlated, same, simulate, state, uniform
from tiny import Bench, TinyTask, make_bench
from torch import Tensor, nn

from hwmodels import Precision
from search.errors import ConfigError
from search.policy import Policy
from search.quantize.simulate import QuantizedModel, exact_inference
from search.recover.bias import bias_correction
from search.recover.gptq import gptq


def output_means(bench: Bench, simulated: QuantizedModel, policy: Policy | dict, layer: str) -> Tensor:
    """Mean of each output channel of a layer over the calibration images."""
    found = []
    model = simulated.apply(policy)
    hook = model.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append(output))
    with exact_inference():
        model(bench.task._data["calibration"][0])
    hook.remove()
    output = found[0].double()
    return output.mean((0, 2, 3)) if output.dim() == 4 else output.mean(0)


@pytest.mark.parametrize("precision", ["int2/uint8", "int2/uint4", "int4/uint8", "mxfp4/mxfp8", "codebook1-g6"])
def test_every_mean_is_taken_back(bench: Bench, precision: str) -> None:
    policy = Policy.uniform(bench.network, Precision.parse(precision))
    wanted = {name: output_means(bench, bench.simulated, {}, name) for name in bench.network.names}
    repaired = bias_correction(bench.simulated, policy, bench.task)
    for name, mean in wanted.items():
        before = (output_means(bench, bench.simulated, policy, name) - mean).abs().max()
        after = (output_means(bench, repaired, policy, name) - mean).abs().max()
        assert before > 1e-3
        assert after < 1e-5, f"{name}: every layer before it is corrected already"


@pytest.mark.parametrize("method", ["empirical", "analytic"])
def test_argument_is_untouched_and_only_biases_change(bench: Bench, method: str) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    before = state(bench.simulated)
    first, second = (bias_correction(bench.simulated, policy, bench.task, method=method) for _ in range(2))
    assert same(state(bench.simulated), before)
    assert same(state(first), state(second))
    changed = {name for name, value in state(first).items() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.bias" for name in bench.network.names}
    assert not any(module._forward_hooks for module in first.model.modules())


@pytest.mark.parametrize("method", ["empirical", "analytic"])
def test_only_quantized_weights_are_corrected(bench: Bench, method: str) -> None:
    policy = Policy.from_dict({"stem": "int4/uint8", "left": "float", "right": "float/uint8", "head": "int2"})
    before = state(bench.simulated)
    after = state(bias_correction(bench.simulated, policy, bench.task, method=method))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"stem.bias", "head.bias"}


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "one sample"])
def test_expected_and_measured_shift_are_the_same_for_one_layer(name: str) -> None:
    module, shape = LAYERS[name]
    task, simulated = simulate(nn.Sequential(module), correlated(24, *shape[1:], axis=-1 if name == "linear" else 1))
    policy = uniform(simulated, "int2")
    biases = [
        bias_correction(simulated, policy, task, method=method).apply(policy)[0].bias
        for method in ("empirical", "analytic")
    ]
    torch.testing.assert_close(biases[0], biases[1], rtol=1e-5, atol=1e-5)
    assert (biases[0] - simulated.apply({})[0].bias).abs().max() > 1e-3


def test_means_of_an_earlier_repair_are_those_of_the_float_network(bench: Bench) -> None:
    """GPTQ's rounded weights are no measure of what the means should be; the reference is."""
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint8"))
    wanted = {name: output_means(bench, bench.simulated, {}, name) for name in bench.network.names}
    rounded = gptq(bench.simulated, policy, bench.task)
    for method, tolerance in (("empirical", 1e-5), ("analytic", 1e-5)):
        repaired = bias_correction(rounded, policy, bench.task, bench.simulated, method=method)
        layers = bench.network.names if method == "empirical" else ["stem"]
        given = policy if method == "empirical" else {"stem": Precision.parse("int2")}
        for name in layers:
            assert (output_means(bench, repaired, given, name) - wanted[name]).abs().max() < tolerance
    again = bias_correction(repaired, policy, bench.task, bench.simulated, method="analytic")
    for name, value in state(again).items():
        torch.testing.assert_close(value, state(repaired)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["empirical", "analytic"])
def test_what_the_loop_repairs_already_is_not_corrected_twice(bench: Bench, method: str) -> None:
    inputs = bench.task._data["calibration"][0]
    task, simulated = simulate(TinyTask().model, inputs, repair="bias")
    _, plain = simulate(TinyTask().model, inputs)
    policy = uniform(simulated, "int2/uint8")
    twice, once = (bias_correction(model, policy, task, method=method).apply(policy) for model in (simulated, plain))
    for name in simulated.network.names:
        expected = once.get_submodule(name).bias
        torch.testing.assert_close(twice.get_submodule(name).bias, expected, rtol=1e-4, atol=1e-5)


def test_layers_without_bias_and_those_never_reached_stay() -> None:
    task, simulated = simulate(networks.Decoder(), torch.randint(20, (32, 8)))
    before, after = state(simulated), state(bias_correction(simulated, uniform(simulated, "int2"), task))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"block.{layer}.bias" for layer in ("qkv", "out", "up", "down")}
    task, simulated = simulate(nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4))
    task._batches = [torch.zeros(0, 4)]
    for method in ("empirical", "analytic"):
        after = state(bias_correction(simulated, uniform(simulated, "int2"), task, method=method))
        assert same(after, state(simulated))


def test_bfloat16() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).bfloat16()
    task, simulated = simulate(model, correlated(32, 4, 6, 6).bfloat16())
    policy = uniform(simulated, "int2/uint8")
    wanted = task.run(simulated, {}).double().mean((0, 2, 3))
    for method in ("empirical", "analytic"):
        repaired = bias_correction(simulated, policy, task, method=method)
        shifts = [task.run(model, policy).double().mean((0, 2, 3)) - wanted for model in (simulated, repaired)]
        assert shifts[1].abs().max() < 0.5 * shifts[0].abs().max()
        assert repaired.apply({})[0].bias.dtype == torch.bfloat16


def test_means_are_those_before_results_are_quantized_themselves() -> None:
    """Clipped by `placement=full`, an output has another mean; a bias that made up for it would clip the more."""
    inputs = TinyTask(1)._data["calibration"][0]
    task, simulated = simulate(TinyTask(1).model, inputs, placement="full")
    policy, wanted = uniform(simulated, "int3/uint8"), task.run(simulated, {})
    errors = [
        (task.run(model, policy) - wanted).square().mean()
        for model in (simulated, bias_correction(simulated, policy, task))
    ]
    assert errors[1] < errors[0]


def test_it_helps_at_two_bits() -> None:
    drops = []
    for seed in range(6):
        bench = make_bench(TinyTask(seed))
        policy = Policy.uniform(bench.network, Precision.parse("int2/uint8"))
        repaired = bias_correction(bench.simulated, policy, bench.task)
        evaluators = (bench.evaluator, bench.evaluator.of(repaired))
        drops.append([evaluator.measure(policy, "report").drop for evaluator in evaluators])
    before, after = (sum(column) for column in zip(*drops, strict=True))
    assert after < 0.8 * before


def test_unknown_method(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"no method 'analytical' \(did you mean 'analytic'\?\); allowed: empirical"):
        bias_correction(bench.simulated, {}, bench.task, method="analytical")
