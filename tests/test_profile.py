"""Profiling: tables taken in parts, the command's errors, and the calibration of a device file by a table."""

from __future__ import annotations

import argparse
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from hwmodels import Network, Precision, Roofline, Site, Workload, load_device
from hwmodels.device import FOLDER, Tile
from hwmodels.lookup import LookupTable, Timing
from hwmodels.measure import fit
from hwmodels.measure import profile as profiling
from hwmodels.measure.profile import missing, profile
from hwmodels.measure.shapes import PRECISIONS, conv_site, default_sites, layer_of
from hwmodels.measure.timing import Prepared
from search.errors import BitplanError, ConfigError, DataError, UnsupportedError
from search.profile_command import ProfileLines, add_arguments, profile_command, time_left

FLOAT, INT8, INT4 = Precision(), Precision.parse("int8/uint8"), Precision.parse("int4-g32")
SITES = (Site("linear", 1, 64, 64), Site("linear", 4, 64, 64), conv_site(16, 16, 3, 8, 1))
needs_onnxruntime = pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="no onnxruntime")


@dataclass
class Pretended:
    """A runtime whose kernels take 1 s in float and 0.5 s in integers, and which can be cut off."""

    threads: int = 1
    version: str = "pretended 1.0"
    prepared: list[tuple[Site, Precision]] = field(default_factory=list)
    cut_off_after: int = 1000

    def times(self, site: Site, precision: Precision) -> bool:
        return precision != INT4 or site.kind == "linear"

    def prepare(self, site: Site, precision: Precision) -> Prepared:
        if len(self.prepared) >= self.cut_off_after:
            raise KeyboardInterrupt
        self.prepared.append((site, precision))
        return Prepared(precision, "kernel", False, lambda: 1.0 if precision == FLOAT else 0.5)


# Tables


def test_a_table_has_every_site_at_every_precision_that_it_has_kernels_for(tmp_path: Path) -> None:
    runtime = Pretended()
    table = profile(tmp_path / "table.csv", "mine", runtime, SITES, (FLOAT, INT8, INT4), samples=2)
    assert len(table.timings) == 8
    assert LookupTable.read(tmp_path / "table.csv") == table
    found = table.find(SITES[0], INT8, 1)
    assert found is not None
    assert (found.p50_s, found.device, found.runtime, found.kernel) == (0.5, "mine", "pretended 1.0", "kernel")
    assert table.find(SITES[2], INT4, 1) is None


@pytest.mark.parametrize("cut_off_after", range(8))
def test_what_was_cut_off_is_taken_up_and_nothing_is_timed_twice(tmp_path: Path, cut_off_after: int) -> None:
    path, precisions = tmp_path / "table.csv", (FLOAT, INT8, INT4)
    first = Pretended(cut_off_after=cut_off_after)
    with pytest.raises(KeyboardInterrupt):
        profile(path, "mine", first, SITES, precisions, samples=2)
    kept = LookupTable.read(path).timings  # whole sites
    assert len(kept) == sum(size for size, end in ((3, 3), (3, 6)) if cut_off_after >= end)
    second = Pretended()
    table = profile(path, "mine", second, SITES, precisions, samples=2)
    assert table.timings[: len(kept)] == kept
    assert len(table.timings) == len(second.prepared) + len(kept) == 8


def test_a_table_that_is_complete_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    table = profile(path, "mine", Pretended(), SITES, (FLOAT,), samples=2)
    runtime = Pretended()
    assert profile(path, "mine", runtime, SITES, (FLOAT,), samples=2) == table
    assert not runtime.prepared


def test_a_table_can_be_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    profile(path, "mine", Pretended(), SITES, (FLOAT,), samples=2)
    table = profile(path, "mine", Pretended(), SITES[:1], (INT8,), samples=2, is_resumed=False)
    assert [timing.precision for timing in table.timings] == [INT8]


