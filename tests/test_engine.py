"""The engine: only what changed is touched, float comes back bit for bit, memory has a limit, repairs are free."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Bench, TinyTask, make_bench

from hwmodels import Format, Precision
from search.policy import Policy
from search.quantize.cache import TensorCache
from search.quantize.settings import QuantizerSettings
from search.quantize.shift import Mean, expected_shift
from search.quantize.simulate import QuantizedModel, exact_inference

FORMATS = ["int2", "int4", "int4-asym", "uint4", "int4-g4", "binary", "ternary", "ttq", "nf4", "codebook3", "mxfp4"]
INPUTS = ["float", "uint4", "uint8", "int8-token", "int8-dynamic", "fp8_e4m3", "mxint8", "bf16", "int4-g4"]
BENCH = make_bench()


def outputs(bench: Bench, policy: dict | Policy) -> torch.Tensor:
    with exact_inference():
        return bench.simulated.apply(policy)(bench.task.example_input).clone()


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["stem", "left", "right", "head"]),
            st.builds(lambda w, a: Precision.parse(f"{w}/{a}"), st.sampled_from(FORMATS), st.sampled_from(INPUTS)),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=30, deadline=None)
def test_the_way_to_a_policy_leaves_no_trace(policies: list[dict]) -> None:
    expected = outputs(BENCH, {})
    for policy in policies:
        outputs(BENCH, policy)
    found = outputs(BENCH, policies[-1])
    outputs(BENCH, {})
    assert torch.equal(outputs(BENCH, policies[-1]), found)
    assert torch.equal(outputs(BENCH, {}), expected)


def test_applying_touches_only_what_changed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = bench.simulated
    simulated.apply(Policy.uniform(bench.network, Precision.parse("int4/uint8")))
    swapped = []
    monkeypatch.setattr(simulated, "_swap", lambda layer, precision: swapped.append(layer))
    hooks = dict(simulated._hooks)
    changed = dict(Policy.uniform(bench.network, Precision.parse("int4/uint8")))
    simulated.apply(changed | {"left": Precision.parse("int2/uint8")})
    assert swapped == ["left"]
    assert simulated._hooks == hooks, "the inputs' formats are the same"


def test_the_task_s_own_model_is_never_altered() -> None:
    task = TinyTask()
    before = copy.deepcopy(task.model.state_dict())
    bench = make_bench(task)
    outputs(bench, Policy.uniform(bench.network, Precision.parse("int2/uint4")))
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_memory_for_weights_has_a_limit() -> None:
    task = TinyTask()
    plain = make_bench(task)
    few = QuantizedModel(copy.deepcopy(plain.simulated.apply({})), plain.network, QuantizerSettings(memory_bytes=1000))
    few.calibrate([task.example_input])
    for format in ("int2", "int3", "int4", "int5"):
        policy = Policy.uniform(plain.network, Precision.parse(format))
        few.apply(policy)
        assert few._cache.bytes <= 1000
        for layer in plain.network.names:
            assert torch.equal(few.weight(layer), plain.simulated.quantized_weight(layer, Format.parse(format)))


def test_the_least_recently_used_goes_first() -> None:
    cache: TensorCache[str] = TensorCache(torch.device("cpu"), limit=100)
    computed = []

    def compute(key: str) -> tuple[torch.Tensor]:
        computed.append(key)
        return (torch.zeros(10),)  # 40 bytes

    for key in ("a", "b", "a", "c", "a", "b"):
        cache.get(key, lambda key=key: compute(key))
    assert computed == ["a", "b", "c", "b"]
    assert (len(cache), cache.bytes) == (2, 80)
    cache.get("large", lambda: (torch.zeros(100),))
    assert (len(cache), cache.bytes) == (0, 0), "larger than the limit: used, not kept"


def test_a_fork_is_independent(bench: Bench) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int4/uint8"))
    expected = outputs(bench, policy)
    fork = bench.simulated.fork()
    with exact_inference():
        assert torch.equal(fork.apply(policy)(bench.task.example_input), expected)
    fork.alter({"left.weight": torch.zeros(6, 4, 3, 3), "head.bias": torch.ones(5)})
    fork.apply(policy)
    assert torch.equal(outputs(bench, policy), expected)
    assert set(fork.altered(bench.simulated.apply({}), {})) == {"left.weight", "head.bias"}
    assert bench.simulated.altered(copy.deepcopy(bench.simulated.apply({})), policy) == {}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (torch.nn.Linear(6, 4), (5, 7, 6)),
        (torch.nn.Conv1d(4, 6, 3, padding=1, stride=2), (5, 4, 9)),
        (torch.nn.Conv2d(4, 6, 3, padding=1, groups=2), (5, 4, 7, 8)),
        (torch.nn.Conv3d(2, 3, 2), (5, 2, 4, 4, 4)),
        (torch.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (5, 4, 5, 5)),
    ],
)
def test_expected_shift_is_the_shift_of_the_mean_output(module: torch.nn.Module, shape: tuple[int, ...]) -> None:
    x, error = torch.randn(shape), torch.randn_like(module.weight)
    mean = Mean(module)
    for part in x.split(2):
        mean.add(part)
    with torch.no_grad():
        before = module(x)
        shifted = copy.deepcopy(module)
        shifted.weight += error
        moved = shifted(x) - before
    dims = list(range(moved.dim() - 1)) if isinstance(module, torch.nn.Linear) else [0, *range(2, moved.dim())]
    torch.testing.assert_close(expected_shift(module, error, mean.value), moved.mean(dims), rtol=1e-4, atol=1e-5)


def test_choices_can_come_with_their_bias_repaired() -> None:
    task = TinyTask()
    plain = make_bench(task)
    settings_ = QuantizerSettings(repair="bias")
    simulated = QuantizedModel(copy.deepcopy(plain.simulated.apply({})), plain.network, settings_)
    simulated.calibrate(task.inputs(batch) for batch in task.batches("calibration"))
    images = torch.cat([batch[0] for batch in task.batches("calibration")])

    def mean_output(model: torch.nn.Module, layer: str) -> torch.Tensor:
        found = []
        hook = model.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append(output))
        with exact_inference():
            model(images)
        hook.remove()
        return found[0].transpose(0, 1).flatten(1).mean(1)

    for layer in plain.network.names:
        wanted = mean_output(plain.simulated.apply({}), layer)
        choice = {layer: Precision.parse("int2")}
        plainly = mean_output(plain.simulated.apply(choice), layer) - wanted
        repaired = mean_output(simulated.apply(choice), layer) - wanted
        assert plainly.abs().max() > 1e-3
        assert repaired.abs().max() < 1e-5
    original = copy.deepcopy(plain.simulated.apply({}))
    assert set(simulated.altered(original, choice)) == {"head.bias"}
    assert torch.equal(simulated.apply({}).head.bias, original.head.bias)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_types_and_layouts_of_models_are_kept(kind: torch.dtype, layout: torch.memory_format) -> None:
    plain = make_bench()
    model = copy.deepcopy(plain.simulated.apply({})).to(kind, memory_format=layout)
    simulated = QuantizedModel(model, plain.network)
    images = next(iter(plain.task.batches("selection")))[0].to(kind).contiguous(memory_format=layout)
    simulated.calibrate([images])
    with exact_inference():
        expected = simulated.apply({})(images).clone()
        errors = []
        for precision in ("int2/uint4", "int4/uint8", "int8/int8-token"):
            policy = Policy.uniform(plain.network, Precision.parse(precision))
            found = simulated.apply(policy)(images)
            assert found.dtype == kind
            errors.append((found - expected).float().square().mean().item())
        assert errors[0] > errors[1] > errors[2] > 0
        assert torch.equal(simulated.apply({})(images), expected)
