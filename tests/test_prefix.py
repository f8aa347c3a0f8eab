"""Policies run from recordings against policies run in full: equal bit for bit, and with less to compute."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networks
import numpy as np
import pytest
import test_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Bench, TinyNet, make_bench
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

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


class Bottleneck(nn.Module):
    """A residual block as torchvision has it: activations in place, the shortcut added in place."""

    def __init__(self, width: int, downsample: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.downsample = nn.Sequential(nn.Conv2d(width, width, 1)) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.bn1(self.conv1(x))))
        shortcut = x if self.downsample is None else self.downsample(x)
        out += shortcut
        return self.relu(out)


class InPlaceNet(nn.Module):
    """Blocks in a row whose activations overwrite what was returned to others; the first one changes its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(nn.ReLU(inplace=True), Bottleneck(4, True), Bottleneck(4, False))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        deep = self.blocks(stem)  # overwrites `stem`
        return self.head(torch.cat([stem, deep], 1).mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads all earlier results; a dictionary that modules pass on and fill is what is returned."""

    class Step(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc = nn.Linear(width, 4)

        def forward(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
            found[f"step{len(found)}"] = self.fc(torch.cat(list(found.values()), 1)).tanh()
            return found

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(self.Step(width) for width in (4, 8, 12))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {"x": x}
        for step in self.steps:
            found = step(found)
        return {"logits": found["step3"], **found}


@dataclass
class Pair:
    """What `Pairs` passes on."""

    low: Tensor
    high: Tensor | None = None
    label: str = "pair"


class Pairs(nn.Module):
    """Dataclasses with views of one memory between modules, written to by others."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Pair:
            return Pair(*self.fc(x).chunk(2, 1))

    def __init__(self) -> None:
        super().__init__()
        self.split, self.low, self.high = self.Split(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        pair = self.split(x)
        low = self.low(pair.low)
        pair.low.relu_()
        pair.label = "used"
        return self.high(pair.low + pair.high) + low


class FunctionalTie(nn.Module):
    """The first layer's weight is used again by a function, and read for its type before anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(10, 6), nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, ids: Tensor) -> Tensor:
        dtype = self.middle.weight.dtype
        x = self.block(self.middle(self.embedding(ids).to(dtype)))
        return F.linear(x, self.embedding.weight) + F.linear(x, self.middle.weight).sum()


class Attending(nn.Module):
    """Attention, whose output projection is a layer that is never called, behind and before other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        mixed, weights = self.attention(x, x, x)
        return self.after(mixed) + weights.mean()


class Packing(nn.Module):
    """A module that returns a packed sequence, and a GRU after it."""

    class Pack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 6)

        def forward(self, ids: Tensor) -> Any:
            return pack_padded_sequence(self.embedding(ids), torch.tensor([3, 5]), True, enforce_sorted=False)

    def __init__(self) -> None:
        super().__init__()
        self.pack, self.gru, self.head = self.Pack(), nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(pad_packed_sequence(self.gru(self.pack(ids))[0], batch_first=True)[0])


class LateWrite(nn.Module):
    """Overwrites what an earlier layer returned, but only where a later one returns little: on some policies' paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        if b.abs().sum() < x.abs().sum():
            a.mul_(b)
        else:
            b = self.head(b).repeat(1, 2)[:, :4]
        return self.head(a + b)


class Note:
    """An object that a module holds, with something in it."""

    value: Any = None


class Writer(nn.Module):
    """Leaves something behind: in an attribute, a list, a buffer, or an object that nothing tells about."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.fc, self.where, self.mark, self.marks, self.note = nn.Linear(4, 4), where, None, [], Note()
        self.register_buffer("kept", torch.zeros(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.where == "attribute":
            self.mark = y.tanh()
        elif self.where == "list":
            self.marks.append(y.tanh())
        elif self.where == "buffer":
            self.kept.copy_(y.tanh())
        else:
            self.note.value = y.tanh()
        return y

    def find(self) -> Tensor:
        if self.where == "attribute":
            return self.mark
        if self.where == "list":
            return self.marks.pop()
        return self.kept if self.where == "buffer" else self.note.value


class Remembering(nn.Module):
    """Reads what an earlier module left behind."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Sequential(Writer(where)), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        middle = self.middle(self.first(x))
        return self.last(middle + self.first[0].find())


class SharedObject(nn.Module):
    """A module returns an object that it keeps; what others put into it, it sees."""

    class Opener(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.note = nn.Linear(4, 4), Note()

        def forward(self, x: Tensor) -> Note:
            self.note.value = self.fc(x)
            return self.note

    def __init__(self) -> None:
        super().__init__()
        self.opener, self.middle, self.last = self.Opener(), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        note = self.opener(x)
        note.value = self.middle(note.value)
        return self.last(self.opener.note.value)


class SameMemory(nn.Module):
    """A module returns what it is given, which was computed outside of modules and is written to afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.same = nn.Linear(4, 4), nn.Sequential(nn.Identity())
        self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        same = self.same(x)
        y = self.middle(x)
        x.add_(1)
        return self.last(same + y)


class Twice(nn.Module):
    """A residual block that runs twice, with another layer between."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(self.conv(x) + x, 2)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.middle = nn.Conv2d(1, 4, 3, padding=1), self.Block(), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = self.block(torch.tanh(self.middle(x)))
        return self.head(x.flatten(1))


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
    "blocks in place": (InPlaceNet, images),
    "dense": (Dense, vectors(4)),
    "pairs": (Pairs, vectors(6)),
    "functional tie": (FunctionalTie, ids(4, 5)),
    "attending": (Attending, lambda: torch.randn(3, 5, 8)),
    "packing": (Packing, ids(2, 5)),
    "late write": (LateWrite, vectors(4)),
    "shared object": (SharedObject, vectors(4)),
    "same memory": (SameMemory, vectors(4)),
    "twice": (Twice, lambda: torch.randn(4, 1, 4, 4)),
    "attribute": (lambda: Remembering("attribute"), vectors(4)),
    "list": (lambda: Remembering("list"), vectors(4)),
    "buffer": (lambda: Remembering("buffer"), vectors(4)),
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


class Chain(nn.Module):
    """Blocks one after the other, as language models have them: only the last result is of use."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def calls_of_layers(simulated: QuantizedModel) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name in simulated.network.names:
        simulated.owner(name).register_forward_hook(lambda module, args, output, name=name: calls.update([name]))
    return calls


def test_each_layer_runs_only_for_choices_before_it() -> None:
    depth = 8
    runner, simulated = runner_of(Given(Chain(depth), torch.randn(4, 16)))
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
        runner, simulated = runner_of(Given(Chain(depth), torch.randn(32, 16), torch.randn(32, 16)))
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
    runner, simulated = runner_of(Given(Chain(2), torch.randn(5, 16)))
    list(runner.sweep(single_choices(simulated.network), keep))
    assert runner.peak_bytes == 5 * 16 * 4


def test_what_nothing_tells_about_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    task = Given(Remembering("object"), *(torch.randn(6, 4) for _ in range(3)))
    runner, simulated = runner_of(task)
    with caplog.at_level(logging.WARNING):
        assert_equal(runner, single_choices(simulated.network))
    assert runner.trouble is not None
    assert "Remembering cannot be run from recordings: its outputs are others" in runner.trouble
    assert [record.message for record in caplog.records] == [f"{runner.trouble}; every policy is run in full"]
    calls = calls_of_layers(simulated)
    list(runner.sweep([{}, *single_choices(simulated.network)], keep))
    assert set(calls.values()) == {3 * (1 + len(single_choices(simulated.network)))}


class Random(nn.Module):
    """Returns something else every time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + torch.rand(4))


class Counting(nn.Module):
    """Insists that its first layer runs."""

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.note.value = (self.note.value or 0) + 1
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = self.Counted(4, 4), nn.Linear(4, 3)
        self.first.note = Note()

    def forward(self, x: Tensor) -> Tensor:
        before = self.first.note.value or 0
        x = self.first(x)
        if self.first.note.value != before + 1:
            raise RuntimeError("the first layer did not run")
        return self.last(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Random(), "its outputs are others"), (Counting(), "RuntimeError: the first layer did not run")],
)
def test_networks_that_cannot_be_cut(model: nn.Module, reason: str) -> None:
    runner, simulated = runner_of(Given(model, torch.randn(6, 4)))
    policies = single_choices(simulated.network)
    assert len(list(runner.sweep(policies, keep))) == len(policies)
    assert reason in str(runner.trouble)


class Unsteady(nn.Module):
    """Goes another way every time from when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.note = Note()

    def forward(self, x: Tensor) -> Tensor:
        if self.note.value is not None:
            self.note.value = not self.note.value
        x = self.right(x) if self.note.value else self.left(x)
        return self.last(x)


def test_a_network_that_changes_its_way_later() -> None:
    runner, simulated = runner_of(Given(Unsteady(), torch.randn(6, 4)))
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