def test_other_precisions_and_threads_join_a_table(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    profile(path, "mine", Pretended(), SITES, (FLOAT,), samples=2)
    profile(path, "mine", Pretended(), SITES, (FLOAT, INT8), samples=2)
    table = profile(path, "mine", Pretended(threads=2), SITES, (FLOAT,), samples=2)
    assert len(table.timings) == 3 + 3 + 3
    assert {timing.threads for timing in table.timings} == {1, 2}


def test_another_devices_table_is_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    profile(path, "mine", Pretended(), SITES[:1], (FLOAT,), samples=2)
    with pytest.raises(ValueError, match="of device 'mine', this would be 'yours'"):
        profile(path, "yours", Pretended(), SITES, (FLOAT,), samples=2)
    with pytest.raises(ValueError, match=r"of runtime 'pretended 1.0', this would be 'pretended 2.0'"):
        profile(path, "mine", Pretended(version="pretended 2.0"), SITES, (FLOAT,), samples=2)


def test_every_site_is_reported_with_what_is_left(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    profile(
        tmp_path / "table.csv",
        "mine",
        Pretended(),
        SITES,
        (FLOAT,),
        samples=2,
        notify=lambda done, total, what: told.append((done, total, what)),
    )
    assert [(done, total) for done, total, _ in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert told[2][2] == "conv2d 3x3 16 to 16 at 8x8, stride 1x1"


def test_what_cannot_be_told_from_the_noise_has_no_row_and_is_tried_again(tmp_path: Path) -> None:
    class Noisy(Pretended):
        def prepare(self, site: Site, precision: Precision) -> Prepared:
            prepared = super().prepare(site, precision)
            return replace(prepared, frame=lambda: 2.0) if precision == INT8 else prepared

    path = tmp_path / "table.csv"
    table = profile(path, "mine", Noisy(), SITES[:1], (FLOAT, INT8), samples=2)
    assert [timing.precision for timing in table.timings] == [FLOAT]
    assert len(profile(path, "mine", Pretended(), SITES[:1], (FLOAT, INT8), samples=2).timings) == 2


def test_missing_sites_are_named_once() -> None:
    wanted = missing(LookupTable(()), Pretended(), (*SITES, *SITES), (FLOAT, INT4))
    assert wanted == {SITES[0]: [FLOAT, INT4], SITES[1]: [FLOAT, INT4], SITES[2]: [FLOAT]}


def test_the_processor_has_a_name() -> None:
    assert profiling.processor()
    assert profiling.last_cache_bytes(1.0) >= 1.0
    assert profiling.cores() >= 1


# The command


def run_command(*arguments: str) -> str:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    console = Console(file=io.StringIO(), width=160)
    profile_command(parser.parse_args(arguments), console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


@needs_onnxruntime
def test_the_command_writes_a_table_and_goes_on_with_it(tmp_path: Path) -> None:
    path = str(tmp_path / "table.csv")
    first = run_command("--out", path, "--sites", "1", "--precisions", "float", "int8/uint8", "--samples", "2")
    assert "0 timings known, 2 to take at 1 site" in first
    assert "site 1 of 1" in first
    again = run_command("--out", path, "--sites", "1", "--precisions", "float", "int8/uint8", "--samples", "2")
    assert "2 timings known, 0 to take at 0 sites" in again
    assert len(LookupTable.read(path).timings) == 2


@needs_onnxruntime
def test_the_command_times_the_layers_of_a_run(tmp_path: Path) -> None:
    import json

    network = Network((layer_of(SITES[2]), layer_of(SITES[2])))
    (tmp_path / "network.json").write_text(json.dumps(network.to_dict()))
    (tmp_path / "layers.json").write_text(json.dumps(network.to_rows()))
    for source in (tmp_path, tmp_path / "network.json", tmp_path / "layers.json"):
        path = tmp_path / f"{source.stem}.csv"
        run_command("--out", str(path), "--network", str(source), "--precisions", "float", "--samples", "2")
        assert [timing.site for timing in LookupTable.read(path).timings] == [SITES[2]]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["--precisions", "int8/uint9"], ConfigError, "did you mean 'int8/uint8'"),
        (["--precisions", "int3"], ConfigError, "no kernel is timed for 'int3'"),
        (["--sites", "0"], ConfigError, "--sites 0"),
        (["--samples", "0"], ConfigError, "--samples 0"),
        (["--threads", "0"], ConfigError, "--threads 0 must be from 1"),
        (["--threads", "100000"], ConfigError, "--threads 100000 must be from 1"),
        (["--fit"], ConfigError, "--fit needs --device"),
        (["--and", "other.csv"], ConfigError, "give --fit as well"),
        (["--fit", "--device", "zen6"], ConfigError, "did you mean 'zen5'"),
        (["--network", "nowhere"], DataError, "cannot read nowhere"),
        (["--out", "table.txt"], DataError, "table.txt has the suffix '.txt'"),
        (["--out", "/proc/nowhere/table.csv"], DataError, "cannot write /proc/nowhere/table.csv"),
    ],
)
def test_errors_say_what_is_wrong(
    arguments: Sequence[str], kind: type[BitplanError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message.replace(".", r"\.")):
        run_command(*arguments)


def test_without_the_runtime_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match=r"bitplan\[onnxruntime\]"):
        run_command()


def test_without_a_cuda_device_the_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="no CUDA device"):
        run_command("--cuda")


