"""The search space against enumeration by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Decoder, Tagger
from tiny import Bench, TinyNet, make_bench
from torch import nn

from hwmodels import FLOAT, Network, Precision
from search.errors import ConfigError
from search.policy import Policy
from search.space import SearchSpace, build_space
from search.trace import shared_parameters, trace

NETWORK = trace(TinyNet().eval(), torch.randn(2, 1, 6, 6))
WEIGHT, INPUT = ("int8", "int2", "int4"), ("uint8", "uint4")


def space_of(**options) -> SearchSpace:
    return build_space(NETWORK, WEIGHT, INPUT, **options)


def brute_force(network: Network, weight, input_, agree) -> set[Policy]:
    """Every assignment of precisions to layers that `agree` accepts."""
    rows = [
        [Precision.parse(f"{w}/{a}") for w in weight for a in (input_ if layer.quantizes_input else ("float",))]
        for layer in network
    ]
    every = (Policy(dict(zip(network.names, choice, strict=True))) for choice in itertools.product(*rows))
    return {policy for policy in every if agree(policy)}


def same(policy: Policy, side: str, *layers: str) -> bool:
    return len({getattr(policy[layer], side) for layer in layers}) == 1


CASES = {
    "plain": ({}, lambda p: True),
    "pinned weight": ({"pins": {"stem": "int8"}}, lambda p: str(p["stem"].weight) == "int8"),
    "pinned input": ({"pins": {"left": "int2/uint8"}}, lambda p: str(p["left"]) == "int2/uint8"),
    "tie": ({"ties": [["left", "right"]]}, lambda p: same(p, "weight", "left", "right")),
    "tie across tensors": (
        {"ties": [["stem", "head"]]},
        lambda p: p["stem"] == p["head"],
    ),
    "overlapping ties": (
        {"ties": [["stem", "left"], ["right", "left"]]},
        lambda p: p["stem"] == p["left"] == p["right"],
    ),
    "tied and pinned": (
        {"ties": [["stem", "head"]], "pins": {"last": "int4"}},
        lambda p: p["stem"] == p["head"] and str(p["head"].weight) == "int4",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_space_is_what_enumeration_says(case: str) -> None:
    options, agree = CASES[case]
    space = space_of(**options)
    expected = brute_force(NETWORK, WEIGHT, INPUT, lambda p: same(p, "input", "left", "right") and agree(p))
    found = list(space)
    assert set(found) == expected
    assert len(found) == len(expected) == space.size
    assert [space.decode(space.encode(policy)) for policy in found] == found
    rng = np.random.default_rng(0)
    assert {space.sample(rng) for _ in range(300)} <= expected
    for unit in space.units:
        assert len(unit.choices) == len(set(unit.choices))
        for layer in unit.layers:
            assert {policy[layer] for policy in expected} == set(space.layer_choices[layer])


@given(data=st.data(), case=st.sampled_from(list(CASES)))
def test_points_and_policies(data: st.DataObject, case: str) -> None:
    space = space_of(**CASES[case][0])
    point = tuple(data.draw(st.integers(0, len(decision.formats) - 1)) for decision in space.decisions)
    policy = space.decode(point)
    assert space.encode(policy) == point
    neighbours = list(space.neighbours(policy))
    assert len(set(neighbours)) == len(neighbours)
    for neighbour in neighbours:
        steps = [abs(a - b) for a, b in zip(point, space.encode(neighbour), strict=True)]
        assert sorted(steps)[-2:] == [0, 1]
    expected = sum(
        (index > 0) + (index < len(decision.formats) - 1)
        for index, decision in zip(point, space.decisions, strict=True)
    )
    assert len(neighbours) == expected


def test_formats_go_from_few_bits_to_many() -> None:
    space = build_space(NETWORK, ["float", "int8", "int2", "uint8", "int16"], ["uint8", "float", "uint4", "int8"])
    weights, inputs = space.decisions[0].formats, space.decisions[-1].formats
    assert list(map(str, weights)) == ["int2", "int8", "uint8", "int16", "float"]
    assert list(map(str, inputs)) == ["uint4", "int8", "uint8", "float"]
    assert len(build_space(NETWORK, ["int8", "int8"], ["uint8"]).decisions[0].formats) == 1


def test_readers_of_one_tensor_share_its_format() -> None:
    space = space_of()
    (shared,) = [decision for decision in space.decisions if len(decision.layers) > 1]
    assert (shared.side, shared.layers) == ("input", ("left", "right"))
    with pytest.raises(ConfigError, match="layer left: input format uint4, uint8 is outside the space"):
        space.encode(
            Policy.from_dict({"stem": "int2/uint4", "left": "int2/uint4", "right": "int2/uint8", "head": "int2/uint4"})
        )
    with pytest.raises(ConfigError, match="layer stem: weight format int3 is outside the space"):
        space.encode(Policy.uniform(NETWORK, Precision.parse("int3/uint4")))


class Residuals(nn.Module):
    """Layers that read several tensors: `shared` both `x` and its own output, `other` the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other, self.alone = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shared(x)
        return self.shared(y) + self.other(y) + self.alone(x + y)


