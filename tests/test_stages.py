"""Which layers are repaired, in which order, and when a pass may end."""

from __future__ import annotations

import networks
import torch
from repairing import simulate, uniform
from tiny import Bench
from torch import Tensor, nn
from torch.nn import functional as F

from hwmodels import Precision
from search.recover.stages import dependent_on, last_of, quantized_layers, rounded_layers, stages
from search.trace import trace


def test_what_reads_the_same_shares_a_stage(bench: Bench) -> None:
    network = bench.network
    assert stages(network, network.names) == [["stem"], ["left", "right"], ["head"]]
    assert stages(network, ["head", "right"]) == [["right"], ["head"]]
    assert last_of(network, ["left", "right"]) == "right"
    assert last_of(network, ["head"]) == "head"


def test_every_stage_depends_on_those_before_only() -> None:
    model = networks.Attention()
    network = trace(model, torch.randn(2, 5, 16))
    assert stages(network, network.names) == [["qkv"], ["out"], ["up"], ["down"]]


class Late(nn.Module):
    """The branch that skips everything is run last, though it depends on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.skip = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x))) + self.skip(x)


def test_depth_counts_not_time() -> None:
    network = trace(Late(), torch.randn(2, 4))
    assert stages(network, network.names) == [["first", "skip"], ["second"]]
    assert last_of(network, ["first", "skip"]) == "skip"


class Unfollowed(nn.Module):
    """What the second layer reads has been through numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.from_numpy(self.first(x).detach().numpy().copy()))


def test_what_cannot_be_followed_depends_on_all_before() -> None:
    network = trace(Unfollowed(), torch.randn(2, 4))
    assert stages(network, network.names) == [["first"], ["second"]]


def test_what_depends_on_what(bench: Bench) -> None:
    found = dependent_on(bench.network, ["left"])
    assert {"left", "head"} <= found
    assert not {"stem", "right", "relu"} & found
    assert dependent_on(trace(Unfollowed(), torch.randn(2, 4)), ["first"]) == {"first", "second"}
    assert dependent_on(bench.network, []) == set()


def test_a_layer_called_again_keeps_the_pass_going() -> None:
    network = trace(networks.Recurrent(), torch.randn(2, 4))
    assert stages(network, network.names) == [["first"]]
    assert last_of(network, ["first"]) is None


class Norms(nn.Module):
    """A norm that cannot be folded, as what it reads has another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.second(F.relu(self.norm(x)))


def test_operations_have_their_stages_too() -> None:
    network = trace(Norms().eval(), torch.randn(2, 1, 3, 3))
    assert stages(network, ["first", "norm", "second"]) == [["first"], ["norm"], ["second"]]
    assert last_of(network, ["norm"]) == "second"


def test_layers_without_a_matrix_are_left_out() -> None:
    _, simulated = simulate(networks.Tagger(), torch.randint(10, (4, 3)))
    assert quantized_layers(simulated, uniform(simulated, "int4")) == ["head"]


def test_a_weight_in_two_places_is_not_rounded_for_one_of_them() -> None:
    _, simulated = simulate(networks.Decoder(), torch.randint(20, (4, 8)))
    policy = uniform(simulated, "int4")
    assert "decoder" in quantized_layers(simulated, policy)
    assert rounded_layers(simulated, policy) == ["block.qkv", "block.out", "block.up", "block.down"]


def test_only_formats_that_leave_a_choice_are_rounded(bench: Bench) -> None:
    given = {"stem": "float/uint8", "left": "bf16", "right": "int16", "head": "binary-stochastic"}
    policy = {name: Precision.parse(precision) for name, precision in given.items()}
    assert rounded_layers(bench.simulated, policy) == []
    assert quantized_layers(bench.simulated, policy) == ["left", "right", "head"]
    assert rounded_layers(bench.simulated, {"left": Precision.parse("mxfp4/mxfp8")}) == ["left"]
