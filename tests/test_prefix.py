"""Policies run from recordings against policies run in full: equal bit for bit, and with less to compute."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import networks
import numpy as np
import prefix_networks as nets
import pytest
import test_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Bench, TinyNet, make_bench
from torch import Tensor, nn

from hwmodels import Format, Network, Precision
from search.quantize.fold import fold_batch_norm
from search.quantize.prefix import PrefixRunner
from search.quantize.settings import QuantizerSettings
from search.quantize.simulate import QuantizedModel
from search.tasks.networks import digits_net
from search.tasks.task import Task
from search.trace import trace

WEIGHTS, INPUTS = ("int2", "int4-g4", "nf4", "float"), ("uint4", "int8-token", "float")


class Given(Task):
    """A model and its batches."""

    def __init__(self, model: nn.Module, *batches: Any) -> None:
        self.model, self._batches, self.example_input = model.eval(), batches, batches[0]

    def batches(self, split: str) -> Sequence[Any]:
        return self._batches

    def inputs(self, batch: Any) -> Any:
        return batch

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        raise NotImplementedError


def runner_of(task: Task, memory_limit: int | None = None, **settings: Any) -> tuple[PrefixRunner, QuantizedModel]:
    folded = fold_batch_norm(task.model, task.example_input)
    network = trace(folded.model, task.example_input)
    simulated = QuantizedModel(folded.model, network, QuantizerSettings(**settings), reuse_memory=True)
    batches = list(task.batches("calibration"))
    simulated.calibrate(batches)
    return PrefixRunner(simulated, task, batches, memory_limit), simulated


def keep(outputs: Tensor, batch: int) -> Tensor:
    return outputs.clone()


def single_choices(network: Network) -> list[dict[str, Precision]]:
    weights = [{layer.name: Precision(Format.parse(name))} for layer in network for name in WEIGHTS[:2]]
    return weights + [
        {layer.name: Precision(input=Format.parse(INPUTS[0]))} for layer in network if layer.quantizes_input
    ]


def random_policies(network: Network, count: int, seed: int = 0) -> list[dict[str, Precision]]:
    """Policies of which each is another one with a few layers changed, so that they have prefixes in common."""
    rng = np.random.default_rng(seed)

    def precision(name: str) -> Precision:
        input = rng.choice(INPUTS) if network[name].quantizes_input else "float"
        return Precision(Format.parse(rng.choice(WEIGHTS)), Format.parse(input))

    policies = [{name: precision(name) for name in network.names}]
    while len(policies) < count:
        changed = rng.choice(network.names, size=rng.integers(3))
        policies.append(policies[rng.integers(len(policies))] | {name: precision(name) for name in changed})
    return policies


def assert_equal(runner: PrefixRunner, policies: Sequence[Mapping[str, Precision]]) -> None:
    """Every policy exactly once, with the very outputs of a full run."""
    found = list(runner.sweep(policies, keep))
    assert sorted(index for index, _ in found) == list(range(len(policies)))
    for index, outputs in found:
        expected = runner.run(policies[index], keep)
        assert all(map(torch.equal, outputs, expected)), index
        assert len(outputs) == len(expected)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 6, 6)


def vectors(width: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(6, width)


def ids(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(10, shape)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "tiny": (TinyNet, images),
    "digits": (digits_net, lambda: torch.randn(4, 1, 8, 8)),
    "decoder": (networks.Decoder, ids(4, 8)),
    "branching": (networks.Branching, vectors(4)),
    "recurrent": (networks.Recurrent, vectors(4)),
    "two inputs": (networks.TwoInputs, lambda: {"image": images(), "ids": torch.randint(10, (6,))}),
    "tagger": (networks.Tagger, ids(4, 5)),
    "in place": (networks.InPlace, lambda: torch.randn(4, 1, 3, 3)),
    "transformer": (test_models.Transformer, ids(4, 6)),
    "conv and lstm": (test_models.Recurrent, lambda: torch.randn(4, 4, 9)),
    "gated": (test_models.Gated, lambda: {"left": torch.randn(4, 8), "right": torch.randn(4, 3)}),
    "blocks in place": (nets.InPlaceNet, images),
    "dense": (nets.Dense, vectors(4)),
    "pairs": (nets.Pairs, vectors(6)),
    "functional tie": (nets.FunctionalTie, ids(4, 5)),
    "attending": (nets.Attending, lambda: torch.randn(3, 5, 8)),
    "packing": (nets.Packing, ids(2, 5)),
    "late write": (nets.LateWrite, vectors(4)),
    "shared object": (nets.SharedObject, vectors(4)),
    "same memory": (nets.SameMemory, vectors(4)),
    "twice": (nets.Twice, lambda: torch.randn(4, 1, 4, 4)),
    "attribute": (lambda: nets.Remembering("attribute"), vectors(4)),
    "list": (lambda: nets.Remembering("list"), vectors(4)),
    "buffer": (lambda: nets.Remembering("buffer"), vectors(4)),
}


def make(name: str, batches: int = 3) -> Given:
    torch.manual_seed(0)
    model, draw = CASES[name]
    return Given(model(), *(draw() for _ in range(batches)))


@pytest.mark.parametrize(
    ("name", "batches"),
    [(name, 2) for name in CASES] + [(name, 1) for name in ("tiny", "attribute", "blocks in place")],
)
def test_outputs_are_those_of_full_runs(name: str, batches: int) -> None:
    runner, simulated = runner_of(make(name, batches))
    before = [(dict(vars(module)), list(module._forward_pre_hooks)) for module in simulated.apply({}).modules()]
    assert_equal(runner, single_choices(simulated.network))
    assert_equal(runner, random_policies(simulated.network, 8))
    assert runner.trouble is None, runner.trouble
    after = [(dict(vars(module)), list(module._forward_pre_hooks)) for module in simulated.apply({}).modules()]
    assert [(vars.keys(), hooks) for vars, hooks in before] == [(vars.keys(), hooks) for vars, hooks in after]


@pytest.mark.parametrize("name", ["tiny", "blocks in place", "twice", "transformer", "dense"])
def test_tensors_quantized_where_they_are_produced(name: str) -> None:
    runner, simulated = runner_of(make(name), placement="full")
    assert simulated.points
    policies = single_choices(simulated.network)
    uniform = {
        layer.name: Precision.parse("int8/uint8" if layer.quantizes_input else "int8/float")
        for layer in simulated.network
    }
    policies += [uniform | policy for policy in policies]
    assert_equal(runner, policies + random_policies(simulated.network, 4))
    for layer, precision in uniform.items():  # cut right before each layer
        assert_equal(
            runner, [uniform | {layer: Precision(Format.parse(weight), precision.input)} for weight in WEIGHTS]
        )
    assert runner.trouble is None, runner.trouble


@pytest.fixture(scope="module")
def tiny() -> tuple[PrefixRunner, Bench]:
    bench = make_bench(weight=("int2", "int4", "float"), input=("uint4", "float"))
    return PrefixRunner(bench.simulated, bench.task, list(bench.task.batches("selection"))), bench


@settings(max_examples=25)
@given(data=st.data())
def test_any_set_of_policies(tiny: tuple[PrefixRunner, Bench], data: st.DataObject) -> None:
    runner, bench = tiny
    points = st.tuples(*(st.integers(0, len(decision.formats) - 1) for decision in bench.space.decisions))
    policies = [bench.space.decode(point) for point in data.draw(st.lists(points, max_size=8))]
    assert_equal(runner, policies)
    assert runner.trouble is None


def calls_of_layers(simulated: QuantizedModel) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name in simulated.network.names:
        simulated.owner(name).register_forward_hook(lambda module, args, output, name=name: calls.update([name]))
    return calls


def test_each_layer_runs_only_for_choices_before_it() -> None:
    depth = 8
    runner, simulated = runner_of(Given(nets.Chain(depth), torch.randn(4, 16)))
    calls = calls_of_layers(simulated)
    policies = single_choices(simulated.network)
    each = len(policies) // depth
    assert len(list(runner.sweep(policies, keep))) == each * depth
    for position, name in enumerate(simulated.network.names):
        recorded = position < depth - 1
        assert calls[name] == each * (position + 1) + recorded + 2, "choices up to it, recorded, tried out twice"
    calls.clear()
    list(runner.sweep(policies, keep))
    assert calls[simulated.network.names[0]] == each + 1, "nothing is tried out again"


def test_a_glance_at_a_weight_is_no_use_of_it() -> None:
    runner, simulated = runner_of(make("functional tie", batches=1))  # asks for a later layer's type first
    calls = calls_of_layers(simulated)
    middle = [choice for choice in single_choices(simulated.network) if "middle" in choice]
    list(runner.sweep(middle, keep))
    assert len(middle) == 3
    assert calls["embedding"] == 1 + 2, "recorded, tried out twice"


def test_memory_does_not_grow_with_depth() -> None:
    peaks = []
    for depth in (4, 16):
        runner, simulated = runner_of(Given(nets.Chain(depth), torch.randn(32, 16), torch.randn(32, 16)))
        assert_equal(runner, single_choices(simulated.network))
        peaks.append(runner.peak_bytes)
    activation = 2 * 32 * 16 * 4
    assert peaks[0] == peaks[1] <= 2 * activation


@pytest.mark.parametrize("name", ["tiny", "digits", "transformer", "blocks in place"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_memory_limit(name: str, share: float) -> None:
    task = make(name)
    runner, simulated = runner_of(task)
    policies = random_policies(simulated.network, 8)
    list(runner.sweep(policies, keep))
    limit = int(share * runner.peak_bytes)
    limited, _ = runner_of(task, limit)
    assert_equal(limited, policies)
    assert limited.peak_bytes <= limit < runner.peak_bytes
    assert limited.trouble is None


def test_bytes_are_those_of_the_tensors_kept() -> None:
    runner, simulated = runner_of(Given(nets.Chain(2), torch.randn(5, 16)))
    list(runner.sweep(single_choices(simulated.network), keep))
    assert runner.peak_bytes == 5 * 16 * 4


def test_what_nothing_tells_about_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    task = Given(nets.Remembering("object"), *(torch.randn(6, 4) for _ in range(3)))
    runner, simulated = runner_of(task)
    with caplog.at_level(logging.WARNING):
        assert_equal(runner, single_choices(simulated.network))
    assert runner.trouble is not None
    assert "Remembering cannot be run from recordings: its outputs are others" in runner.trouble
    assert [record.message for record in caplog.records] == [f"{runner.trouble}; every policy is run in full"]
    calls = calls_of_layers(simulated)
    list(runner.sweep([{}, *single_choices(simulated.network)], keep))
    assert set(calls.values()) == {3 * (1 + len(single_choices(simulated.network)))}


@pytest.mark.parametrize(
    ("model", "reason"),
    [(nets.Random(), "its outputs are others"), (nets.Counting(), "RuntimeError: the first layer did not run")],
)
def test_networks_that_cannot_be_cut(model: nn.Module, reason: str) -> None:
    runner, simulated = runner_of(Given(model, torch.randn(6, 4)))
    policies = single_choices(simulated.network)
    assert len(list(runner.sweep(policies, keep))) == len(policies)
    assert reason in str(runner.trouble)


def test_a_network_that_changes_its_way_later() -> None:
    runner, simulated = runner_of(Given(nets.Unsteady(), torch.randn(6, 4)))
    policies = single_choices(simulated.network)
    sweep = runner.sweep(policies, keep)
    next(sweep)
    assert runner.trouble is None
    simulated.model.note.value = True
    found = list(sweep)
    assert len(found) == len(policies) - 1
    assert "was called instead of" in str(runner.trouble)


def test_errors_leave_the_model_as_it_was() -> None:
    runner, simulated = runner_of(make("transformer"))
    policies = single_choices(simulated.network)

    def fail(outputs: Tensor, batch: int) -> Tensor:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        list(runner.sweep(policies, fail))
    unfinished = runner.sweep(policies, keep)
    next(unfinished)
    unfinished.close()
    assert not any("_call_impl" in vars(module) for module in simulated.model.modules())
    assert_equal(runner, policies)


def test_errors_of_the_model_are_its_own() -> None:
    runner, simulated = runner_of(make("tiny"))
    simulated.model.head.register_forward_hook(lambda module, args, output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(runner.sweep(single_choices(simulated.network), keep))


def test_few_policies() -> None:
    runner, simulated = runner_of(make("tiny"))
    choice = single_choices(simulated.network)[0]
    assert list(runner.sweep([], keep)) == []
    assert_equal(runner, [choice])
    assert_equal(runner, [choice, choice, {}, dict(choice)])


def test_what_is_read_is_what_is_kept() -> None:
    runner, simulated = runner_of(make("tiny"))
    policies = single_choices(simulated.network)
    for index, found in runner.sweep(policies, lambda outputs, batch: (batch, outputs.sum().item())):
        assert found == runner.run(policies[index], lambda outputs, batch: (batch, outputs.sum().item()))
        assert [batch for batch, _ in found] == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_and_memory_layouts(dtype: torch.dtype) -> None:
    model = digits_net().to(dtype).to(memory_format=torch.channels_last)
    batches = [torch.randn(4, 1, 8, 8).to(dtype).to(memory_format=torch.channels_last) for _ in range(2)]
    runner, simulated = runner_of(Given(model, *batches), repair="bias")
    assert_equal(runner, single_choices(simulated.network))
    assert runner.trouble is None


def test_a_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    runner, simulated = runner_of(Given(model, *(torch.randint(20, (4, 8)) for _ in range(2))))
    policies = single_choices(simulated.network)
    assert_equal(runner, policies)
    assert_equal(runner, random_policies(simulated.network, 6))
    assert runner.trouble is None
    calls = calls_of_layers(simulated)
    list(runner.sweep(policies, keep))
    in_full = 2 * len(policies) * len(simulated.network)
    assert calls.total() < 0.6 * in_full
