"""Policies as values: equality, digests, averages."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import Tagger
from tiny import Bench

from hwmodels import FLOAT, Format, Precision
from search.policy import Policy
from search.trace import trace

precisions = st.sampled_from(["int2", "int4/uint8", "int8/uint4", "float/uint8", "float"]).map(Precision.parse)
policies = st.dictionaries(st.text(min_size=1, max_size=4), precisions, max_size=6).map(Policy)


@given(policy=policies)
def test_dictionaries_and_back(policy: Policy) -> None:
    again = Policy.from_dict(policy.to_dict())
    assert again == policy
    assert again.digest == policy.digest
    assert len(policy.digest) == 12


@given(policy=policies, seed=st.integers())
def test_order_does_not_matter(policy: Policy, seed: int) -> None:
    items = list(policy.items())
    random.Random(seed).shuffle(items)
    shuffled = Policy(dict(items))
    assert shuffled == policy
    assert shuffled.digest == policy.digest
    assert hash(shuffled) == hash(policy)


@given(one=policies, other=policies)
def test_digest_tells_policies_apart(one: Policy, other: Policy) -> None:
    assert (one == other) == (one.digest == other.digest)
    assert one != one.to_dict()


def test_a_policy_does_not_follow_its_source() -> None:
    source = {"a": Precision()}
    policy = Policy(source)
    source["b"] = Precision()
    assert list(policy) == ["a"]


def test_uniform_leaves_the_inputs_of_weight_only_layers_in_float() -> None:
    import torch

    network = trace(Tagger().eval(), torch.randint(10, (2, 5)))
    policy = Policy.uniform(network, Precision.parse("int4/uint8"))
    assert set(policy) == set(network.names)
    for layer in network:
        assert policy[layer.name].weight == Format.parse("int4")
        assert policy[layer.name].input == (Format.parse("uint8") if layer.quantizes_input else FLOAT)
    assert not network["embedding"].quantizes_input
    assert network["head"].quantizes_input


def test_bits_by_hand(bench: Bench) -> None:
    counts = {"stem": 36, "left": 216, "right": 216, "head": 30}  # weights; channels are 4, 6, 6 and 5
    policy = Policy.from_dict({"stem": "int8", "left": "int2/uint8", "right": "int4/uint8", "head": "float"})
    total = sum(counts.values())
    nominal = (8 * 36 + 2 * 216 + 4 * 216 + 32 * 30) / total
    assert policy.average_weight_bits(bench.network) == pytest.approx(nominal, rel=1e-12)
    assert policy.effective_bits(bench.network) == pytest.approx(nominal + 32 * (4 + 6 + 6) / total, rel=1e-12)
