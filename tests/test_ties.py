"""Layers that read one tensor, found from the network alone."""

from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hwmodels import Layer, Network
from search.ties import shared_input_ties
from search.trace import trace


class Block(nn.Module):
    """Attention with two query heads a key, and a gated feed-forward block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.o = nn.Linear(width, width)
        self.gate, self.up, self.down = nn.Linear(width, 12), nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:])
        heads = [
            part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in (self.q(normed), self.k(normed), self.v(normed))
        ]
        mixed = F.scaled_dot_product_attention(*heads, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        normed = F.layer_norm(x, x.shape[-1:])
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def ties_of(model: nn.Module, example: object) -> list[list[str]]:
    return shared_input_ties(trace(model, example))


def test_projections_of_a_transformer() -> None:
    model = nn.Sequential(nn.Embedding(7, 8), Block(8), Block(8), nn.Linear(8, 7))
    expected = [["1.q", "1.k", "1.v"], ["1.gate", "1.up"], ["2.q", "2.k", "2.v"], ["2.gate", "2.up"]]
    assert ties_of(model, torch.randint(7, (2, 5))) == expected


def test_a_chain_has_none() -> None:
    assert ties_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4)) == []


class Branches(nn.Module):
    """Everything that reads the input without being fusable with the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide, self.late = nn.Linear(4, 4), nn.Linear(12, 4), nn.Linear(4, 4)
        self.first, self.second = nn.Conv1d(3, 4, 1), nn.Conv1d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.wide(x.flatten(1)) + self.late(torch.relu(x)).sum(1)
        return self.narrow(x).sum(1) + flat + self.first(x).sum(1) + self.second(x).sum(1)


def test_other_shapes_other_tensors_and_other_kinds_are_left_out() -> None:
    network = trace(Branches(), torch.randn(2, 3, 4))
    readers = {layer.name for layer in network if layer.reads == ("input",)}
    assert readers == {"narrow", "wide", "first", "second"}, "the layers do read one tensor"
    assert shared_input_ties(network) == []


class Twice(nn.Module):
    """Two layers called on two tensors each, in different order, and one called on the first tensor only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.a(y) + self.b(y) + self.b(x) + self.c(x)


def test_layers_called_several_times_must_read_all_the_same() -> None:
    assert ties_of(Twice(), (torch.randn(2, 4), torch.randn(2, 4))) == [["a", "b"]]


def test_constants_are_not_shared_inputs() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(torch.ones(1, 4)) + self.b(torch.ones(1, 4))

    assert ties_of(Constant(), torch.randn(2, 4)) == []


LAYERS = st.lists(
    st.tuples(st.sampled_from(["linear", "embedding", "conv1d"]), st.sets(st.sampled_from("xyz"), max_size=2)),
    max_size=8,
)


@given(LAYERS)
def test_any_two_layers_are_tied_exactly_if_they_read_the_same(drawn: list[tuple[str, set[str]]]) -> None:
    layers = tuple(Layer(f"layer{i}", kind, tuple(sorted(reads))) for i, (kind, reads) in enumerate(drawn))
    ties = shared_input_ties(Network(layers))
    tied = {pair for tie in ties for pair in combinations(tie, 2)}
    expected = {
        (one.name, other.name)
        for one, other in combinations(layers, 2)
        if one.kind == other.kind == "linear" and one.reads and set(one.reads) == set(other.reads)
    }
    assert tied == expected
    assert all(len(tie) > 1 for tie in ties)
    assert len({name for tie in ties for name in tie}) == sum(map(len, ties)), "no layer in two ties"