def test_a_module_called_twice_joins_what_it_reads() -> None:
    network = trace(Residuals().eval(), torch.randn(2, 4))
    space = build_space(network, ["int8"], ["uint4", "uint8"])
    inputs = {decision.layers for decision in space.decisions if decision.side == "input"}
    assert inputs == {("shared", "other"), ("alone",)}


def test_pins() -> None:
    assert space_of(pins={"first": "int8"}).decisions[0].formats == (Precision.parse("int8").weight,)
    fixed = {d.layers[0] for d in space_of(pins={"*t": "int4"}).decisions if not d.is_free}
    assert fixed == {"left", "right"}
    fixed = {(d.name, d.side) for d in space_of(pins={"last": "float/uint8"}).decisions if not d.is_free}
    assert fixed == {("head", "weight"), ("mean", "input")}
    assert str(space_of(pins={"head": "int3"}).decisions[3].formats[0]) == "int3", "pins may name other formats"
    assert len(space_of(pins={"*": "int8", "first": "int8"}).free) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pins": {"heat": "int8"}}, "space.pins.heat: no layer matches 'heat'.*did you mean 'head'.*stem, left"),
        ({"pins": {"head": "int9"}}, "space.pins.head: 'int9' is no format; allowed"),
        ({"pins": {"first": "int8", "stem": "int4"}}, "space.pins.stem=int4 contradicts another pin.*stem to int8"),
        (
            {"pins": {"left": "int8/uint8", "right": "int8/uint4"}},
            "space.pins fixes left to uint8, right to uint4, but these layers share their input format",
        ),
        (
            {"pins": {"stem": "int8", "head": "int4"}, "ties": [["stem", "head"]]},
            "space.pins fixes stem to int8, head to int4, but these layers share their weight format",
        ),
        ({"pins": {"*": "int8/uint8", "head": "int8/uint4"}}, "head=int8/uint4 contradicts another pin.*input of head"),
        ({"ties": [["left", "rihgt"]]}, r"space.ties\[0\]: no layer matches 'rihgt'.*did you mean 'right'"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space_of(**options)


@pytest.mark.parametrize(
    ("weight", "input_", "message"),
    [
        ([], ["uint8"], "space.weight is empty"),
        (["int8"], [], "space.input is empty"),
        (["int8", "int9"], ["uint8"], "space.weight: 'int9' is no format"),
    ],
)
def test_wrong_formats(weight: list[str], input_: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_space(NETWORK, weight, input_)


class Lookup(nn.Module):
    """An embedding read by a layer directly: the tensor between them has the name of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(10, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.fc(self.embedding(ids))


@pytest.mark.parametrize("model", [Lookup(), Tagger()])
def test_weight_only_layers_keep_float_inputs(model: nn.Module) -> None:
    network = trace(model.eval(), torch.randint(10, (2, 5)))
    space = build_space(network, ["int4", "int8"], ["uint4", "uint8"])
    weight_only = [layer.name for layer in network if not layer.quantizes_input]
    assert weight_only
    assert space.size == 2 ** len(network) * 2 ** (len(network) - len(weight_only))
    rng = np.random.default_rng(0)
    for _ in range(20):
        policy = space.sample(rng)
        assert all(policy[name].input == FLOAT for name in weight_only)
        assert space.decode(space.encode(policy)) == policy
        assert len(list(space.neighbours(policy))) == len(space.free)
    with pytest.raises(ConfigError, match="embedding is weight-only, its input stays in float; pin it to int8"):
        build_space(network, ["int4"], ["uint8"], {"embedding": "int8/uint8"})


def test_tied_weights_share_their_format() -> None:
    model = Decoder().eval()
    network = trace(model, torch.randint(20, (2, 8)))
    ties = list(map(list, shared_parameters(model, network)))
    assert ties == [["embedding", "decoder"]]
    space = build_space(network, ["int4", "int8"], ["uint4", "uint8"], ties=ties)
    (unit,) = [unit for unit in space.units if len(unit.layers) > 1]
    assert unit.layers == ("embedding", "decoder")
    rng = np.random.default_rng(0)
    for _ in range(20):
        policy = space.sample(rng)
        assert policy["embedding"] == Precision(policy["decoder"].weight)
        assert space.decode(space.encode(policy)) == policy


def test_bench_and_brute_force_agree_on_its_size(bench: Bench) -> None:
    assert bench.space.size == len(set(bench.space)) == 3**4 * 2**3
    assert make_bench(ties=[["*"]]).space.size == 3 * 2
