"""The study of this CPU: its tables, the device file fitted to them, and what they say of whole networks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hwmodels import Lookup, Precision, Roofline, Site, Workload, load_device
from hwmodels.lookup import LookupTable
from hwmodels.measure.fit import count
from hwmodels.measure.passes import LAUNCH, digest, draw, draw_frame, fit_passes, read_passes, write_passes
from hwmodels.measure.shapes import conv_site, layer_of
from hwmodels.network import Network

STUDY = Path(__file__).parents[1] / "experiments" / "cost_models" / "this_cpu"
TABLE, FLOATS, PASSES = STUDY / "zen4_vm.csv", STUDY / "zen4_vm_floats.csv", STUDY / "passes.csv"
INT8, ONE = Precision.parse("int8/uint8"), Workload(threads=1)
CONV, LINEAR = conv_site(16, 16, 3, 14, 1), Site("linear", 16, 64, 64)


@pytest.mark.parametrize("table", [TABLE, FLOATS], ids=lambda path: path.stem)
def test_the_device_is_fitted_to_the_committed_tables(table: Path) -> None:
    device, timings = load_device("zen4_vm"), LookupTable.read(table)
    fitted = {name for name in count(timings, device) if device.calibration[name].data == timings.digest}
    convolved = {"fp32_conv_dequantized", "fp32_depthwise_dequantized"}
    assert fitted >= (convolved if table == FLOATS else {"fp32_conv", "int8_conv", "fp32_gemm", "int8", "nbits4_g32"})


def test_passes_and_launch_are_those_of_the_committed_table() -> None:
    device, passes = load_device("zen4_vm"), read_passes(PASSES)
    assert device.calibration["fp32"].data == digest(passes)
    assert device.calibration["fp32"].overhead.number == pytest.approx(fit_passes(passes, device).overhead, rel=1e-3)
    launch = next(one.p50_s for one in passes if one.operation == LAUNCH)
    assert device.launch.number == pytest.approx(launch, rel=0.01)


def test_passes_are_written_as_they_were_read(tmp_path: Path) -> None:
    passes = read_passes(PASSES)
    write_passes(tmp_path / "passes.csv", passes)
    assert (tmp_path / "passes.csv").read_text() == PASSES.read_text()


@pytest.mark.parametrize("operation", ["QuantizeLinear", "DequantizeLinear", "Add", "Mul", "Transpose"])
def test_a_pass_is_timed_in_copies_that_stay(operation: str) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("hwmodels.measure.ort").OrtRuntime()
    kinds = Counter(node.op_type for node in onnx.load_from_string(draw(operation, 64, 3).model).graph.node)
    assert kinds[operation] == kinds["Slice"] == 3
    for one in (draw, draw_frame):
        assert runtime.runner(one(operation, 64, 3), is_optimized=False)() > 0


@pytest.mark.parametrize(("site", "leaves_floats", "own"), [(CONV, False, "QLinearConv"), (CONV, True, "Conv")])
def test_convolutions_have_integer_kernels_only_where_they_requantize(
    site: Site, leaves_floats: bool, own: str
) -> None:
    ort = pytest.importorskip("hwmodels.measure.ort")
    pytest.importorskip("onnxruntime")
    from hwmodels.measure.graphs import build

    found = ort.OrtRuntime().optimized(build(site, INT8, 2, leaves_floats=leaves_floats))
    kinds = Counter(name.rpartition(".")[2] for name in found.elements())
    assert kinds[own] == 2
    assert ("QLinearConv" in kinds) != leaves_floats
    assert kinds["DequantizeLinear"] >= (4 if leaves_floats else 0)


@pytest.mark.parametrize("leaves_floats", [False, True])
def test_linear_layers_keep_their_integer_kernels(leaves_floats: bool) -> None:
    ort = pytest.importorskip("hwmodels.measure.ort")
    pytest.importorskip("onnxruntime")
    from hwmodels.measure.graphs import build

    found = ort.OrtRuntime().optimized(build(LINEAR, INT8, 2, leaves_floats=leaves_floats))
    assert found["com.microsoft.QGemm"] == 2


def test_a_convolution_that_leaves_floats_is_looked_up_in_the_table_of_those() -> None:
    site = next(one.site for one in LookupTable.read(FLOATS).timings if one.site.kernel == (3, 3))
    layer = layer_of(site)
    network, choices = Network((layer,)), {layer.name: (INT8,)}  # the last layer of a network leaves floats
    both, alone = Lookup(TABLE, "zen4_vm", FLOATS), Lookup(TABLE, "zen4_vm")
    found = both.cost_table(network, choices, ONE).layers[layer.name][INT8]
    timed = LookupTable.read(FLOATS).find(site, INT8, 1)
    assert timed is not None
    assert found.tier == "measured"
    assert timed.p50_s <= found.cost.latency_s < timed.p50_s + 20e-6  # and quantizing its input
    assert alone.cost_table(network, choices, ONE).layers[layer.name][INT8].path == "fp32_conv_dequantized"


def test_int8_everywhere_is_told_to_be_slower_than_float_where_it_is() -> None:
    measured = pd.read_csv(STUDY / "whole.csv")
    for network in ("digits", "resnet20", "mobilenetv2"):
        for model in ("roofline", "lookup"):
            mine = measured[(measured["network"] == network) & (measured["model"] == model)].set_index("policy")
            for column in ("measured_s", "predicted_s"):
                assert mine.loc["int8", column] > mine.loc["float", column]


def test_the_summary_holds_what_the_readme_says() -> None:
    found = pd.read_csv(STUDY / "summary.csv").set_index(["model", "network"])
    for model in ("roofline", "lookup"):
        for network in ("resnet20", "mobilenetv2"):
            assert found.loc[(model, network), "whole_median_error"] < 0.15
        pairs, right = found.loc[model, "pairs_apart"], found.loc[model, "sign_right"]
        assert (pairs * right).sum() / pairs.sum() >= 0.95
        assert found.loc[(model, "text"), "layer_median_error"] < 0.1


def test_the_shipped_device_still_predicts_what_is_committed() -> None:
    from experiments.cost_models.this_cpu.measure import WORKLOAD, subject

    whole, made = pd.read_csv(STUDY / "whole.csv"), subject("digits")
    rows = whole[(whole["network"] == "digits") & (whole["model"] == "roofline")].set_index("policy")
    for name, policy in made.policies.items():
        seconds = Roofline("zen4_vm").network_cost(made.network, policy, WORKLOAD).total.latency_s
        np.testing.assert_allclose(seconds, rows.loc[name, "predicted_s"], rtol=1e-3)