def test_layers_of_kinds_that_are_not_timed_are_refused(tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text('[{"name": "lookup", "kind": "embedding"}]')
    with pytest.raises(DataError, match="no layer of the kinds that are timed"):
        run_command("--network", str(tmp_path), "--out", str(tmp_path / "table.csv"))
    (tmp_path / "layers.json").write_text('{"rows": 3}')
    with pytest.raises(DataError, match="holds no layers"):
        run_command("--network", str(tmp_path), "--out", str(tmp_path / "table.csv"))


def test_an_interrupt_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import search.profile_command as module

    path = tmp_path / "table.csv"
    stopped = Pretended(cut_off_after=4)
    monkeypatch.setattr(module, "_runtime", lambda arguments: (stopped, "a processor"))
    with pytest.raises(KeyboardInterrupt):
        run_command("--out", str(path), "--samples", "2", "--precisions", "float", "int8/uint8")
    assert len(LookupTable.read(path).timings) == 4


@pytest.mark.parametrize(("done", "words"), [(0, ""), (1, ", 18 s left"), (5, ", 10 s left"), (9, ", 2 s left")])
def test_the_time_left_follows_from_what_is_done(done: int, words: str) -> None:
    assert time_left(2.0 * done, done, 10) == words
    assert time_left(60.0, 1, 10) == ", 9 min left"


def test_lines_tell_each_site_once() -> None:
    console = Console(file=io.StringIO(), width=160)
    lines = ProfileLines(console)
    for done in range(3):
        lines.step(done, 2, f"site {done}")
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.split(": ")[-1] for line in text.splitlines()] == ["site 0", "site 1"]


# Fits


LINEAR_SITES = tuple(site for site in default_sites() if site.kind == "linear")


def made_table(
    names: Sequence[str] = ("float",), sites: Sequence[Site] = LINEAR_SITES, noise: float = 0.0, faster: float = 1.0
) -> LookupTable:
    """Timings of a device whose every path takes what a roofline of known shares says."""
    device, rng = load_device("zen5"), np.random.default_rng(0)
    seconds: list[Timing] = []
    for site in sites:
        known = names if site.kind == "linear" else [name for name in names if "-g" not in name]
        seconds += [
            Timing(site, Precision.parse(name), 1, 1e6, 1e6, 1e6, 1, "", False, device.id, "made") for name in known
        ]
    table = LookupTable(tuple(seconds))
    timings = []
    for rows in fit.count(table, device).values():
        for row in rows:
            parts = row.operations(Tile()) / (0.5 * row.peak), row.traffic / (0.6 * row.bandwidth)
            took = (2e-6 + sum(part**2 for part in parts) ** 0.5) * np.exp(noise * rng.standard_normal()) / faster
            one = row.timing
            timings.append(Timing(one.site, one.precision, 1, took, took, took, 1, "", False, device.id, "made"))
    return LookupTable(tuple(timings))


def test_known_shares_are_found_again() -> None:
    table, device = made_table(("float", "int4-g32"), default_sites(), noise=0.02), load_device("zen5")
    fits = fit.fit_paths(table, device)
    assert set(fits) == {"fp32_gemm", "fp32_conv", "fp32_depthwise", "nbits4_g32"}
    for found in fits.values():
        assert found.held_out
        assert found.median_error < 0.05
    linear = fits[device.capability("linear", FLOAT).path]
    assert linear.compute == pytest.approx(0.5, rel=0.1)
    assert linear.memory == pytest.approx(0.6, rel=0.1)


