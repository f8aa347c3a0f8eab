"""The calibrated GPUs: what runs how, and calibrations that their tables give again."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hwmodels import Layer, Network, Precision, Roofline, Tensor, Workload, load_device
from hwmodels.calibrate import Errors

ROOT = Path(__file__).parent.parent
REFERENCE = Path(os.environ.get("BITPLAN_REFERENCE_DATA", ROOT.parent / "shared" / "data")) / "gemm"
TABLES = {"a100_sxm_80gb": "a100_sxm", "h100_sxm": "h100_sxm", "b200_sxm": "b200_sxm", "l40s": "l40s"}
ASSUMED = {"bf16": "bf16_gemm", "int8_conv": "sq"}
"""Paths that nothing was timed of, and those of matrix products that they are assumed to be like."""
FORMATS = {"bfloat16": "float", "sq": "int8/int8", "int8_wo": "int8", "int4_wo": "int4"} | {
    "fp8": "fp8_e4m3/fp8_e4m3",
    "fp8_block": "fp8_e4m3-g128/fp8_e4m3-g128",
    "nvfp4": "nvfp4/nvfp4",
}


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    """The modules that read the tables."""
    sys.path.insert(0, str(ROOT))
    try:
        package = "experiments.cost_models.gemm"
        yield SimpleNamespace(**{name: importlib.import_module(f"{package}.{name}") for name in ("tables", "predict")})
    finally:
        sys.path.remove(str(ROOT))


def product(m: int, n: int, k: int) -> tuple[Network, Workload]:
    """A network of one linear layer, and the workload that gives it `m` rows."""
    layer = Layer(
        name="fc",
        kind="linear",
        reads=("input",),
        writes=("fc",),
        weight_shape=(n, k),
        macs=n * k,
        input_shape=(1, k),
        output_shape=(1, n),
    )
    tensors = {
        "input": Tensor("input", (1, k), None, ("fc",)),
        "fc": Tensor("fc", (1, n), "fc"),
    }
    return Network((layer,), (), tensors, order=("fc",), outputs=("fc",)), Workload(batch=m)


def seconds_of(device: str, precision: str, m: int, n: int, k: int) -> float:
    network, workload = product(m, n, k)
    report = Roofline(device).network_cost(network, {"fc": Precision.parse(precision)}, workload)
    return report.total.latency_s


@pytest.mark.parametrize("device", TABLES)
def test_matrix_products_are_calibrated_and_nothing_else(device: str) -> None:
    found = load_device(device)
    paths = {name: path for name, path in found.calibration.items() if name not in ASSUMED}
    for name, path in paths.items():
        assert path.tier == "calibrated"
        assert path.samples == 6000, name
        assert path.holdout_error is not None
        assert path.holdout_error.number < 0.12
        assert 0.05 < path.sigma.number < 0.25
    assert len({path.data for path in paths.values()}) == 1
    for one in found.capabilities:
        assert (found.calibration[one.path].tier == "calibrated") == (one.kinds == ("linear",))
    assert found.calibration[found.float_compute].tier == found.tier == "datasheet"
    assert found.warnings


@pytest.mark.parametrize("device", TABLES)
def test_the_rest_is_assumed_to_be_like_matrix_products(device: str) -> None:
    calibration = load_device(device).calibration
    for name, like in ASSUMED.items():
        if like not in calibration:
            continue
        assumed, fitted = calibration[name], calibration[like]
        assert (assumed.tier, assumed.sigma.number, assumed.data, assumed.samples) == ("datasheet", 0.7, "", 0)
        for key in ("overhead", "compute", "memory", "sharpness", "step"):
            quantity = getattr(assumed, key)
            assert quantity.confidence == "assumed"
            assert "not timed" in quantity.source
            assert quantity.number == pytest.approx(getattr(fitted, key).number, rel=0.01), key
        assert assumed.splits_sums == fitted.splits_sums


@pytest.mark.parametrize(
    ("device", "precision", "support", "path"),
    [
        ("a100_sxm_80gb", "int8/int8", "native", "sq"),
        ("a100_sxm_80gb", "int4/int8", "storage", "sq"),
        ("a100_sxm_80gb", "int4/int4", "storage", "sq"),
        ("a100_sxm_80gb", "int4-g128", "storage", "int4_wo"),
        ("a100_sxm_80gb", "int8", "storage", "int8_wo"),
        ("a100_sxm_80gb", "fp8_e4m3/fp8_e4m3", "fallback", "bf16_gemm"),
        ("h100_sxm", "int4/int4", "fallback", "bf16_gemm"),
        ("h100_sxm", "fp8_e4m3/fp8_e4m3", "native", "fp8"),
        ("h100_sxm", "nvfp4/nvfp4", "fallback", "bf16_gemm"),
        ("b200_sxm", "nvfp4/nvfp4", "native", "nvfp4"),
        ("b200_sxm", "int4/int4", "fallback", "bf16_gemm"),
        ("l40s", "int8/int8", "native", "sq"),
        ("l40s", "fp8_e4m3-g128/fp8_e4m3-g128", "native", "fp8_block"),
    ],
)
def test_what_runs_how(device: str, precision: str, support: str, path: str) -> None:
    run = load_device(device).capability("linear", Precision.parse(precision))
    assert (run.support, run.path) == (support, path)


def test_convolutions_run_on_assumed_paths() -> None:
    for device in TABLES:
        found = load_device(device)
        eight = found.capability("conv2d", Precision.parse("int8/int8"))
        assert (eight.support, eight.path) == (
            ("native", "int8_conv") if "int8_conv" in found.calibration else ("fallback", "bf16")
        )
        assert found.capability("conv2d", Precision.parse("float")).path == "bf16"


def test_devices_without_int4_tensor_cores_say_so() -> None:
    for device in ("h100_sxm", "b200_sxm"):
        found = load_device(device)
        assert "int4" not in found.compute
        assert "no int4 tensor cores" in found.capability("linear", Precision.parse("int4/int4")).note


def test_weight_only_pays_for_few_rows_alone() -> None:
    """A100: 4-bit weights are faster than bf16 for a vector, and no faster for many rows, as was measured."""
    vector = seconds_of("a100_sxm_80gb", "int4", 1, 8192, 8192) / seconds_of("a100_sxm_80gb", "float", 1, 8192, 8192)
    many = seconds_of("a100_sxm_80gb", "int4", 8192, 8192, 8192) / seconds_of(
        "a100_sxm_80gb", "float", 8192, 8192, 8192
    )
    assert vector < 0.6
    assert 0.95 < many < 1.1


def test_fp8_pays_for_large_products_alone() -> None:
    fp8 = "fp8_e4m3/fp8_e4m3"
    for device in ("h100_sxm", "b200_sxm"):
        assert seconds_of(device, fp8, 1, 256, 256) > seconds_of(device, "float", 1, 256, 256)
        assert seconds_of(device, fp8, 8192, 8192, 8192) < seconds_of(device, "float", 8192, 8192, 8192)


@pytest.mark.slow
@pytest.mark.parametrize("device", TABLES)
def test_their_tables_give_the_calibrations_again(study: Any, device: str) -> None:
    file = REFERENCE / f"{TABLES[device]}_trtllm.parquet"
    if not file.exists():
        pytest.skip(f"BITPLAN_REFERENCE_DATA has no {file.name}")
    found = load_device(device)
    digest = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    table = study.tables.read_table(file)
    cache = study.tables.Cache(128 * 2.0**20, 2.5) if device == "l40s" else None
    for name in table.formats:
        path = found.calibration[study.tables.PATHS[name].path]
        assert path.data == digest
        rows = np.random.default_rng(1).permutation(len(table.of(name)))[:500]
        _, timings, fitted = study.predict.fit_best(table, name, cache, rows)
        assert fitted.compute == pytest.approx(path.compute.number, abs=0.06), name
        assert fitted.memory == pytest.approx(path.memory.number, abs=0.12), name
        assert fitted.splits_sums == path.splits_sums, name
        assert Errors.of(fitted.predict(timings), timings.seconds).median < 0.12


@pytest.mark.parametrize("device", TABLES)
def test_the_roofline_prices_what_was_timed(study: Any, device: str) -> None:
    """From the table's shapes through device file and roofline to seconds: nothing is lost on the way.

    What the W8A8 path reads is quantized by the network's first layer, which the table leaves out.
    """
    file = REFERENCE / f"{TABLES[device]}_trtllm.parquet"
    if not file.exists():
        pytest.skip(f"BITPLAN_REFERENCE_DATA has no {file.name}")
    table = study.tables.read_table(file)
    for name in table.formats:
        rows = table.of(name)
        rows = rows[rows["n"] * rows["k"] > 2**26].sample(20, random_state=0)  # no cache holds these
        m, n, k = (rows[side].astype(int) for side in ("m", "n", "k"))
        predicted = np.array([seconds_of(device, FORMATS[name], *shape) for shape in zip(m, n, k, strict=True)])
        assert Errors.of(predicted, rows["seconds"].to_numpy()).median < 0.2, name
