"""Networks that read tokens: shapes at other lengths, and what keys and values take."""

from __future__ import annotations

import pytest
import torch
from networks import Attention, Decoder
from test_roofline import TOY
from torch import Tensor, nn
from torch.nn import functional as F

from hwmodels import Network, Precision, Roofline, StorageModel, Workload, at_workload
from hwmodels.sequence import cache_bytes, kept_values, token_count
from search.errors import ConfigError
from search.policy import Policy
from search.pricing import Pricing
from search.space import build_space
from search.trace import trace


class Grouped(nn.Module):
    """One attention layer with four heads for queries and two for keys and values, after an embedding."""

    def __init__(self, vocabulary: int = 20, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.q, self.k, self.v = nn.Linear(width, 16), nn.Linear(width, 8), nn.Linear(width, 8)
        self.head = nn.Linear(16, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        n, length, _ = x.shape
        q, k, v = (f(x).view(n, length, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.head(mixed.transpose(1, 2).reshape(n, length, -1))


def traced(length: int, model: type[nn.Module] = Grouped) -> Network:
    torch.manual_seed(0)
    return trace(model().eval(), torch.randint(20, (2, length)))


@pytest.mark.parametrize("model", [Grouped, Decoder])
@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_shapes_are_those_of_a_trace_at_that_length(model: type[nn.Module], tokens: int) -> None:
    """A length that no width of the network equals is moved to others as if it had been traced there."""
    network = at_workload(traced(5, model), Workload(tokens=tokens))
    expected = traced(tokens, model)
    assert token_count(network) == tokens
    for layer, other in zip(network, expected, strict=True):
        if layer.name == "position":  # reads a constant: its first axis is not samples
            continue
        assert (layer.input_shape, layer.output_shape, layer.macs) == (
            other.input_shape,
            other.output_shape,
            other.macs,
        )
    for name, tensor in expected.tensors.items():
        assert network.tensors[name].shape == tensor.shape or name.startswith("position"), name


def test_costs_are_those_of_a_trace_at_that_length() -> None:
    network, expected = at_workload(traced(5), Workload(tokens=7)), traced(7)
    policy = Policy.uniform(expected, Precision.parse("int8/uint8"))
    for model in (StorageModel(), Roofline(TOY)):
        found = model.network_cost(network, policy, Workload(tokens=7)).total
        assert str(found) == str(model.network_cost(expected, policy, Workload()).total)


def test_keys_and_values_by_hand() -> None:
    network = traced(5)
    attention = next(one for one in network.operations if one.kind == "scaled_dot_product_attention")
    assert kept_values(network, attention) == 8 + 8
    assert cache_bytes(network, Workload()) == 5 * 16 * 2
    assert cache_bytes(network, Workload(batch=3, context=100)) == 3 * 100 * 16 * 2
    assert cache_bytes(network, Workload(context=100, cache_format="int8-token")) == 100 * (16 + 2 * 4)
    assert cache_bytes(network, Workload(context=100, cache_format="int4-g4")) == 100 * (8 + 4 * 4)
    assert cache_bytes(traced(5, Decoder), Workload()) == 0, "attention written by hand keeps nothing that is known"


def test_a_longer_context_is_read_with_every_token() -> None:
    step = Workload(tokens=1, context=1)
    network = at_workload(traced(5), step)
    policy = Policy.uniform(network, Precision.parse("float"))
    short, long = (Roofline(TOY).network_cost(network, policy, Workload(tokens=1, context=c)) for c in (1, 1001))
    assert long.total.latency_s - short.total.latency_s == pytest.approx(1000 * 16 * 2 / (2e11 * 0.8), rel=1e-6)
    assert long.cache_bytes == 1001 * 32
    assert long.memory_bytes == long.total.weight_bytes + long.total.activation_bytes + 1001 * 32


def test_only_networks_that_read_tokens_have_a_length() -> None:
    network = trace(Attention().eval(), torch.randn(2, 8, 16))
    assert token_count(network) is None
    assert at_workload(network, Workload(batch=4)) is network
    with pytest.raises(ValueError, match="for networks that read token ids"):
        at_workload(network, Workload(tokens=3))
    with pytest.raises(ConfigError, match=r"workload\.tokens and workload\.context are for"):
        Pricing.of(network, build_space(network, ["int8"], ["uint8"]), StorageModel(), Workload(context=3))


def test_workloads_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"workload\.tokens must be at least 1, got 0"):
        Workload(tokens=0)
    with pytest.raises(ValueError, match=r"workload.cache_format: .*fp17"):
        Workload(cache_format="fp17")


def test_an_axis_that_is_as_long_as_the_sequence_is_refused() -> None:
    """Heads that number as many as the tokens: either might be meant."""

    class Square(Grouped):
        def forward(self, ids: Tensor) -> Tensor:
            q = self.q(self.embedding(ids)).view(*ids.shape, 4, 4).transpose(1, 2)
            return (q * 2).sum(dim=(1, 3))

    torch.manual_seed(0)
    network = trace(Square().eval(), torch.randint(20, (2, 4)))
    with pytest.raises(ValueError, match=r"traced on 4 tokens, and another axis .* give an example input of another"):
        at_workload(network, Workload(tokens=1))
