"""Devices whose graphs are integers throughout: tensors as wide as their owner has them, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from conformance import CostModelContract
from test_roofline import CACHE, FLOAT, INT8, T0, TOY

from hwmodels import CostModel, Layer, Network, Operation, Precision, Roofline, Tensor, Workload
from hwmodels.capability import Capability
from hwmodels.flow import Handover, Owner, float_flow, integer_flow

WIDE = Precision.parse("int8/int16")
SIXTEEN = Capability(
    ("linear",), ("int8",), ("int16",), "native", "16 bits", "int8", held_weight_bits=8, requantizes=True
)
FLOATS = replace(TOY, capabilities=(SIXTEEN, *TOY.capabilities))
INTEGERS = replace(FLOATS, operations="integer")
WIDTHS = {"a": (8, 32), "b": (32, 32), "c": (32, 8)}


def residual(weight_only: str = "") -> Network:
    """input - a - tanh - b - add (what tanh left, too) - c - softmax, on 16 rows."""
    reads = {"a": "input", "b": "tanh", "c": "add"}
    layers = tuple(
        Layer(
            name,
            "linear",
            (reads[name],),
            (name,),
            (outputs, inputs),
            macs=16 * inputs * outputs,
            input_shape=(1, 16, inputs),
            output_shape=(1, 16, outputs),
            quantizes_input=name != weight_only,
        )
        for name, (inputs, outputs) in WIDTHS.items()
    )
    operations = (
        Operation("tanh", "tanh", ("a",), ("tanh",)),
        Operation("add", "add", ("b", "tanh"), ("add",)),
        Operation("softmax", "softmax", ("c",), ("softmax",)),
    )
    consumers = {"input": ("a",), "a": ("tanh",), "tanh": ("b", "add"), "b": ("add",), "add": ("c",), "c": ("softmax",)}
    features = {"input": 8, "a": 32, "tanh": 32, "b": 32, "add": 32, "c": 8, "softmax": 8}
    tensors = {
        name: Tensor(name, (1, 16, count), None if name == "input" else name, consumers.get(name, ()))
        for name, count in features.items()
    }
    return Network(layers, operations, tensors, 0, ("a", "tanh", "b", "add", "c", "softmax"), ("softmax",))


def seconds(device: object, a: Precision, b: Precision, c: Precision) -> float:
    policy = {"a": a, "b": b, "c": c}
    return Roofline(device).network_cost(residual(), policy, Workload()).total.latency_s  # type: ignore[arg-type]


def alone(inputs: int, outputs: int, read: float, left: float) -> float:
    """Seconds of an integer layer of 16 rows that reads and leaves so many bytes of a value."""
    compute = 2 * 16 * (16 * math.ceil(outputs / 16)) * inputs / 200e9
    return T0 + math.hypot(compute, (inputs * outputs + 16 * (read * inputs + left * outputs)) / CACHE)


def test_every_tensor_has_the_owner_whose_precision_says_its_width() -> None:
    flow = integer_flow(residual(), WIDTHS)
    assert flow.owners == {
        "input": Owner("a", True),
        "a": Owner("a", False),
        "tanh": Owner("b", True),
        "b": Owner("b", False),
        "add": Owner("c", True),
        "c": Owner("c", False),
        "softmax": Owner("c", False),
    }
    assert flow.handovers == (
        Handover("input", "a", None),
        Handover("tanh", "b", "a", through_operations=True),
        Handover("add", "c", "b", through_operations=True),
    )
    assert flow.handing_on == set(WIDTHS)
    assert flow.values_left == {"a": 512, "b": 512, "c": 128}
    floats = float_flow(residual(), WIDTHS)
    assert [one.producer for one in floats.handovers] == [None, None, None]
    assert not floats.owners
    assert not floats.handing_on


def test_what_a_layer_without_input_format_reads_stays_in_floats() -> None:
    flow = integer_flow(residual(weight_only="b"), WIDTHS)
    assert "tanh" not in flow.owners
    assert flow.owners["b"] == Owner("b", False)
    assert [one.consumer for one in flow.handovers] == ["a", "c"]
    assert "add" not in integer_flow(residual(), ("a", "b")).owners, "nothing is known of the format that c takes"


def test_the_last_layer_that_ran_says_what_a_sum_is_made_of() -> None:
    network = residual()
    swapped = replace(network.operations[1], reads=("tanh", "b"))
    network = replace(network, operations=(network.operations[0], swapped, network.operations[2]))
    assert integer_flow(network, WIDTHS).handovers[2].producer == "b"


def test_integers_throughout_by_hand() -> None:
    table = Roofline(INTEGERS).cost_table(residual(), dict.fromkeys(WIDTHS, (INT8, WIDE, FLOAT)), Workload())
    assert table.fixed.latency_s == pytest.approx(1e-5 + 3 * T0), "operations start; their bytes have owners"

    def row(name: str, precision: Precision) -> float:
        return table.layers[name][precision].cost.latency_s

    arrives = T0 + 5 * 128 / CACHE  # the network's input, in floats
    assert row("a", INT8) == pytest.approx(alone(8, 32, 1, 1) + arrives + 512 / CACHE), "tanh reads what a leaves"
    assert row("b", INT8) == pytest.approx(alone(32, 32, 1, 1) + 3 * 512 / CACHE), "tanh, and add its two operands"
    assert row("c", INT8) == pytest.approx(alone(32, 8, 1, 1) + (512 + 2 * 128) / CACHE)
    wider = 512 / CACHE  # an epilogue is priced as writing a byte of each value
    assert row("b", WIDE) == pytest.approx(alone(32, 32, 2, 1) + wider + 2 * 3 * 512 / CACHE)
    compute, memory = 2 * 16 * 32 * 32 / 50e9, 4 * (32 * 32 + 2 * 512) / CACHE
    assert row("b", FLOAT) == pytest.approx(T0 + math.hypot(compute, memory) + 4 * 3 * 512 / CACHE)


def test_nothing_is_converted_between_integers_whatever_lies_between() -> None:
    network = residual()
    table = Roofline(INTEGERS).cost_table(network, dict.fromkeys(WIDTHS, (INT8, WIDE, FLOAT)), Workload())
    assert [(one.producer, one.consumer) for one in table.boundaries] == [("a", "b"), ("b", "c")]
    for boundary in table.boundaries:
        for left in (INT8, WIDE):
            assert {boundary.cost(left, read).latency_s for read in (INT8, WIDE, FLOAT)} == {0.0}
        assert boundary.cost(FLOAT, FLOAT).latency_s == 0
        assert boundary.cost(FLOAT, INT8).latency_s == pytest.approx(T0 + 5 * 512 / CACHE)
        assert boundary.cost(FLOAT, WIDE).latency_s == pytest.approx(T0 + 6 * 512 / CACHE)


def test_integers_save_the_quantizing_passes_and_three_of_four_bytes() -> None:
    saved = seconds(FLOATS, INT8, INT8, INT8) - seconds(INTEGERS, INT8, INT8, INT8)
    passes = 2 * (T0 + 5 * 512 / CACHE)
    bytes_between = 3 * (5 * 512 + 2 * 128) / CACHE
    leaving = [alone(*WIDTHS[name], 1, 4) - alone(*WIDTHS[name], 1, 1) for name in WIDTHS]
    assert saved == pytest.approx(passes + bytes_between + sum(leaving))


def test_floats_cost_the_same_whatever_integers_would() -> None:
    policy = dict.fromkeys(WIDTHS, FLOAT)
    one, other = (Roofline(device).network_cost(residual(), policy, Workload(batch=3)) for device in (FLOATS, INTEGERS))
    for cost in ("latency_s", "energy_j"):
        assert getattr(one.total, cost) == pytest.approx(getattr(other.total, cost), rel=1e-12)


def test_energy_counts_the_bytes_between() -> None:
    table, plain = (
        Roofline(device).cost_table(residual(), dict.fromkeys(WIDTHS, (INT8,)), Workload())
        for device in (INTEGERS, FLOATS)
    )
    more_bytes, more_seconds = 3 * 512 - 3 * 512 - 5 * 512, 0.0  # between, less what b leaves and what is quantized
    rows = [one.layers["b"][INT8].cost for one in (table, plain)]
    more_seconds = rows[0].latency_s - rows[1].latency_s
    assert rows[0].energy_j - rows[1].energy_j == pytest.approx(more_bytes * 1e-12 + 2 * more_seconds)


@pytest.mark.parametrize("device", [FLOATS, INTEGERS], ids=["floats", "integers"])
@pytest.mark.parametrize("names", [("float", "int8/uint8", "int8/int16"), ("int8/uint8", "int8/uint8-token", "float")])
def test_parts_add_up(device: object, names: tuple[str, ...]) -> None:
    """Also where a kernel exists only where it requantizes, so that another one runs."""
    picky = tuple(replace(one, needs_integer_output=one.requantizes) for one in device.capabilities)  # type: ignore
    policy = dict(zip(WIDTHS, map(Precision.parse, names), strict=True))
    for one in (device, replace(device, capabilities=picky)):  # type: ignore[type-var]
        model = Roofline(one)
        total = model.network_cost(residual(), policy, Workload()).total.latency_s
        fixed = model.cost_table(residual(), {name: (p,) for name, p in policy.items()}, Workload()).fixed.latency_s
        parts = model.parts(residual(), policy, Workload()).values()
        found = sum(part.compute_s + part.memory_s + part.overhead_s + part.conversion_s for part in parts)
        assert found + fixed == pytest.approx(total, rel=1e-12)
        assert [part.operations for part in parts] == [2.0 * layer.macs for layer in residual()]


def test_kernels_that_must_requantize_run_in_integer_graphs() -> None:
    picky = tuple(replace(one, needs_integer_output=one.requantizes) for one in INTEGERS.capabilities)
    choices = dict.fromkeys(WIDTHS, (INT8,))
    table, plain = (
        Roofline(replace(INTEGERS, capabilities=some)).cost_table(residual(), choices, Workload())
        for some in (picky, INTEGERS.capabilities)
    )
    assert [table.layers[name][INT8] for name in WIDTHS] == [plain.layers[name][INT8] for name in WIDTHS]


class TestIntegerGraph(CostModelContract):
    """The contract, on a device whose graphs are integers throughout."""

    precisions = ("int4/uint8", "float", "int8/int16", "int4/uint4")

    @pytest.fixture
    def cost_model(self) -> CostModel:
        return Roofline(INTEGERS)

    def test_prices_are_those_of_the_policy_alone(self, cost_model: CostModel) -> None:
        rng, network = np.random.default_rng(0), residual()
        many = cost_model.cost_table(network, dict.fromkeys(WIDTHS, (INT8, WIDE, FLOAT)), Workload())
        for _ in range(10):
            policy = {name: (INT8, WIDE, FLOAT)[rng.integers(3)] for name in WIDTHS}
            rows = [many.layers[name][precision].cost.latency_s for name, precision in policy.items()]
            met = [one.cost(policy[one.producer], policy[one.consumer]).latency_s for one in many.boundaries]
            total = cost_model.network_cost(network, policy, Workload()).total.latency_s
            assert total == pytest.approx(sum(rows) + sum(met) + many.fixed.latency_s, rel=1e-12)
