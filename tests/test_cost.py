"""Costs, cost tables and the counted model, against arithmetic by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from hwmodels import Cost, CostTable, Layer, LayerCost, Network, Precision, StorageModel, Tensor, Workload
from hwmodels.cost import ADDITIVE_COSTS, COSTS

INT4 = Precision.parse("int4/uint8")
INT8 = Precision.parse("int8/uint8")
FLOAT = Precision.parse("float")


def two_linears() -> Network:
    """20 -> 10 -> 5 features, the second weight-only, with 7 other parameters."""
    first = Layer(
        "first", "linear", ("input",), ("first",), (10, 20), 0, 200, 10, input_shape=(2, 20), output_shape=(2, 10)
    )
    second = Layer(
        "second",
        "linear",
        ("first",),
        ("second",),
        (5, 10),
        macs=50,
        input_shape=(2, 10),
        output_shape=(2, 5),
        quantizes_input=False,
    )
    tensors = {
        "input": Tensor("input", (2, 20), None, ("first",)),
        "first": Tensor("first", (2, 10), "first", ("second",)),
        "second": Tensor("second", (2, 5), "second"),
    }
    return Network((first, second), (), tensors, 7, ("first", "second"), ("second",))


def test_costs_add_field_by_field() -> None:
    one, two = Cost(1, 2, 3, 4, 5), Cost(10, 20, 30, 40, 50)
    assert one + two == Cost(11, 22, 33, 44, 55)
    assert math.isnan((one + Cost(latency_s=math.nan)).latency_s)
    assert COSTS == ("latency_s", "energy_j", "weight_bytes", "activation_bytes", "bit_ops")
    assert set(COSTS) - set(ADDITIVE_COSTS) == {"activation_bytes"}


@pytest.mark.parametrize(("field", "value"), [("batch", 0), ("threads", -1)])
def test_workloads_below_one_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"workload.{field} must be at least 1, got {value}"):
        Workload(**{field: value})


def test_storage_by_hand() -> None:
    network = two_linears()
    table = StorageModel().cost_table(network, {"first": (INT4, FLOAT)}, Workload(batch=3))
    quantized = table.layers["first"][INT4].cost
    assert quantized.weight_bytes == (4 * 200 + 32 * 10 + 32 * 10 + 32 + 8) / 8  # codes, scales, biases, the input's
    assert quantized.activation_bytes == 3 * 20
    assert quantized.bit_ops == 3 * 200 * 4 * 8
    unquantized = table.layers["first"][FLOAT].cost
    assert unquantized.weight_bytes == 4 * 210
    assert unquantized.activation_bytes == 3 * 20 * 4
    assert math.isnan(quantized.latency_s)
    assert math.isnan(quantized.energy_j)
    assert table.fixed.weight_bytes == 28
    assert np.array_equal(table.column("bit_ops", "first", (FLOAT, INT4)), [600 * 1024.0, 600 * 32.0])
    assert set(table.tiers.values()) == {"exact"}


def test_network_cost_is_the_sum_with_the_peak_of_the_activations() -> None:
    network = two_linears()
    policy = {"first": INT8, "second": Precision.parse("int4")}
    report = StorageModel().network_cost(network, policy, Workload(batch=5))
    weights = (8 * 200 + 32 * 10 + 32 * 10 + 40) / 8 + (4 * 50 + 32 * 5) / 8 + 28
    assert report.total.weight_bytes == weights
    assert report.total.bit_ops == 5 * (200 * 8 * 8 + 50 * 4 * 32)
    assert report.total.activation_bytes == 5 * (20 + 10 * 4)  # the input in 8 bits beside the first output in float
    assert set(report.layers) == {"first", "second"}


def test_importing_needs_neither_torch_nor_the_search() -> None:
    code = "import hwmodels, sys; print([name for name in ('torch', 'search', 'pydantic') if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_public_names_exist() -> None:
    import hwmodels

    assert all(hasattr(hwmodels, name) for name in hwmodels.__all__)
    expected = "Format Precision FLOAT Layer Network Operation Tensor Cost CostReport CostTable LayerCost Workload"
    expected += " CostModel StorageModel Roofline Device load_device list_devices"
    expected += " BoundaryCost LayerCosts Capability Quantity Gemm Site at_workload"
    expected += " BitFusion BitSerial BitTable Lookup LookupTable Timing"
    assert set(hwmodels.__all__) == set(expected.split())


def test_plain_mappings_become_columns() -> None:
    """A cost model of one's own may write a dictionary for each layer."""
    rows = {
        INT4: LayerCost(Cost(1.0, 2.0, 3.0, 4.0, 5.0), "int8", "memory", "int8", "measured", "storage"),
        FLOAT: LayerCost(Cost(6.0)),
    }
    table = CostTable({"first": rows}, Cost(), {}, "made up")
    assert dict(table.layers["first"]) == rows
    assert table.column("latency_s", "first", (FLOAT, INT4)).tolist() == [6.0, 1.0]
    assert table == CostTable({"first": table.layers["first"]}, Cost(), {}, "made up")
    assert str(table) == str(CostTable({"first": rows}, Cost(), {}, "made up"))
