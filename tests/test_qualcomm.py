"""Networks of Qualcomm's AI Hub as published, device files that hold what was fitted, errors that do not grow."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from hwmodels import Precision, Roofline, Workload, load_device

ROOT = Path(__file__).parents[1]
PACKAGE = "experiments.cost_models.qualcomm"
MODULES = ("chips", "features", "fit", "networks", "study", "timings")
TRACED = ("mobilenet_v2", "resnet18")
DEVICES = {"8 Gen 3": "hexagon_8gen3", "8 Elite": "hexagon_8elite", "QCS6490": "hexagon_qcs6490"}


@pytest.fixture(scope="module")
def study() -> Iterator[SimpleNamespace]:
    """The study's modules."""
    sys.path.insert(0, str(ROOT))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"{PACKAGE}.{name}") for name in MODULES})
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def counted(study: SimpleNamespace) -> pd.DataFrame:
    return pd.read_csv(study.chips.HERE / "features.csv")


@pytest.fixture(scope="module")
def timings(study: SimpleNamespace) -> pd.DataFrame:
    if not study.timings.TABLE.exists():
        pytest.skip(f"BITPLAN_REFERENCE_DATA has no {study.timings.TABLE.name}")
    return study.timings.read_timings()


def test_networks_have_the_published_number_of_parameters(study: SimpleNamespace) -> None:
    for name, definition in study.networks.NETWORKS.items():
        assert study.networks.count_parameters(name) == definition.parameters, name


def test_networks_have_the_published_multiply_accumulates(study: SimpleNamespace, counted: pd.DataFrame) -> None:
    macs = counted.drop_duplicates("model").set_index("model").macs
    for name, definition in study.networks.NETWORKS.items():
        if definition.gmacs and not definition.published_at:
            expected = definition.gmacs - definition.attention_gmacs
            assert macs[name] / 1e9 == pytest.approx(expected, abs=0.0006), name


def test_an_efficientnet_has_them_at_the_size_it_is_published_at(study: SimpleNamespace) -> None:
    network = study.networks.load("efficientnet_b4", 380)
    assert sum(layer.macs for layer in network) / 1e9 == pytest.approx(4.394, abs=0.0006)


@pytest.mark.parametrize("name", TRACED)
def test_the_counts_that_are_kept_are_those_of_a_trace(
    study: SimpleNamespace, counted: pd.DataFrame, name: str
) -> None:
    network = study.networks.load(name)
    kept = counted[counted.model == name].set_index("precision")
    for precision in study.timings.PRECISIONS:
        found = study.features.size(network) | study.features.count(network, precision)
        assert found == kept.loc[precision].drop("model").to_dict()


@pytest.mark.parametrize("name", TRACED)
def test_what_a_layer_reads_is_counted_by_hand(study: SimpleNamespace, counted: pd.DataFrame, name: str) -> None:
    """In float nothing is converted, so the counts are plain sums."""
    network = study.networks.load(name)
    found = counted[(counted.model == name) & (counted.precision == "float")].iloc[0]
    values = sum(math.prod(shape) for layer in network for shape in (layer.input_shape, layer.output_shape))
    assert found.calls == len(network)
    assert found.operations == 2 * found.macs
    assert found.layer_bytes == 2 * (values + network.weight_count)
    between = [operation for operation in network.operations if not network.is_fused(operation)]
    moved = sum(network.tensors[name].values for one in between for name in (*one.reads, *one.writes))
    assert (found.passes, found.passed_bytes) == (len(between), 2 * moved)


@pytest.mark.parametrize("name", TRACED)
def test_integers_travel_as_integers_between_the_layers(counted: pd.DataFrame, name: str) -> None:
    """Half of fp16's bytes at 8 bits, and no pass but the one over the network's input."""
    rows = counted[counted.model == name].set_index("precision")
    image = 3 * 224 * 224
    assert rows.loc["w8a8"].passes == rows.loc["w8a16"].passes == rows.loc["float"].passes + 1
    assert rows.loc["w8a8"].passed_bytes == rows.loc["float"].passed_bytes / 2 + 3 * image
    weights = rows.loc["float"].parameters
    assert rows.loc["w8a8"].layer_bytes == rows.loc["float"].layer_bytes / 2
    both = rows.loc["w8a16"].passed_bytes + rows.loc["w8a16"].layer_bytes
    assert both == rows.loc["float"].passed_bytes + rows.loc["float"].layer_bytes - weights + 4 * image


@pytest.mark.parametrize("chip", DEVICES)
def test_device_files_price_networks_as_the_fit_does(study: SimpleNamespace, counted: pd.DataFrame, chip: str) -> None:
    """The device file holds three digits of each rate."""
    device = load_device(DEVICES[chip])
    fitted = pd.read_csv(study.chips.HERE / "parameters.csv").query("chip == @chip")
    paths = {row.precision: study.fit.PathRates(row.overhead_s, row.operations) for row in fitted.itertuples()}
    shared = fitted.iloc[0][["launch_s", "between_overhead_s", "between_bandwidth", "layer_bandwidth"]]
    rates = study.fit.Rates(*shared, paths)
    network = study.networks.load("mobilenet_v2")
    rows = counted[(counted.model == "mobilenet_v2") & counted.precision.isin(set(paths))]
    for row, expected in zip(rows.itertuples(), rates.seconds(rows), strict=True):
        policy = dict.fromkeys(network.names, Precision.parse(study.timings.PRECISIONS[row.precision]))
        priced = Roofline(device).network_cost(network, policy, Workload()).total.latency_s
        assert priced == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", DEVICES.values())
