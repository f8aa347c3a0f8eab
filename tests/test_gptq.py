"""GPTQ: against the optimal feedback solved for directly, brute force, nearest rounding, and on every kind of layer."""

from __future__ import annotations

import sys

import networks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repairing import LAYERS, correlated, layer_error, same, simulate, state, uniform
from tiny import Bench, TinyTask, make_bench
from torch import Tensor, nn

from hwmodels import Format, Precision
from search.errors import ConfigError, DataError
from search.quantize.formats import quantize_weight
from search.quantize.ranges import weight_parameters
from search.recover.gptq import gptq, gptq_matrix, gptq_weight, inverse_factor
from search.recover.statistics import Gram, matrix_error
from search.recover.watch import watch

FORMATS = (
    *("int2", "int3", "uint4", "int4-full", "int4-tensor", "int4-g8", "int3-g5", "int1", "binary", "ternary", "ttq"),
    *("codebook3", "codebook2-channel", "nf4", "fp4", "fp6_e3m2", "fp8_e5m2", "mxfp4", "mxint8", "nvfp4"),
)


def half_steps(values: Tensor, columns: Tensor) -> Tensor:
    """Rounds to multiples of a half."""
    return (values * 2).round() / 2


def problem(channels: int, inputs: int, seed: int = 0) -> tuple[nn.Linear, Tensor]:
    """A linear layer and the Gram matrix of inputs that are mixtures of a few sources."""
    module, gram = nn.Linear(inputs, channels), Gram(nn.Linear(inputs, channels))
    gram.add(correlated(512, inputs, seed=seed))
    assert gram.value is not None
    return module, gram.value


def rounded_to(weight: Tensor, gram: Tensor, format: str, **options: object) -> tuple[Tensor, Tensor]:
    """A weight by GPTQ and to the nearest values."""
    parsed, module = Format.parse(format), nn.Linear(*reversed(weight.shape))
    parameters = weight_parameters(weight, parsed, 0)
    by_gptq = gptq_weight(module, weight, gram, parsed, 0, parameters, **options)
    assert torch.equal(quantize_weight(by_gptq, parsed, 0, parameters), by_gptq), "it lies on the grid"
    return by_gptq, quantize_weight(weight, parsed, 0, parameters)


def optimal_feedback(matrix: Tensor, hessian: Tensor, order: list[int]) -> Tensor:
    """Rounds one input after another; each time those left are moved to where the squared output error is least."""
    left, free = matrix.double().clone(), list(order)
    for column in order:
        rounded = half_steps(left[:, column], torch.zeros(1))
        free.remove(column)
        if free:
            inverse = torch.linalg.inv(hessian[free][:, free])
            left[:, free] -= torch.outer(rounded - left[:, column], inverse @ hessian[free, column])
        left[:, column] = rounded
    return left.float()


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_feedback_is_the_optimal_one(activation_order: bool, block: int) -> None:
    _, gram = problem(6, 12)
    matrix = torch.randn(6, 12)
    hessian = gram[0] + 0.01 * gram[0].diagonal().mean() * torch.eye(12)
    order = gram[0].diagonal().argsort(descending=True) if activation_order else torch.arange(12)
    found = gptq_matrix(matrix[None], gram, half_steps, 0.01, activation_order, block)
    torch.testing.assert_close(found[0], optimal_feedback(matrix, hessian, order.tolist()), rtol=0, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_without_correlation_leave_nothing_to_feed_back(format: str) -> None:
    weight, gram = torch.randn(5, 16), torch.diag(torch.rand(16) + 0.1).double()[None]
    by_gptq, nearest = rounded_to(weight, gram, format)
    assert torch.equal(by_gptq, nearest)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.sampled_from(["int2", "uint2", "ternary", "codebook2"]))
