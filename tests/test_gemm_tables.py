"""The study of public GEMM tables: made-up tables end to end, and the public ones against published errors."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hwmodels.calibrate import Errors, Fit
from hwmodels.roofline import join_seconds

ROOT = Path(__file__).parent.parent
REFERENCE = Path(os.environ.get("BITPLAN_REFERENCE_DATA", ROOT.parent / "shared" / "data")) / "gemm"
MODULES = ("tables", "predict", "summary", "figure", "__main__")

# Published errors of a fit of four numbers per path (t0, e_c, e_m, p), each on its own fifth of the sites: mean and
# median of |predicted / measured - 1| in percent, and how often it tells whether the path is faster than bf16.
BAR: dict[tuple[str, str], tuple[float, float | None, float | None]] = {
    ("a100_sxm", "bfloat16"): (12, 9, None),
    ("a100_sxm", "sq"): (14, 10, 94),
    ("a100_sxm", "int8_wo"): (17, 12, 88),
    ("a100_sxm", "int4_wo"): (20, 15, 89),
    ("h100_sxm", "bfloat16"): (10, 6, None),
    ("h100_sxm", "fp8"): (13, 7, 90),
    ("h100_sxm", "fp8_block"): (21, 17, 80),
    ("b200_sxm", "bfloat16"): (13, 9, None),
    ("b200_sxm", "fp8"): (13, 8, 96),
    ("b200_sxm", "nvfp4"): (24, 19, 87),
    ("l40s", "bfloat16"): (25, 14, None),
    ("l40s", "sq"): (15, None, 83),
    ("l40s", "int8_wo"): (12, None, 75),
    ("l40s", "int4_wo"): (13, None, 76),
    ("l40s", "fp8"): (17, None, 92),
}


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    """The modules of the study by name."""
    sys.path.insert(0, str(ROOT))
    try:
        package = "experiments.cost_models.gemm"
        modules = SimpleNamespace(**{name: importlib.import_module(f"{package}.{name}") for name in MODULES})
        with pytest.MonkeyPatch.context() as patch:  # caches are looked for among fewer
            patch.setattr(modules.predict, "CAPACITIES", (32e6, 96e6))
            patch.setattr(modules.predict, "SPEEDS", (1.5, 2.5))
            yield modules
    finally:
        sys.path.remove(str(ROOT))


TRUE = {
    "bfloat16": Fit(overhead=3e-6, compute=0.7, memory=0.8, sharpness=2.0, step=3e-8, splits_sums=True),
    "fp8": Fit(overhead=1.2e-5, compute=0.6, memory=0.8, sharpness=1.5, step=3e-10),
}
PEAKS = "bandwidth: 2.0e+12\ncompute: {bf16: 400.0e+12, fp8: 800.0e+12}\n"


def made_up(study: Any, file: Path, noise: float = 0.03) -> pd.DataFrame:
    """Writes a table of an unheard-of device that follows the formula."""
    sizes = [128, 512, 1024, 2048, 8192]
    shapes = pd.MultiIndex.from_product([[1, 16, 64, 256, 4096], sizes, sizes], names=["m", "n", "k"])
    frames = []
    for name, true in TRUE.items():
        frame = shapes.to_frame(index=False)
        recipe = study.tables.PATHS[name]
        m, n, k = (frame[side].to_numpy(float) for side in ("m", "n", "k"))
        inputs = recipe.input_bits + recipe.conversion_bits
        traffic = (n * k * recipe.weight_bits + m * k * inputs + m * n * 16) / 8
        compute_s = 2 * m * n * k / ({"bf16": 400e12, "fp8": 800e12}[recipe.compute] * true.compute)
        steps = np.sqrt(k) if true.splits_sums else k
        joined = join_seconds(compute_s, steps * true.step, true.sharpness)
        seconds = true.overhead + join_seconds(joined, traffic / (2e12 * true.memory), true.sharpness)
        shaken = np.exp(noise * np.random.default_rng(0).standard_normal(len(frame)))
        frames.append(frame.assign(gemm_dtype=name, latency=seconds * shaken * 1e3, device="NVIDIA X1"))
    table = pd.concat(frames, ignore_index=True)
    slower = table.sample(50, random_state=0)  # a second kernel for some shapes
    table = pd.concat([table, slower.assign(latency=2 * slower["latency"])], ignore_index=True)
    table.to_parquet(file)
    return table


@pytest.fixture
def tables_folder(study: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "tables"
    folder.mkdir()
    made_up(study, folder / "x1_runtime.parquet")
    (tmp_path / "peaks.yaml").write_text(PEAKS)
    return folder


@pytest.mark.slow
def test_a_table_of_an_unheard_of_device_is_predicted(study: Any, tables_folder: Path) -> None:
    table = study.tables.read_table(tables_folder / "x1_runtime.parquet", tables_folder.parent / "peaks.yaml")
    assert table.device is None
    assert len(table.rows) == 2 * 5**3  # the faster of two kernels
    said: list[str] = []
    found = study.predict.predict(table, said.append)
    assert [line.split(":")[0] for line in said] == ["x1_runtime bfloat16", "x1_runtime fp8"]
    errors = study.summary.path_errors(found).set_index(["format", "model"])["median"]
    for name, true in TRUE.items():
        assert errors[name, "calibrated"] < 0.03 < errors[name, "raw"]
        assert errors[name, "interpolated"] < 0.1
        fitted = found.fits[name]
        assert fitted.splits_sums == true.splits_sums
        assert fitted.held_out
        for parameter in ("overhead", "compute", "memory"):
            assert getattr(fitted, parameter) == pytest.approx(getattr(true, parameter), rel=0.1)
    assert not found.caches
    pairs = study.summary.pair_errors(found).set_index("model")
    assert pairs.loc["calibrated", "sign"] > 0.95 > pairs.loc["raw", "sign"]
    few = study.summary.few_errors(found)
    assert (few["median"] < 0.1).all()
    assert (few["seeds"] == 5).all()


@pytest.mark.slow
def test_the_command_writes_tables_and_figures(
    study: Any, tables_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, peaks = tables_folder.parent / "out", tables_folder.parent / "peaks.yaml"
    given = ["gemm", "--data", str(tables_folder), "--peaks", str(peaks), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", given)
    study.__main__.main()
    assert "x1_runtime: 250 timings, peaks of peaks.yaml" in capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == [
        *("few.csv", "pairs.csv", "parameters.csv", "paths.csv", "scatter.png", "signs.png"),
    ]
    monkeypatch.setattr(sys, "argv", [*given, "--write-devices"])
    with pytest.raises(ValueError, match="no shipped device"):
        study.__main__.main()


def test_where_no_peaks_are_known_the_best_rates_stand_in(study: Any, tables_folder: Path) -> None:
    rows = study.tables.read_table(tables_folder / "x1_runtime.parquet", tables_folder.parent / "peaks.yaml").rows
    with pytest.raises(ValueError, match=r"no weight above 0\.5 GB"):
        study.tables.observed_peaks(rows)
    large = pd.DataFrame({"gemm_dtype": ["bfloat16"], "m": [1], "n": [65536], "k": [8192], "seconds": [1e-3]})
    peaks = study.tables.observed_peaks(pd.concat([rows, large], ignore_index=True))
    assert 0 < peaks.compute["bf16"] < 400e12
    assert peaks.bandwidth == pytest.approx((65536 * 8192 * 2 + 8192 * 2 + 65536 * 2) / 1e-3)


def test_tables_are_known_by_their_device(study: Any) -> None:
    known = study.tables.known_device
    assert known("a100_sxm_trtllm NVIDIA A100-SXM4-80GB") == "a100_sxm_80gb"
    assert known("h100_sxm_trtllm NVIDIA H100 80GB HBM3") == "h100_sxm"
    assert known("l40s_trtllm NVIDIA L40S") == "l40s"
    assert known("x1_runtime NVIDIA X1") is None


def test_a_cache_holds_all_the_weights_that_are_run_through(study: Any) -> None:
    tables = study.tables
    rows = pd.DataFrame({"m": [1, 1, 8192], "n": [1000, 2000, 1000], "k": [1000, 1000, 1000]})
    weights, buffers = 1000 * 1000 * 2, tables.BUFFERS
    just = buffers * weights + 1000 * 2 + 1000 * 2
    assert tables.Cache(just, 2.0).holds(rows, tables.PATHS["bfloat16"]).tolist() == [True, False, False]
    assert not tables.Cache(just - 1, 2.0).holds(rows, tables.PATHS["bfloat16"]).any()


def test_bad_tables_are_refused(study: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.parquet"):
        study.tables.table_files(tmp_path)
    file = tmp_path / "t.parquet"
    pd.DataFrame({"m": [1]}).to_parquet(file)
    with pytest.raises(ValueError, match="no column gemm_dtype"):
        study.tables.read_table(file)
    pd.DataFrame({"gemm_dtype": ["w1a1"], "m": [1], "n": [1], "k": [1], "latency": [1.0]}).to_parquet(file)
    with pytest.raises(ValueError, match="not known: w1a1"):
        study.tables.read_table(file)
    peaks = tmp_path / "peaks.yaml"
    peaks.write_text("compute: 3\n")
    with pytest.raises(ValueError, match="must be a device file"):
        study.tables.Peaks.of_file(peaks)


def test_the_committed_numbers_meet_the_published_errors() -> None:
    """Errors over five folds of the sites against ones that were published to whole percents."""
    folder = ROOT / "experiments" / "cost_models" / "gemm"
    paths, pairs = (pd.read_csv(folder / f"{name}.csv") for name in ("paths", "pairs"))
    paths["table"], pairs["table"] = (frame["table"].str.removesuffix("_trtllm") for frame in (paths, pairs))
    errors = paths.set_index(["table", "format", "model"]).sort_index()
    told = pairs[pairs["first"] == "bfloat16"].set_index(["table", "second", "model"])["sign"].sort_index()
    for (table, name), (mape, median, sign) in BAR.items():
        mine = errors.loc[table, name, "calibrated"]
        assert round(100 * mine["mape"]) <= mape, (table, name)
        assert median is None or round(100 * mine["median"]) <= median, (table, name)
        assert sign is None or round(100 * told[table, name, "calibrated"]) >= sign, (table, name)
    calibrated, read = (paths[paths["model"] == model]["median"] for model in ("calibrated", "interpolated"))
    assert (calibrated < 0.12).all()
    assert (read < 0.05).all()


@pytest.mark.parametrize(("table", "name"), [("a100_sxm", "bfloat16"), ("a100_sxm", "sq"), ("l40s", "int4_wo")])
def test_a_fit_to_few_sites_meets_the_published_errors(study: Any, table: str, name: str) -> None:
    file = REFERENCE / f"{table}_trtllm.parquet"
    if not file.exists():
        pytest.skip(f"BITPLAN_REFERENCE_DATA has no {file.name}")
    read = study.tables.read_table(file)
    timings, site = study.tables.timings_of(read, name), read.of(name)["site"].to_numpy()
    rng = np.random.default_rng(0)
    seen = np.isin(site, rng.permutation(np.unique(site))[len(np.unique(site)) // 5 :])
    drawn = rng.permutation(np.flatnonzero(seen))[:600]
    errors = Errors.of(study.predict.fit(timings[drawn]).predict(timings[~seen]), timings.seconds[~seen])
    mape, median, _ = BAR[table, name]
    assert errors.mape < mape / 100
    assert median is None or errors.median < median / 100