def test_device_files_say_what_they_rest_on(name: str) -> None:
    device = load_device(name)
    assert device.tier == "calibrated"
    assert not device.warnings
    assumed = {place.split(".")[-1] for place in device.shaky if not place.startswith("energy")}
    assert assumed <= {"sharpness", "capacity"}
    for path in device.calibration.values():
        assert path.samples >= 7
        assert path.holdout_error is not None
        assert 0 < path.holdout_error.number < 0.25
        assert path.sigma.number >= 0.15
    assert {anchor.network for anchor in device.anchors} >= {"mobilenet_v3_large", "resnet50", "resnet101"}


def test_networks_larger_than_any_fitted_are_priced_by_the_main_memory(study: SimpleNamespace) -> None:
    largest = study.networks.load("unet_segmentation")
    values = max(
        sum(largest.tensors[tensor].values for tensor in (*operation.reads, *operation.writes))
        for operation in largest.operations
    )
    size = 2 * (largest.weight_count + largest.other_parameters + values)
    assert 0.99 * study.chips.FITTED_BYTES < size <= study.chips.FITTED_BYTES
    for name, bandwidth in (("hexagon_8gen3", 76.8e9), ("hexagon_8elite", 84.8e9)):
        device = load_device(name)
        assert [device.level(bytes_, 1).name for bytes_ in (size, 1e9)] == ["effective", "lpddr"]
        assert device.memory[-1].bandwidth.number == bandwidth  # type: ignore[union-attr]
    assert [level.name for level in load_device("hexagon_qcs6490").memory] == ["effective"], "LPDDR's was not found"


def test_what_the_npu_has_no_kernel_for_is_refused_or_falls_back() -> None:
    phone, board = load_device("hexagon_8gen3"), load_device("hexagon_qcs6490")

    def support(device: object, kind: str, precision: str) -> str:
        return device.capability(kind, Precision.parse(precision)).support  # type: ignore[attr-defined]

    assert support(phone, "conv2d", "int8/uint8") == support(phone, "conv2d", "int8/uint16") == "native"
    assert support(phone, "linear", "int4/uint16") == "native"
    assert support(phone, "conv2d", "int4/uint16") == support(phone, "conv2d", "int4/uint8") == "storage"
    assert support(phone, "conv2d", "int16/uint16") == "refused"
    assert support(phone, "linear", "int8") == "fallback"
    assert support(phone, "conv2d", "float") == "native"
    assert support(board, "conv2d", "float") == support(board, "linear", "int8") == "refused"


def test_narrower_inputs_are_faster_on_every_device(study: SimpleNamespace) -> None:
    """As the medians of what is measured are."""
    network = study.networks.load("resnet18")
    for name in DEVICES.values():
        device = load_device(name)
        model = Roofline(device)
        precisions = ["int8/uint8", "int8/uint16"] + (["float"] if "fp16" in device.compute else [])
        policies = [dict.fromkeys(network.names, Precision.parse(precision)) for precision in precisions]
        latencies = [model.network_cost(network, policy, Workload()).total.latency_s for policy in policies]
        assert latencies == sorted(latencies)


def test_fitting_finds_the_rates_that_made_the_latencies(study: SimpleNamespace, counted: pd.DataFrame) -> None:
    rows = counted[counted.model.isin(set(counted.model) - set(study.networks.ANCHORS))]
    rows = rows.assign(latency_s=study.fit.GUESS.seconds(rows))
    found = study.fit.fit(rows)
    np.testing.assert_allclose(found.seconds(rows), rows.latency_s, rtol=1e-3)


def test_the_regression_is_exact_where_size_is_all_there_is(study: SimpleNamespace, counted: pd.DataFrame) -> None:
    rows = counted.assign(latency_s=1e-4 + counted.macs / 1e13 + counted.parameters / 1e11)
    np.testing.assert_allclose(study.fit.regress(rows, rows), rows.latency_s, rtol=1e-6)


def test_medians_of_measured_ratios(study: SimpleNamespace, timings: pd.DataFrame) -> None:
    """Section 7.2 of the facts: w8a8 beats w8a16 beats fp16, by about 2.7 and 1.4 over everything published."""
    spread = study.timings.spread(timings).query("runtime == 'qnn_dlc'").set_index(["chip", "ratio"])
    for chip in ("8 Gen 3", "8 Elite", "X Elite"):
        fast, middle = spread.loc[(chip, "float/w8a8")], spread.loc[(chip, "float/w8a16")]
        assert fast["median"] > middle["median"] > 1
        assert spread.loc[(chip, "w8a16/w8a8")]["median"] > 1.5
    assert spread.loc[("QCS6490", "w8a16/w8a8")]["median"] > 1.5


@pytest.mark.parametrize(("chip", "errors"), [("8 Gen 3", (0.27, 0.19)), ("8 Elite", (0.29, 0.18))])
def test_errors_on_networks_left_out_do_not_grow(
    study: SimpleNamespace, counted: pd.DataFrame, timings: pd.DataFrame, chip: str, errors: tuple[float, float]
) -> None:
    rows = study.study.join(timings, counted, chip, "qnn_dlc")
    predicted = study.study.leave_one_out(rows)
    latency = study.study.latency_errors(predicted).query("predictor == 'roofline'").set_index("precision").mape
    assert latency["w8a8"] < errors[0]
    assert latency["w8a16"] < 0.2
    assert latency["float"] < errors[1] + 0.01
    ratio = study.study.ratio_errors(study.study.ratios(predicted)).set_index(["ratio", "predictor"])
    for pair in ("float/w8a8", "float/w8a16"):
        assert ratio.loc[(pair, "roofline")].mape < ratio.loc[(pair, "constant")].mape
        assert ratio.loc[(pair, "roofline")].sign == 1
    assert ratio.loc[("float/w8a8", "roofline")].mape < 0.17
    assert ratio.loc[("float/w8a8", "roofline")].order > 0.8
