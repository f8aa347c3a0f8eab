"""Prices: the solver's columns against whole-network costs, and those against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import Decoder, Tagger
from tiny import Bench, make_bench
from torch import nn

from hwmodels import CostModel, Precision, Roofline, StorageModel, Workload
from search.policy import Policy
from search.pricing import Pricing, placed
from search.space import SearchSpace, build_space
from search.trace import shared_parameters, trace


def priced(model: nn.Module, inputs: torch.Tensor, cost_model: CostModel, workload: Workload, **options) -> Pricing:
    network = trace(model.eval(), inputs)
    options.setdefault("ties", list(map(list, shared_parameters(model, network))))
    space = build_space(network, ["int2", "int4", "int8", "float"], ["uint4", "uint8", "float"], **options)
    return Pricing(network, space, cost_model, workload)


def choices_of(space: SearchSpace, policy: Policy) -> list[int]:
    """Index of each unit's choice."""
    point = space.encode(policy)
    return [
        unit.choices.index(
            Precision(
                space.decisions[unit.weight].formats[point[unit.weight]],
                space.decisions[unit.input].formats[point[unit.input]],
            )
        )
        for unit in space.units
    ]


@pytest.mark.parametrize("cost_model", [StorageModel(), Roofline("zen5")], ids=["storage", "zen5"])
@pytest.mark.parametrize("workload", [Workload(), Workload(batch=7)], ids=["one", "seven"])
@pytest.mark.parametrize("case", ["tiny", "tied", "embedding", "pinned"])
def test_columns_add_up_to_the_networks_cost(cost_model: CostModel, workload: Workload, case: str) -> None:
    ids = torch.randint(10, (2, 8))
    pricing = {
        "tiny": lambda: priced(make_bench().simulated.model, torch.randn(2, 1, 6, 6), cost_model, workload),
        "pinned": lambda: priced(
            make_bench().simulated.model,
            torch.randn(2, 1, 6, 6),
            cost_model,
            workload,
            pins={"first": "int8/uint8"},
            ties=[["left", "head"]],
        ),
        "tied": lambda: priced(Decoder(), ids, cost_model, workload),
        "embedding": lambda: priced(Tagger(), ids, cost_model, workload),
    }[case]()
    rng = np.random.default_rng(0)
    for _ in range(10):
        policy = pricing.space.sample(rng)
        costs = pricing.costs(policy)
        for name, column in pricing.columns.items():
            picked = [numbers[i] for numbers, i in zip(column, choices_of(pricing.space, policy), strict=True)]
            met = [one.cost(policy[one.producer], policy[one.consumer]) for one in pricing.table.boundaries]
            picked += [getattr(cost, name, 0.0) for cost in met]
            assert pricing.fixed[name] + sum(picked) == pytest.approx(costs[name], rel=1e-12, nan_ok=True), name
        assert set(costs) == {*pricing.columns, "activation_bytes"}


def test_bytes_by_hand(bench: Bench) -> None:
    costs = bench.pricing.costs(Policy.uniform(bench.network, Precision.parse("int4/uint8")))
    weights = {"stem": (36, 4), "left": (216, 6), "right": (216, 6), "head": (30, 5)}  # values, channels
    biases = 4 + 6 + 6 + 5  # the folded batch norm gives the stem a bias
    bits = sum(4 * values + 32 * channels + (32 + 8) for values, channels in weights.values()) + 32 * biases
    other = bench.network.other_parameters
    assert costs["weight_bytes"] == bits / 8 + 4 * other
    assert costs["average_weight_bits"] == 4
    assert np.isnan(costs["latency_s"])
    macs = 36 * 36 + 2 * 216 * 16 + 30
    assert costs["bit_ops"] == macs * 4 * 8


def test_references(bench: Bench) -> None:
    float_, int8 = bench.pricing.reference("float"), bench.pricing.reference("int8")
    assert float_["average_weight_bits"] == 32
    assert int8["average_weight_bits"] == 8
    assert float_["bit_ops"] == 16 * int8["bit_ops"]


def test_frames(bench: Bench) -> None:
    frame = bench.pricing.to_frame()
    assert len(frame) == sum(map(len, bench.space.layer_choices.values())) == 4 * 3 * 2
    row = frame[(frame.layer == "head") & (frame.precision == "int4/uint8")].iloc[0]
    assert row.weight_bytes == (4 * 30 + 32 * 5 + 40 + 32 * 5) / 8


def test_graphs_quantized_between_layers_are_priced_in_integers() -> None:
    model = Roofline("zen4_vm")
    assert placed(model, "inputs") is model
    assert placed(model, "full").device.operations == "integer"
    assert placed(StorageModel(), "full").name == StorageModel().name
