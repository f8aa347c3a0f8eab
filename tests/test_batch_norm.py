"""Batch norm re-estimation: statistics as they are, of norms that stayed and of norms that were folded."""

from __future__ import annotations

import pytest
import torch
from repairing import LAYERS, correlated, same, simulate, state, uniform
from tiny import Bench, TinyTask, make_bench
from torch import Tensor, nn
from torch.nn import functional as F

from hwmodels import Precision
from search.policy import Policy
from search.quantize.formats import encode
from search.quantize.grouping import to_groups
from search.quantize.simulate import QuantizedModel
from search.recover.batch_norm import batch_norm
from search.recover.gptq import gptq
from search.recover.statistics import Moments
from search.recover.unfold import channel_axis
from search.recover.watch import watch
from search.tasks.task import Task


def moments(simulated: QuantizedModel, task: Task, policy: dict | Policy, layer: str) -> Moments:
    found = Moments(channel_axis(simulated.owner(layer)))
    watch(simulated, policy, task, outputs={layer: found.add})
    return found


@pytest.mark.parametrize("precision", ["int2/uint8", "int3-g5/uint4", "codebook2-g9", "ternary", "nf4", "uint2/uint8"])
def test_every_layer_gets_its_mean_and_deviation_back(bench: Bench, precision: str) -> None:
    policy = Policy.uniform(bench.network, Precision.parse(precision))
    repaired = batch_norm(bench.simulated, policy, bench.task)
    for name in bench.network.names:
        wanted, before, after = (
            moments(simulated, bench.task, given, name)
            for simulated, given in ((bench.simulated, {}), (bench.simulated, policy), (repaired, policy))
        )
        torch.testing.assert_close(after.mean, wanted.mean, rtol=0, atol=1e-5)
        varied = before.variance > 0
        torch.testing.assert_close(after.variance[varied], wanted.variance[varied], rtol=1e-4, atol=1e-6)
        assert varied.any()
        assert (before.variance / wanted.variance - 1).abs().max() > 1e-2


@pytest.mark.parametrize(
    "name", ["int2", "uint3-g5", "int4-full", "fp4", "nf4", "binary", "ternary", "ttq", "codebook3-g9"]
)
def test_codes_stay(bench: Bench, name: str) -> None:
    precision = Precision.parse(name)
    policy = Policy.uniform(bench.network, precision)
    repaired = batch_norm(bench.simulated, policy, bench.task)
    for layer in bench.network:
        codes = [
            encode(
                to_groups(simulated.float_weight(layer.name), precision.weight, layer.channel_axis).rows,
                precision.weight,
                simulated.weight_parameters(layer.name, precision.weight),
            )
            for simulated in (bench.simulated, repaired)
        ]
        assert (codes[0] == codes[1]).float().mean() > 0.98  # a value half way between two codes may fall either way
        assert not torch.equal(repaired.float_weight(layer.name), bench.simulated.float_weight(layer.name))


@pytest.mark.parametrize("name", ["int2-tensor", "mxfp4", "nvfp4", "codebook2", "bf16"])
def test_scales_that_cannot_take_a_gain_get_the_mean_alone(bench: Bench, name: str) -> None:
    policy = Policy.uniform(bench.network, Precision.parse(name))
    repaired = batch_norm(bench.simulated, policy, bench.task)
    for layer in bench.network.names:
        assert torch.equal(repaired.float_weight(layer), bench.simulated.float_weight(layer))
        wanted, after = moments(bench.simulated, bench.task, {}, layer), moments(repaired, bench.task, policy, layer)
        torch.testing.assert_close(after.mean, wanted.mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "one sample"])
def test_every_kind_of_layer(name: str) -> None:
    module, shape = LAYERS[name]
    task, simulated = simulate(nn.Sequential(module), correlated(24, *shape[1:], axis=-1 if name == "linear" else 1))
    policy = uniform(simulated, "int3")
    repaired = batch_norm(simulated, policy, task)
    wanted, after = moments(simulated, task, {}, "0"), moments(repaired, task, policy, "0")
    torch.testing.assert_close(after.mean, wanted.mean, rtol=0, atol=1e-5)
    if name != "transposed 2d, two groups" and name != "transposed 2d, cropped":  # their groups share a scale
        torch.testing.assert_close(after.variance, wanted.variance, rtol=1e-4, atol=1e-6)


