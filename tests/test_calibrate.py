"""Fits: known parameters are found again, kinds of kernel told apart, and device files rewritten in place."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.calibrate import (
    FEWEST,
    VECTOR_ROWS,
    Errors,
    Fit,
    Timings,
    cross_fit,
    fit,
    gemm_timings,
    judged,
    site_folds,
)
from hwmodels.calibration_file import calibrate_device, calibrate_file, calibration_of
from hwmodels.device import Tile, load_device, parse_device, read_yaml
from hwmodels.roofline import join_seconds

PEAK, BANDWIDTH = 300e12, 2e12
TRUE = Fit(overhead=4e-6, compute=0.8, memory=0.7, sharpness=1.6, step=3e-10)
DIGEST = "sha256:" + "0" * 64
ZEN5 = Path(__file__).parent.parent / "hwmodels" / "devices" / "zen5.yaml"


def sizes(count: int = 240, seed: int = 0, deep: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    m, n, k = 2 ** rng.integers(0, 14, count), 2 ** rng.integers(6, 15, count), 2 ** rng.integers(6, 16, count)
    return m.astype(float), n.astype(float), (k if deep else np.minimum(k, 512)).astype(float)


def made(true: Fit, count: int = 240, noise: float = 0.0, seed: int = 0) -> Timings:
    """Timings that follow a fit, with log-normal noise."""
    m, n, k = sizes(count, seed)
    blank = gemm_timings(
        m, n, k, np.ones(count), weight_bits=16, input_bits=16, output_bits=16, peak=PEAK, bandwidth=BANDWIDTH
    )
    shaken = np.exp(noise * np.random.default_rng(seed + 1).standard_normal(count))
    return replace(blank, seconds=true.predict(blank) * shaken)


def near(found: Fit, true: Fit, within: float) -> None:
    for name in ("overhead", "compute", "memory", "sharpness", "step"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=within), name


def test_the_formula_is_the_rooflines_with_steps_as_a_third_part() -> None:
    timings = made(TRUE, 30)
    parts = (
        timings.operations / (PEAK * TRUE.compute),
        timings.traffic / (BANDWIDTH * TRUE.memory),
        timings.summed * TRUE.step,
    )
    expected = TRUE.overhead + sum(part**TRUE.sharpness for part in parts) ** (1 / TRUE.sharpness)
    assert TRUE.predict(timings) == pytest.approx(expected, rel=1e-12)
    plain = replace(TRUE, step=0.0)
    assert plain.predict(timings) == pytest.approx(TRUE.overhead + join_seconds(*parts[:2], TRUE.sharpness), rel=1e-12)


def test_gemm_timings_count_operations_and_bytes() -> None:
    timings = gemm_timings(
        np.array([3.0]),
        np.array([5.0]),
        np.array([7.0]),
        np.array([1e-6]),
        weight_bits=4,
        input_bits=8,
        output_bits=16,
        peak=PEAK,
        bandwidth=BANDWIDTH,
        groups=2,
        tile=Tile(4, 8, 16, "test"),
    )
    assert timings.operations.tolist() == [2 * 4 * 8 * 16 * 2]
    assert timings.traffic.tolist() == [2 * (5 * 7 * 4 + 3 * 7 * 8 + 3 * 5 * 16) / 8]
    assert timings.limits.tolist() == [max(timings.operations[0] / PEAK, timings.traffic[0] / BANDWIDTH)]


def test_a_fit_finds_the_parameters_of_noise_free_timings() -> None:
    found = fit(made(TRUE))
    near(found, TRUE, 1e-3)
    assert not found.splits_sums
    assert found.vector_overhead is None
    assert found.median_error < 1e-4
    assert found.sigma < 1e-3
    assert found.samples == 240


def test_a_fit_finds_split_sums() -> None:
    true = replace(TRUE, splits_sums=True, step=6e-8)
    found = fit(made(true))
    near(found, true, 1e-3)
    assert found.splits_sums


def test_a_fit_finds_a_kernel_for_vectors() -> None:
    true = replace(TRUE, vector_overhead=1e-6)
    found = fit(made(true, 400))
    near(found, true, 1e-2)
    assert found.vector_overhead == pytest.approx(1e-6, rel=1e-2)
    timings = made(true, 400)
    assert fit(timings, is_plain=True).vector_overhead is None
    few = timings.rows <= VECTOR_ROWS
    assert fit(timings[~few]).vector_overhead is None


def test_a_fit_withstands_noise_and_outliers() -> None:
    timings = made(TRUE, 600, noise=0.05)
    seconds = timings.seconds.copy()
    seconds[::40] *= 10
    found = fit(replace(timings, seconds=seconds))
    near(found, TRUE, 0.15)
    assert found.median_error < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_twenty_timings_are_enough(seed: int) -> None:
    seen, unseen = made(TRUE, 20, noise=0.03, seed=seed), made(TRUE, 200, seed=100 + seed)
    assert Errors.of(fit(seen).predict(unseen), unseen.seconds).median < 0.1


def test_fits_are_deterministic_and_take_timings_enough() -> None:
    timings = made(TRUE, 40, noise=0.1)
    assert fit(timings) == fit(timings)
    with pytest.raises(ValueError, match=f"at least {FEWEST} timings, got 7"):
        fit(timings[np.arange(7)])


def test_rows_may_see_the_bandwidth_of_different_levels() -> None:
    timings = made(TRUE)
    levels = np.where(np.arange(240) % 2, BANDWIDTH, 4 * BANDWIDTH)
    timings = replace(timings, bandwidth=levels)
    timings = replace(timings, seconds=TRUE.predict(timings))
    near(fit(timings), TRUE, 1e-3)


@settings(max_examples=8, deadline=None)
@given(
    st.floats(1e-7, 1e-4), st.floats(0.05, 1), st.floats(0.05, 1), st.floats(1, 8), st.floats(0, 0.5), st.integers(0, 9)
)
def test_what_is_fitted_stays_in_its_bounds(
    overhead: float, compute: float, memory: float, sharpness: float, noise: float, seed: int
) -> None:
    timings = made(Fit(overhead, compute, memory, sharpness), 30, noise, seed)
    found = fit(timings, is_plain=True)
    assert found.overhead >= 0
    assert 0 < found.compute <= 1
    assert 0 < found.memory <= 1
    assert found.sharpness >= 1
    assert found.step >= 0
    predicted = found.predict(timings)
    assert (predicted >= found.overhead).all()
    assert np.isfinite(predicted).all()


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_fit_does_not_mind_the_unit_of_time(factor: float) -> None:
    timings = made(TRUE, 60, noise=0.1)
    scaled = Timings(
        timings.operations,
        timings.traffic,
        timings.seconds * factor,
        PEAK / factor,
        BANDWIDTH / factor,
        timings.summed,
        timings.rows,
    )
    one, other = fit(timings), fit(scaled)
    assert other.predict(scaled) == pytest.approx(one.predict(timings) * factor, rel=1e-3)


def test_timings_are_checked() -> None:
    one = np.ones(3)
    with pytest.raises(ValueError, match="traffic has shape"):
        Timings(one, np.ones(2), one, PEAK, BANDWIDTH)
    with pytest.raises(ValueError, match="above 0"):
        Timings(one, one, np.zeros(3), PEAK, BANDWIDTH)
    with pytest.raises(ValueError, match="finite"):
        Timings(one, one * math.nan, one, PEAK, BANDWIDTH)


def test_sites_are_held_out_whole_and_once() -> None:
    site = np.random.default_rng(0).integers(0, 23, 200)
    folds = site_folds(site)
    assert (np.sum(folds, axis=0) == 1).all()
    for held in folds:
        assert not set(site[held]) & set(site[~held])
    with pytest.raises(ValueError, match="5 folds need as many sites"):
        site_folds(np.array([1, 1, 2]))


def test_cross_fit_judges_by_what_was_held_out() -> None:
    timings = made(TRUE, 70, noise=0.1)
    site = np.arange(70) // 4
    found, predicted = cross_fit(timings, site)
    errors = Errors.of(predicted, timings.seconds)
    assert found.held_out
    assert found.median_error == errors.median
    assert found.sigma == errors.sigma
    assert found == judged(fit(timings), errors)


def test_a_fit_becomes_a_calibration() -> None:
    found = judged(fit(made(replace(TRUE, vector_overhead=1e-6), 400)), Errors(0.1, 0.08, 0.9, 0.12))
    path = calibration_of(found, DIGEST, "a table")
    assert path.tier == "calibrated"
    assert path.data == DIGEST
    assert path.samples == 400
    assert path.holdout_error is not None
    assert path.holdout_error.number == 0.08
    assert path.sigma.number == 0.12
    assert path.start_s(1) == pytest.approx(1e-6, rel=0.01)
    assert path.start_s(5) == pytest.approx(4e-6, rel=0.01)
    assert path.steps_s(1, 4096) == 0
    assert path.steps_s(5, 4096) == pytest.approx(4096 * TRUE.step, rel=0.02)
    with pytest.raises(ValueError, match="digest"):
        calibration_of(found, "", "a table")


def test_a_device_file_is_calibrated_in_place(tmp_path: Path) -> None:
    text = ZEN5.read_text()
    paths = list(load_device("zen5").calibration)
    fits = {name: judged(replace(TRUE, samples=9), Errors(0.1, 0.08, 0.9, 0.12)) for name in (*paths, "extra")}
    changed = calibrate_device(text, fits, DIGEST, 'my "table"')
    file = tmp_path / "zen5.yaml"
    file.write_text(changed)
    device, before = load_device(file), load_device("zen5")
    assert list(device.calibration) == [*paths, "extra"]
    for name in fits:
        assert device.calibration[name] == calibration_of(fits[name], DIGEST, 'my "table"')
    assert replace(device, calibration=before.calibration) == before
    begin = text.index("\ncalibration:")
    assert changed[:begin] == text[:begin]
    end = text.index("\ncapabilities:")
    assert changed.endswith(text[end:])
    assert calibrate_device(file, fits, DIGEST, 'my "table"') == changed
    calibrate_file(file, fits, DIGEST, "another")
    assert [path.name for path in tmp_path.iterdir()] == ["zen5.yaml"]
    assert "another" in file.read_text()


TWO = """id: toy
calibration:
  # of a
  a: &one
    tier: datasheet
  # of b
  b:
    <<: *one