def test_error_lies_between_the_optimum_and_nearest(seed: int, format: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    weight, gram = torch.randn(1, 6, generator=generator), (x.T @ x).double()[None]
    by_gptq, nearest = rounded_to(weight, gram, format)
    parameters = weight_parameters(weight, Format.parse(format), 0)
    grid = quantize_weight(torch.linspace(-9, 9, 999)[None], Format.parse(format), 0, parameters).unique()
    everything = torch.cartesian_prod(*[grid] * 6)
    best = matrix_error((everything - weight)[None], gram).min()
    of_gptq, of_nearest = (matrix_error((q - weight)[None], gram).item() for q in (by_gptq, nearest))
    assert best * (1 - 1e-9) <= of_gptq <= of_nearest * (1 + 1e-9)


@pytest.mark.parametrize(
    ("format", "factor"),
    [("int2", 2.0), ("int3", 2.0), ("int4-g8", 2.0), ("mxfp4", 2.0), ("codebook3", 2.0), ("nf4", 2.0), ("fp4", 2.0)],
)
def test_output_error_is_well_below_that_of_nearest(format: str, factor: float) -> None:
    module, gram = problem(32, 64)
    weight = module.weight.detach()
    errors = [matrix_error((q - weight)[None], gram).sum().item() for q in rounded_to(weight, gram, format)]
    assert errors[1] > factor * errors[0], f"{format}: {errors[1] / errors[0]:.2f} times less error"


def test_activation_order_helps() -> None:
    ratios = []
    for seed in range(5):
        module, gram = problem(32, 64, seed)
        weight = module.weight.detach()
        gram = gram[:, torch.arange(63, -1, -1)][:, :, torch.arange(63, -1, -1)]
        ordered, plain = (rounded_to(weight, gram, "int3", activation_order=order)[0] for order in (True, False))
        ratios.append(
            matrix_error((plain - weight)[None], gram).sum() / matrix_error((ordered - weight)[None], gram).sum()
        )
    assert torch.stack(ratios).log().mean() > 0


def test_an_input_that_is_never_seen_has_no_say() -> None:
    module, gram = problem(4, 10)
    gram[:, 3], gram[:, :, 3] = 0, 0
    weight = module.weight.detach()
    by_gptq, nearest = rounded_to(weight, gram, "int3")
    assert torch.equal(by_gptq[:, 3], nearest[:, 3])
    assert not torch.equal(by_gptq, nearest)
    assert torch.equal(*rounded_to(weight, torch.zeros_like(gram), "int3"))


def test_damping_is_raised_until_the_hessian_can_be_factorised() -> None:
    x = torch.randn(1, 8).double()
    singular = (x.T @ x)[None]
    assert inverse_factor(singular, damping=1e-30).isfinite().all()
    indefinite = torch.tensor([[[1.0, 1.5], [1.5, 1.0]]]).double()  # as rounding errors of a long sum may leave it
    upper = inverse_factor(indefinite, damping=0.01)  # 0.1 is not enough either, 1 is
    torch.testing.assert_close(torch.linalg.inv(upper.mT @ upper), indefinite + torch.eye(2).double())
    with pytest.raises(ValueError, match="cannot be factorised, even damped by 1"):
        inverse_factor(indefinite * torch.tensor([[1.0, 3.0], [3.0, 1.0]]))
    with pytest.raises(ValueError, match="NaN"):
        inverse_factor(torch.full((1, 1, 1), torch.nan))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "one sample"])
@pytest.mark.parametrize("precision", ["int3/uint8", "uint2-g5", "codebook2/fp8_e4m3"])
def test_every_kind_of_layer(name: str, precision: str) -> None:
    module, shape = LAYERS[name]
    inputs = correlated(24, *shape[1:], axis=-1 if name == "linear" else 1)
    task, simulated = simulate(nn.Sequential(module), inputs)
    policy = uniform(simulated, precision)
    repaired = gptq(simulated, policy, task)
    assert torch.equal(repaired.quantized_weight("0", policy["0"].weight), repaired.float_weight("0"))
    errors = [layer_error(simulated, model, task, policy, "0") for model in (simulated, repaired)]
    assert errors[1] <= errors[0]
    assert errors[1] < errors[0] or torch.equal(
        repaired.float_weight("0"), simulated.quantized_weight("0", policy["0"].weight)
    )


def test_argument_is_untouched_and_result_is_repeatable(bench: Bench) -> None:
    policy = dict.fromkeys(bench.network.names, Precision.parse("int2/uint4"))
    before, ranges = state(bench.simulated), dict(bench.simulated.ranges.weights)
    first, second = (gptq(bench.simulated, policy, bench.task) for _ in range(2))
    assert same(state(bench.simulated), before)
    assert bench.simulated.ranges.weights.keys() == ranges.keys()
    assert same(state(first), state(second))
    assert not same(state(first), before)
    assert not any(module._forward_hooks for module in first.model.modules())


