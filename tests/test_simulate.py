"""The simulated network against a naive one: a deep copy whose weights and inputs are quantized by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import Branching, Decoder, Recurrent, Tagger, TwoInputs
from tiny import Bench, TinyNet
from torch import nn
from torch.nn import functional as F

from hwmodels import Format, Precision
from search.errors import ConfigError, DataError
from search.policy import Policy
from search.quantize.affine import Range
from search.quantize.ranges import Histogram, input_range, weight_parameters
from search.quantize.simulate import QuantizedModel, QuantizerSettings, Ranges, exact_inference
from search.tasks.task import call, tensors_in
from search.trace import parameter_of, trace

PRECISIONS = ("int2/uint4", "int4/uint8", "int8/uint8", "int8", "float/uint4", "float")


def simulate(model: nn.Module, inputs: Any, settings: QuantizerSettings | None = None) -> QuantizedModel:
    """A calibrated simulation on a copy of the model."""
    model = copy.deepcopy(model).eval()
    simulated = QuantizedModel(model, trace(model, inputs), settings)
    simulated.calibrate([inputs])
    return simulated


def run(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    with exact_inference():
        return tensors_in(call(model, inputs))


class Rounded(nn.Module):
    """A layer whose input is quantized by torch's definition, whatever it is called with."""

    def __init__(self, inner: nn.Module, range_: Range, format: Format) -> None:
        super().__init__()
        self.inner, self.range, self.format = inner, range_, format

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, *rest = [*args, *kwargs.values()]
        codes = torch.round(x / self.range.scale) + self.range.zero_point
        codes = codes.clamp(self.format.lowest, self.format.highest)
        return self.inner((codes - self.range.zero_point) * self.range.scale, *rest)


def naive(model: nn.Module, inputs: Any, policy: Policy) -> list[torch.Tensor]:
    """Outputs of a deep copy quantized by hand, with ranges found from the inputs that each layer is seen to read."""
    network = trace(model, inputs)
    seen: dict[str, Histogram] = {layer.name: Histogram() for layer in network if layer.quantizes_input}
    watched = copy.deepcopy(model).eval()
    for name, histogram in seen.items():
        watched.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, histogram=histogram: histogram.add([*args, *kwargs.values()][0]),
            with_kwargs=True,
        )
    run(watched, inputs)
    quantized = copy.deepcopy(model).eval()
    with torch.no_grad():
        for layer in network:
            owner, parameter = parameter_of(quantized, layer.name)
            weight, format = getattr(owner, parameter), policy[layer.name].weight
            if not format.is_float:
                scale = weight_parameters(weight, format, layer.channel_axis)["scale"]
                zeros = torch.zeros(len(scale), dtype=torch.int32)
                axis = layer.channel_axis
                shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
                codes = torch.round(weight / scale.view(shape)).clamp(format.lowest, format.highest)
                assert (zeros == 0).all()
                weight.copy_(codes * scale.view(shape))
    for name, histogram in seen.items():
        format = policy[name].input
        if not format.is_float:
            range_ = input_range(histogram, format)
            module = quantized.get_submodule(name)
            for alias, candidate in list(quantized.named_modules(remove_duplicate=False)):
                if candidate is module:
                    quantized.set_submodule(alias, Rounded(module, range_, format))
    return run(quantized, inputs)