# of what comes next
capabilities: []
"""


def test_other_paths_and_comments_stay() -> None:
    changed = calibrate_device(TWO, {"b": TRUE}, DIGEST, "table")
    assert changed.startswith(
        "id: toy\ncalibration:\n  # of a\n  a: &one\n    tier: datasheet\n  b:\n    tier: calibrated\n"
    )
    assert changed.endswith("# of what comes next\ncapabilities: []\n")
    with pytest.raises(ValueError, match=r"calibration\.b refers to that of a"):
        calibrate_device(TWO, {"a": TRUE}, DIGEST, "table")
    with pytest.raises(ValueError, match="one block calibration"):
        calibrate_device("id: toy\n", {"a": TRUE}, DIGEST, "table")


def test_what_is_written_is_valid_yaml_with_numbers(tmp_path: Path) -> None:
    file = tmp_path / "toy.yaml"
    file.write_text(calibrate_device("calibration:\n", {"a": replace(TRUE, tile=Tile(1, 8, 16, "tile"))}, DIGEST, "x"))
    written = read_yaml(file)["calibration"]["a"]
    assert written["overhead"]["value"] == 4e-6
    assert isinstance(written["overhead"]["value"], float)
    assert written["tile"] == {"m": 1, "n": 8, "k": 16, "source": "tile"}
    with pytest.raises(ValueError, match="not a valid device"):
        parse_device(read_yaml(file), file)