def test_again_it_changes_nothing(bench: Bench) -> None:
    policy = dict.fromkeys(bench.network.names, Precision.parse("int3/uint8"))
    once = gptq(bench.simulated, policy, bench.task)
    assert same(state(gptq(once, policy, bench.task)), state(once))


def test_only_what_the_policy_quantizes_changes(bench: Bench) -> None:
    policy = {"left": Precision.parse("int2/uint8"), "head": Precision.parse("float/uint8")}
    before, after = state(bench.simulated), state(gptq(bench.simulated, policy, bench.task))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"left.weight"}


def test_shared_weights_and_layers_without_matrix_stay() -> None:
    task, simulated = simulate(networks.Decoder(), torch.randint(20, (32, 8)))
    before, after = state(simulated), state(gptq(simulated, uniform(simulated, "int2"), task))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"block.{layer}.weight" for layer in ("qkv", "out", "up", "down")}


def test_layers_that_read_the_same_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x))

    task, simulated = simulate(Projections(), correlated(32, 4, 6, axis=2))
    policy = uniform(simulated, "int3/uint8") | {"v": Precision.parse("int3/uint4")}
    watched = []

    def counted(*args: object, **options: object) -> None:
        watched.append(list(options["inputs"]))
        watch(*args, **options)

    monkeypatch.setattr(sys.modules["search.recover.gptq"], "watch", counted)
    repaired = gptq(simulated, policy, task)
    assert watched == [["q", "k", "v"], ["out"]]
    for layer in "qkv":
        alone = gptq(simulated, {layer: policy[layer]}, task)
        assert torch.equal(alone.float_weight(layer), repaired.float_weight(layer))


def test_layers_the_data_do_not_reach_stay() -> None:
    task, simulated = simulate(networks.Branching(), torch.rand(8, 4), batch=8)
    policy = dict.fromkeys(simulated.network.names, Precision.parse("int2"))
    after = gptq(simulated, policy, task)
    assert torch.equal(after.float_weight("positive"), after.quantized_weight("positive", policy["positive"].weight))
    task._batches = [torch.zeros(0, 4)]
    assert same(state(gptq(simulated, policy, task)), state(simulated))


def test_errors_name_the_layer(bench: Bench) -> None:
    task, simulated = simulate(nn.Sequential(nn.Linear(4, 3)), torch.randn(8, 4))
    task._batches = [torch.full((4, 4), torch.nan)]
    with pytest.raises(DataError, match=r"layer 0: its Hessian holds NaN.*check the calibration data"):
        gptq(simulated, uniform(simulated, "int4"), task)
    with pytest.raises(ConfigError, match=r"damping <= 1 .* got damping=0"):
        gptq(simulated, {}, task, damping=0)


def test_channels_last_and_bfloat16() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).to(memory_format=torch.channels_last)
    inputs = correlated(32, 4, 6, 6).to(memory_format=torch.channels_last)
    task, simulated = simulate(model.bfloat16(), inputs.bfloat16())
    policy = uniform(simulated, "int4/uint8")
    repaired = gptq(simulated, policy, task)
    weight = repaired.float_weight("0")
    assert weight.dtype == torch.bfloat16
    assert weight.stride() == simulated.float_weight("0").stride()
    assert torch.equal(repaired.quantized_weight("0", policy["0"].weight), weight)
    before, after = (layer_error(simulated, model, task, policy, "0") for model in (simulated, repaired))
    assert after < before


def test_the_network_keeps_more_of_its_quality() -> None:
    drops = []
    for seed in range(4):
        bench = make_bench(TinyTask(seed))
        policy = dict.fromkeys(bench.network.names, Precision.parse("int2/uint8"))
        repaired = gptq(bench.simulated, policy, bench.task)
        drops.append(
            [bench.evaluator.of(model).measure(policy, "report").drop for model in (bench.simulated, repaired)]
        )
    before, after = (sum(column) for column in zip(*drops, strict=True))
    assert after < 0.8 * before