class PreActivation(nn.Module):
    """Two norms that cannot be folded: what they read has other readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.first, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)
        self.second, self.head = nn.BatchNorm2d(4), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(F.relu(self.first(x)))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


def test_norms_that_stayed_get_the_statistics_of_what_they_read() -> None:
    torch.manual_seed(1)
    model, inputs = PreActivation(), correlated(48, 3, 6, 6)
    model.train()
    for _ in range(50):
        model(inputs)
    task, simulated = simulate(model, inputs)
    policy = uniform(simulated, "int2/uint4")
    repaired = batch_norm(simulated, policy, task)
    applied, read = repaired.apply(policy), {}
    for name in ("first", "second"):
        applied.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: read.update({name: args[0]}))
    applied(inputs)
    for name, x in read.items():
        norm = applied.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm.running_var, x.transpose(0, 1).flatten(1).var(1), rtol=1e-5, atol=1e-6)
    before, after = state(simulated), state(repaired)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{norm}.running_{what}" for norm in ("first", "second") for what in ("mean", "var")}
    wanted = task.run(simulated, {})
    errors = [(task.run(model, policy) - wanted).square().mean() for model in (simulated, repaired)]
    assert errors[1] < errors[0]


def test_norms_before_anything_quantized_stay() -> None:
    task, simulated = simulate(PreActivation(), correlated(48, 3, 6, 6))
    before, after = state(simulated), state(batch_norm(simulated, {"conv": Precision.parse("int2/uint8")}, task))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"second.running_mean", "second.running_var"}
    assert same(state(batch_norm(simulated, {}, task)), before)


def test_argument_is_untouched_and_result_is_repeatable(bench: Bench) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    before, ranges = state(bench.simulated), set(bench.simulated.ranges.weights)
    first, second = (batch_norm(bench.simulated, policy, bench.task) for _ in range(2))
    assert same(state(bench.simulated), before)
    assert set(bench.simulated.ranges.weights) == ranges
    assert same(state(first), state(second))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in first.apply({}).modules())


def test_only_what_the_policy_quantizes_changes(bench: Bench) -> None:
    policy = Policy.from_dict({"stem": "float/uint8", "left": "int2", "right": "float", "head": "float"})
    before, after = state(bench.simulated), state(batch_norm(bench.simulated, policy, bench.task))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"left.weight", "left.bias"}


def test_constant_channels_have_no_gain() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
    task, simulated = simulate(model, correlated(16, 2, 4, 4))
    repaired = batch_norm(simulated, uniform(simulated, "int2"), task)
    assert all(value.isfinite().all() for value in state(repaired).values())
    assert torch.equal(repaired.float_weight("0")[1], simulated.float_weight("0")[1])


def test_rounded_weights_stay_on_their_grid(bench: Bench) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint8"))
    rounded = gptq(bench.simulated, policy, bench.task)
    repaired = batch_norm(rounded, policy, bench.task, bench.simulated)
    for name in bench.network.names:
        weight = repaired.float_weight(name)
        torch.testing.assert_close(repaired.quantized_weight(name, policy[name].weight), weight, rtol=1e-6, atol=0)
        wanted, after = moments(bench.simulated, bench.task, {}, name), moments(repaired, bench.task, policy, name)
        torch.testing.assert_close(after.mean, wanted.mean, rtol=0, atol=1e-5)


def test_with_the_loops_own_bias_repair(bench: Bench) -> None:
    task, simulated = simulate(TinyTask().model, bench.task._data["calibration"][0], repair="bias")
    policy = uniform(simulated, "int2/uint8")
    repaired = batch_norm(simulated, policy, task)
    for name in simulated.network.names:
        wanted, after = moments(simulated, task, {}, name), moments(repaired, task, policy, name)
        torch.testing.assert_close(after.mean, wanted.mean, rtol=0, atol=1e-5)


def test_bfloat16() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).bfloat16()
    task, simulated = simulate(model, correlated(32, 4, 6, 6).bfloat16())
    policy = uniform(simulated, "int2/uint8")
    wanted = task.run(simulated, {}).double().std((0, 2, 3))
    repaired = batch_norm(simulated, policy, task)
    ratios = [task.run(model, policy).double().std((0, 2, 3)) / wanted for model in (simulated, repaired)]
    assert (ratios[1] - 1).abs().max() < 0.02 < (ratios[0] - 1).abs().max()
    assert repaired.float_weight("0").dtype == torch.bfloat16


def test_it_helps_at_two_bits() -> None:
    drops = []
    for seed in range(6):
        bench = make_bench(TinyTask(seed))
        policy = Policy.uniform(bench.network, Precision.parse("int2/uint8"))
        repaired = batch_norm(bench.simulated, policy, bench.task)
        evaluators = (bench.evaluator, bench.evaluator.of(repaired))
        drops.append([evaluator.measure(policy, "report").drop for evaluator in evaluators])
    before, after = (sum(column) for column in zip(*drops, strict=True))
    assert after < 0.8 * before