@pytest.mark.parametrize("name", PRECISIONS)
def test_operations_and_bytes_are_those_of_the_roofline(name: str) -> None:
    device, site, precision = load_device("zen5"), Site("linear", 1, 4096, 4096), Precision.parse(name)
    timing = Timing(site, precision, 1, 1.0, 1.0, 1.0, 1, "", False, device.id, "made")
    ((row,),) = fit.count(LookupTable((timing,)), device).values()
    layer = layer_of(site)
    parts = Roofline(device).parts(Network((layer,)), {layer.name: precision}, Workload(threads=1))[layer.name]
    written_wider = 3 * site.output_values if row.run.requantizes else 0  # the last layer of a network leaves floats
    assert row.traffic == parts.traffic - written_wider
    assert row.operations(Tile()) == parts.operations
    assert row.bandwidth == device.memory[-1].bandwidth[1].number  # type: ignore[index]


def test_a_fitted_device_file_is_valid_and_says_by_what(tmp_path: Path) -> None:
    table = made_table()
    text, fits = fit.fit_device({"a made table": table}, FOLDER / "zen5.yaml")
    path = tmp_path / "fitted.yaml"
    path.write_text(text)
    device = load_device(path)
    untouched = load_device("zen5").calibration
    assert {name for name, one in device.calibration.items() if one != untouched[name]} == set(fits)
    for name, found in fits.items():
        calibration = device.calibration[name]
        assert calibration.data == table.digest
        assert calibration.compute.number == pytest.approx(found.compute, rel=1e-3)
        assert "a made table" in calibration.compute.source


def test_a_table_faster_than_the_peak_is_of_another_device() -> None:
    with pytest.raises(ValueError, match=r"beyond the peak of \w+ on zen5"):
        fit.fit_paths(made_table(faster=10.0), load_device("zen5"))


def test_too_few_timings_are_no_fit() -> None:
    table = LookupTable(made_table().timings[:3])
    with pytest.raises(ValueError, match="time more"):
        fit.fit_device({"a made table": table}, FOLDER / "zen5.yaml")


def test_every_kind_of_kernel_has_a_path_of_its_own() -> None:
    device = load_device("zen5")
    paths = {
        (kind, name, is_depthwise): device.capability(kind, Precision.parse(name), is_depthwise).path
        for kind, is_depthwise in (("conv2d", False), ("conv2d", True), ("linear", False))
        for name in PRECISIONS[: None if kind == "linear" else 2]
    }
    assert len(set(paths.values())) == len(paths)
    assert device.capability("conv2d", INT4).support == "fallback"
    assert device.capability("linear", Precision.parse("int4-g48")).support == "fallback"


def test_several_tables_fit_the_paths_of_each(tmp_path: Path) -> None:
    device = load_device("zen5")
    within = made_table(("float",), default_sites())
    slow = made_table(("int8/uint8",), default_sites(), faster=0.1).timings
    leaving = LookupTable(tuple(replace(one, runtime="made, float outputs") for one in slow))
    assert {"int8", "fp32_conv_dequantized", "fp32_depthwise_dequantized"} == set(fit.count(leaving, device))
    text, fits = fit.fit_device({"one": within, "two": leaving}, FOLDER / "zen5.yaml")
    assert {"fp32_conv", "fp32_conv_dequantized", "int8"} <= set(fits)
    path = tmp_path / "fitted.yaml"
    path.write_text(text)
    found = load_device(path).calibration
    assert found["fp32_conv"].data == within.digest
    assert found["fp32_conv_dequantized"].data == leaving.digest


def test_a_launch_is_written_where_it_stood() -> None:
    text = fit.with_launch("id: x\nlaunch: {value: 1.0}\nname: y\n", 5.25e-6, 'a "table"')
    assert yaml.safe_load(text)["launch"] == {
        "value": 5.25e-6,
        "unit": "s",
        "source": 'measured, a network that hands on its input: a "table"',
        "confidence": "measured",
    }