class Keywords(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(input=F.relu(self.a(input=x)))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Transposed(nn.Module):
    """Layers of the other kinds: one dimension, three, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.up, self.three = nn.Conv1d(2, 4, 3), nn.ConvTranspose2d(4, 3, 2), nn.Conv3d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(self.one(x).unsqueeze(-1))
        return self.three(x.unsqueeze(-1)).flatten(1)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "tiny": (TinyNet, lambda: torch.randn(8, 1, 6, 6)),
    "channels_last": (TinyNet, lambda: torch.randn(8, 1, 6, 6).to(memory_format=torch.channels_last)),
    "shared module": (Recurrent, lambda: torch.randn(8, 4)),
    "keywords": (Keywords, lambda: torch.randn(8, 4)),
    "two inputs": (TwoInputs, lambda: {"image": torch.randn(4, 1, 6, 6), "ids": torch.randint(10, (4,))}),
    "lstm": (Tagger, lambda: torch.randint(10, (4, 5))),
    "attention": (SelfAttention, lambda: torch.randn(4, 5, 8)),
    "other kinds": (Transposed, lambda: torch.randn(4, 2, 6)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_equals_the_naive_way(name: str, precision: str) -> None:
    model, inputs = MODELS[name][0]().eval(), MODELS[name][1]()
    simulated = simulate(model, inputs)
    policy = Policy.uniform(simulated.network, Precision.parse(precision))
    found, expected = run(simulated.apply(policy), inputs), naive(model, inputs, policy)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    if precision == "int2/uint4":
        assert any(not torch.equal(one, other) for one, other in zip(found, run(model, inputs), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_mixed_policies_equal_the_naive_way(seed: int) -> None:
    rng, inputs = np.random.default_rng(seed), torch.randn(8, 1, 6, 6)
    model = TinyNet().eval()
    simulated = simulate(model, inputs)
    policy = Policy({name: Precision.parse(PRECISIONS[rng.integers(6)]) for name in simulated.network.names})
    found, expected = run(simulated.apply(policy), inputs), naive(model, inputs, policy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_applying_nothing_restores_float_exactly(bench: Bench) -> None:
    simulated, x = bench.simulated, bench.task.example_input
    before = run(simulated.apply({}), x)[0]
    weights = {name: simulated.weight(name).clone() for name in bench.network.names}
    simulated.apply(Policy.uniform(bench.network, Precision.parse("int2/uint4")))
    assert not torch.equal(run(simulated.model, x)[0], before)
    simulated.apply({})
    assert torch.equal(run(simulated.model, x)[0], before)
    assert all(torch.equal(simulated.weight(name), weights[name]) for name in weights)
    assert all(torch.equal(simulated.float_weight(name), weights[name]) for name in weights)
    assert not any(module._forward_pre_hooks for module in simulated.model.modules())


def test_order_of_applications_does_not_matter(bench: Bench) -> None:
    rng, x = np.random.default_rng(0), bench.task.example_input
    policies = [bench.space.sample(rng) for _ in range(6)]
    first = [run(bench.simulated.apply(policy), x)[0].clone() for policy in policies]
    for index in (5, 0, 3, 3, 1, 4, 2, 0):
        assert torch.equal(run(bench.simulated.apply(policies[index]), x)[0], first[index])


def test_the_users_own_hooks_stay() -> None:
    model, calls = Keywords(), []
    model.a.register_forward_pre_hook(lambda module, args, kwargs: calls.append(1), with_kwargs=True)
    simulated = QuantizedModel(model.eval(), trace(model, torch.randn(2, 4)))
    simulated.calibrate([torch.randn(2, 4)])
    calls.clear()
    for precision in ("int8/uint8", "float"):
        run(simulated.apply(Policy.uniform(simulated.network, Precision.parse(precision))), torch.randn(2, 4))
    assert len(calls) == 2


def test_weights_take_few_values(bench: Bench) -> None:
    bench.simulated.apply(Policy.uniform(bench.network, Precision.parse("int2/uint8")))
    for name in bench.network.names:
        channels = bench.simulated.weight(name).flatten(1)
        assert all(len(channel.unique()) <= 3 for channel in channels)


def test_tied_weights_follow_together() -> None:
    model = Decoder().eval()
    ids = torch.randint(20, (2, 8))
    simulated = simulate(model, ids)
    policy = {"embedding": Precision.parse("int3"), "decoder": Precision.parse("int3/uint8")}
    simulated.apply(policy)
    assert simulated.model.embedding.weight is simulated.model.decoder.weight
    assert len(simulated.model.embedding.weight[0].unique()) <= 7


def test_ranges_can_be_given(bench: Bench) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int4/uint8"))
    expected = run(bench.simulated.apply(policy), bench.task.example_input)[0]
    known = Ranges(dict(bench.simulated.ranges.weights), dict(bench.simulated.ranges.inputs))
    bench.simulated.apply({})
    fresh = QuantizedModel(copy.deepcopy(bench.simulated.model), bench.network, ranges=known)
    assert torch.equal(run(fresh.apply(policy), bench.task.example_input)[0], expected)


def test_minmax_and_mse_differ(bench: Bench) -> None:
    model, x = bench.simulated.apply({}), torch.randn(64, 1, 6, 6)
    mse, minmax = (simulate(model, x, QuantizerSettings(method, method)) for method in ("mse", "minmax"))
    int3, uint4 = Format.parse("int3"), Format.parse("uint4")
    assert (minmax.weight_parameters("left", int3)["scale"] >= mse.weight_parameters("left", int3)["scale"]).all()
    assert minmax.input_range("stem", uint4).scale > mse.input_range("stem", uint4).scale


def test_altered_parameters_become_the_float_ones(bench: Bench) -> None:
    simulated = bench.simulated
    policy = Policy.uniform(bench.network, Precision.parse("int8/uint8"))
    simulated.apply(policy)
    weight, bias = torch.randn(6, 4, 3, 3), torch.randn(6)
    simulated.alter({"left.weight": weight, "right.bias": bias})
    assert torch.equal(simulated.apply({}).left.weight, weight)
    assert torch.equal(simulated.model.right.bias, bias)
    quantized = simulated.apply(policy).left.weight.clone()
    assert not torch.equal(quantized, weight)
    assert torch.equal(simulated.apply({}).left.weight, weight)
    for bad in ({"left.bias": torch.zeros(5)}, {"nowhere": torch.zeros(1)}):
        with pytest.raises(DataError, match="cannot alter"):
            simulated.alter(bad)


def test_altered_tied_weights_stay_tied() -> None:
    simulated = simulate(Decoder().eval(), torch.randint(20, (2, 8)))
    weight = torch.randn(20, 16)
    simulated.alter({"embedding.weight": weight})
    simulated.apply({})
    assert torch.equal(simulated.model.embedding.weight, weight)
    assert torch.equal(simulated.model.decoder.weight, weight)


def test_calibration_errors(bench: Bench) -> None:
    with pytest.raises(DataError, match="calibration split is empty"):
        bench.simulated.calibrate([])
    with pytest.raises(DataError, match="layer stem: a value is NaN or infinite"):
        bench.simulated.calibrate([torch.full((2, 1, 6, 6), torch.nan)])
    model = Branching().eval()
    with torch.no_grad():
        simulated = QuantizedModel(model, trace(model, torch.ones(2, 4)))
    simulated.calibrate([-torch.ones(2, 4)])
    with pytest.raises(DataError, match="uint8 input of layer positive: no calibration batch reached it"):
        simulated.input_range("positive", Format.parse("uint8"))
    with pytest.raises(ConfigError, match=r"quantizer.input_range=median is unknown"):
        QuantizerSettings(input_range="median")


def test_failed_calibration_leaves_no_hooks(bench: Bench) -> None:
    with pytest.raises(DataError):
        bench.simulated.calibrate([torch.full((2, 1, 6, 6), torch.nan)])
    assert not any(module._forward_pre_hooks for module in bench.simulated.model.modules())


def test_sharing_memory_between_inputs_changes_no_output(bench: Bench) -> None:
    images = bench.task.example_input
    plain = bench.simulated
    shared = QuantizedModel(copy.deepcopy(plain.model), plain.network, ranges=plain.ranges, reuse_memory=True)
    policy = Policy.uniform(plain.network, Precision.parse("int4/uint4"))
    for name, precision in policy.items():
        plain.weight_parameters(name, precision.weight)
        plain.input_range(name, precision.input)
    with exact_inference():
        expected = plain.apply(policy)(images)
        assert torch.equal(shared.apply(policy)(images), expected)
        assert torch.equal(shared.model(images[:1]), plain.model(images[:1])), "memory larger than needed"
