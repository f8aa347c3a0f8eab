"""`bitplan hardware`: what it lists, shows, compares and draws."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from plans import make_plan
from rich.console import Console
from tiny import TinyTask

from hwmodels import Capability, Device, Network, Quantity, Roofline, StorageModel, Workload, list_devices, load_device
from hwmodels.compare import latency_interval
from hwmodels.device import FOLDER, MemoryLevel
from search.cli import main
from search.errors import ConfigError
from search.figures import style
from search.figures.hardware import (
    PART_COLOURS,
    LayerTimesInfo,
    RooflineInfo,
    draw_layer_times,
    draw_roofline,
    layer_times_info,
    roofline_info,
    spread,
)
from search.hardware import targets
from search.hardware.compare import (
    PARTS,
    Compared,
    bound_shares,
    compare,
    layers_frame,
    probability,
    totals_frame,
    uniform_policies,
    write_comparison,
)
from search.hardware.tables import print_comparison, print_device, print_listing, scaled
from search.policy import Policy
from search.tasks.digits import Digits

NOTE = "no 4-bit weights here [at all]"
PRECISIONS = ("int8/uint8", "int4/uint8", "int8/uint8-token")


@pytest.fixture(scope="module")
def network() -> Network:
    return targets.network_of(TinyTask())


@pytest.fixture(scope="module")
def zen5() -> Device:
    return load_device("zen5")


@pytest.fixture(scope="module")
def choosy(zen5: Device) -> Device:
    """zen5, but refusing weights of 4 bits."""
    refused = Capability("*", ("int4",), "*", "refused", NOTE)
    return replace(zen5, id="choosy", capabilities=(refused, *zen5.capabilities))


@pytest.fixture(scope="module")
def timeless(zen5: Device) -> Device:
    """zen5 without a bandwidth."""
    memory = MemoryLevel("dram", {n: Quantity("unknown", "byte/s", "not published", "none") for n in (1, 2)})
    return replace(zen5, id="timeless", memory=(memory,))


def run(device: Device, network: Network, *precisions: str) -> Compared:
    model = Roofline(device)
    return compare(model, network, uniform_policies(network, precisions or PRECISIONS), targets.workload_for(model))


def printed(show, *arguments, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    show(*arguments, console)
    return console.file.getvalue()


def flat(text: str) -> str:
    return " ".join(text.split())


# Numbers


def test_the_parts_of_all_layers_add_up_to_the_latency(network: Network, zen5: Device) -> None:
    for batch in (1, 64):
        target = compare(Roofline(zen5), network, uniform_policies(network, PRECISIONS), Workload(batch=batch))
        assert [row.policy for row in target.rows] == ["float", *PRECISIONS]
        for row in target.rows:
            assert row.report is not None
            table = Roofline(zen5).cost_table(
                network, {name: (p,) for name, p in policy_of(network, row.policy)}, target.workload
            )
            parts = sum(sum(layer.seconds.values()) for layer in row.layers)
            assert parts + table.fixed.latency_s == pytest.approx(row.report.total.latency_s, rel=1e-12)
            assert {part for layer in row.layers for part in layer.seconds} == set(PARTS)
    assert (*PARTS, "other") == tuple(PART_COLOURS)


def policy_of(network: Network, name: str):
    (policy,) = (policy for key, policy in uniform_policies(network, [name]).items() if key == name)
    return policy.items()


def test_a_layer_by_hand(network: Network, zen5: Device) -> None:
    """The stem in float: 1 x 6 x 6 to 4 x 6 x 6 by 3 x 3 windows, everything in the first cache."""
    stem = run(zen5, network).rows[0].layers[0]
    path, operations, moved = zen5.calibration["fp32"], 2 * 36 * 9 * 4, 4 * (36 + 144 + 36)
    compute_s = operations / (317e9 * path.compute.number)
    memory_s = moved / (685e9 * path.memory.number)
    p = path.sharpness.number
    joined = (compute_s**p + memory_s**p) ** (1 / p)
    assert (stem.layer, stem.kind, stem.level, stem.operations, stem.traffic) == (
        "stem",
        "conv",
        "l1",
        operations,
        moved,
    )
    assert stem.seconds["compute"] == pytest.approx(joined * compute_s**p / (compute_s**p + memory_s**p))
    assert stem.seconds["memory"] == pytest.approx(joined * memory_s**p / (compute_s**p + memory_s**p))
    assert stem.seconds["overhead"] == path.overhead.number
    assert stem.seconds["conversion"] == 0
    assert stem.intensity == operations / moved
    assert stem.attained == pytest.approx(operations / (joined + path.overhead.number))
    assert stem.attained < min(317e9, stem.intensity * 685e9)


def test_policies_are_held_against_float(network: Network, zen5: Device) -> None:
    target = run(zen5, network)
    reference, int8, int4, dynamic = target.rows
    assert math.isnan(reference.speedup)
    assert math.isnan(reference.faster)
    for row in (int8, int4, dynamic):
        assert row.speedup == pytest.approx(reference.report.total.latency_s / row.report.total.latency_s)
        assert row.faster == row.report.probability_faster(reference.report)
        assert row.interval == latency_interval(row.report)
    assert int4.faster == int8.faster  # what is stored in fewer bits is computed the same
    assert probability(int8, int4) == 0.5
    assert dynamic.faster < 0.05  # floats on another path, and conversions besides
    assert sum(bound_shares(int8.report).values()) == pytest.approx(1)


def test_what_a_device_refuses_is_said_with_its_note(network: Network, choosy: Device) -> None:
    target = run(choosy, network)
    row = target.rows[2]
    assert (row.policy, row.report, row.layers) == ("int4/uint8", None, ())
    assert row.refusal == f"4 of 4 layers refused: {NOTE}"
    assert [other.report is None for other in target.rows] == [False, False, True, False]
    assert math.isnan(probability(row, target.rows[0]))


def test_a_mixed_policy_is_refused_for_its_layers_alone(network: Network, choosy: Device) -> None:
    names = {"stem": "int8/uint8", "left": "int4/uint8", "right": "int4/uint8", "head": "float"}
    found = compare(Roofline(choosy), network, {"mixed": Policy.from_dict(names)}, Workload())
    assert found.rows[0].refusal == f"2 of 4 layers refused: {NOTE}"


def test_models_without_time_are_priced_in_bytes(network: Network, timeless: Device) -> None:
    policies = uniform_policies(network, PRECISIONS)
    for model in (Roofline(timeless), StorageModel()):
        for row in compare(model, network, policies, Workload()).rows:
            assert row.report.total.weight_bytes > 0
            assert row.interval is None
            assert row.layers == ()
            assert math.isnan(row.speedup)
            assert math.isnan(row.faster)
            assert bound_shares(row.report) == {}


def test_workloads() -> None:
    model = Roofline("zen5")
    assert targets.workload_for(model) == Workload(threads=2)
    assert targets.workload_for(model, 3, 1) == Workload(batch=3, threads=1)
    with pytest.raises(ConfigError, match=r"figures for 1 to 2 threads, got workload.threads=3"):
        targets.workload_for(model, threads=3)
    assert targets.workload_for(StorageModel(), threads=64).threads == 64


# Words


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        *[(1.35e12, "op/s", "1.35 Top/s"), (38e9, "byte/s", "38 GB/s"), (49152, "byte", "48.0 KiB")],
        *[
            (3e-6, "s", "3 µs"),
            (2e-13, "J", "200 fJ"),
            (243.75e-12, "J/byte", "243.8 pJ/B"),
            (3.65e9, "Hz", "3.65 GHz"),
        ],
        *[(0.75, "1", "0.75"), (132, "1", "132"), (0.0, "s", "0 s"), (20480, "1", "20,480"), (350, "W", "350 W")],
    ],
)
def test_numbers_in_units_that_fit(value: float, unit: str, words: str) -> None:
    assert scaled(Quantity(value, unit, "a table", "primary")) == words
    assert scaled(Quantity("unknown", unit, "nowhere", "none")) == "unknown"


def test_guesses_have_two_digits() -> None:
    assert spread(277.4e-6, 113.2e-6, 680.9e-6, "datasheet") == "280 µs [110, 680]"
    assert spread(277.4e-6, 113.2e-6, 680.9e-6, "measured") == "277 µs [113, 681]"
    assert spread(0.9e-3, 0.4e-3, 1.9e-3, "calibrated") == "900 µs [400, 1,900]"
    assert spread(1e-3, math.nan, math.nan, "datasheet") == "1.0 ms"


def test_the_list_names_every_device_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware"]) == 0
    output = capsys.readouterr().out
    words = output.split()
    assert {"storage", "hwmodels.StorageModel", *list_devices()} <= set(words)
    assert "1.35 Top/s" in output
    assert main(["hardware", "list"]) == 0
    assert capsys.readouterr().out == output


def test_the_list_survives_a_file_that_is_not_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Device:
        if name == "odd":
            raise ValueError(f"{FOLDER}/odd.yaml is not a valid device: clock: [missing]")
        return load_device(name)

    monkeypatch.setattr(targets, "list_devices", lambda: ("odd", "zen5"))
    monkeypatch.setattr(targets, "load_device", load)
    found = targets.listing()
    assert found.broken == {"odd": "odd.yaml is not a valid device: clock: [missing]"}
    output = flat(printed(print_listing, found))
    assert "odd not valid" in output
    assert "clock: [missing]" in output
    assert "zen5 cpu" in output


@pytest.mark.parametrize(("name", "width"), [("zen5", 160), *((name, 80) for name in list_devices())])
def test_every_device_is_shown_in_full(name: str, width: int) -> None:
    device = load_device(name)
    output = printed(print_device, device, width=width)
    assert max(map(len, output.splitlines())) <= width
    assert "…" not in output
    words = flat(output)
    for warning in device.warnings:
        assert f"warning: {warning}" in words
    total = len(list(device.leaves()))
    assert f"{len(device.shaky)} of {total} numbers rest on secondary, assumed, recalled sources" in words
    for place in device.shaky:
        assert place in words
    for _, value in device.leaves():
        assert scaled(value) in words
    for one in device.capabilities:
        assert one.support in words
        assert one.note.split()[0] in words


def test_show_takes_a_file_and_other_models(zen5: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load((FOLDER / "zen5.yaml").read_text())
    content["name"] = "My [own] CPU"
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["hardware", "show", str(file)]) == 0
    output = capsys.readouterr().out
    assert "zen5: My [own] CPU" in output
    assert "int[2-8]" in output
    assert main(["hardware", "show", "storage"]) == 0
    assert "Counts bytes and bit operations" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 160])
def test_a_comparison_can_be_read(network: Network, choosy: Device, timeless: Device, width: int) -> None:
    compared = [run(device, network) for device in (load_device("zen5"), choosy, timeless)]
    output = printed(print_comparison, compared, network, "tiny", width=width)
    assert max(map(len, output.splitlines())) <= width
    assert "…" not in output.replace("[…, …]", "")
    words = flat(output)
    assert "tiny: 4 layers, 498 weights" in words
    assert f"int4/uint8: 4 of 4 layers refused: {NOTE}" in words
    assert "not run" in words
    for target in compared:
        for warning in target.warnings:
            assert f"warning: {warning}" in words
    report = compared[0].rows[1].report
    time = spread(report.total.latency_s, *report.interval, "datasheet")
    assert (time in words) == (width == 160)
    assert time.split(" [")[0] in words
    assert f"{compared[0].rows[1].faster:.0%}" in words
    assert "latency by target" in words


MISTAKES = [
    ("show zen55", "no device 'zen55' (did you mean 'zen5'?)"),
    ("show nothing.yaml", "cannot read device file nothing.yaml"),
    ("compare zen55 --task digits", "did you mean 'zen5'?"),
    ("compare zen5 --task digit", "task=digit is unknown (did you mean 'digits'?)"),
    ("compare zen5", "--task digits"),
    ("compare zen5 --task digits zen5", "'zen5' is no task setting; allowed: task.KEY=VALUE"),
    ("compare zen5 --task digits task.chekpoint=1", "task.chekpoint"),
    ("compare zen5 --task digits --precision int9", "'int9' is no format"),
    ("compare zen5 --task digits --threads 9", "figures for 1 to 2 threads, got workload.threads=9"),
    ("compare zen5 --task digits --batch 0", "workload.batch must be at least 1, got 0"),
    (
        "compare zen5 --task digits --tokens 1",
        "workload.tokens and workload.context are for networks that read token ids",
    ),
    ("compare zen5 --plan nowhere", "no plan at nowhere"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES)
def test_a_mistake_gets_one_line(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error


def test_two_devices_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_text((FOLDER / "zen5.yaml").read_text())
    assert main(["hardware", "compare", "zen5", str(copy), "--task", "digits"]) == 2
    assert "two of the devices are called zen5" in capsys.readouterr().err


def test_compare_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "zen5",
        "storage",
        "--task",
        "digits",
        "--precision",
        "int8/uint8",
        "int4",
        "--batch",
        "4",
        "--threads",
        "1",
    ]
    assert main(["hardware", "compare", *arguments, "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "digits: 10 layers" in output
    assert "batch 4" in output
    assert "1 threads" in output
    names = {"comparison.csv", "layers.csv", "layers-zen5.png", "roofline-zen5.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    totals, layers = pd.read_csv(tmp_path / "comparison.csv"), pd.read_csv(tmp_path / "layers.csv")
    assert totals.groupby("hardware")["policy"].apply(list).to_dict() == {
        name: ["float", "int8/uint8", "int4/float"] for name in ("zen5", "storage")
    }
    assert set(totals["threads"]) == {1}
    report = Roofline("zen5").network_cost(
        network := targets.network_of(targets.read_task("digits")),
        uniform_policies(network, ["int8/uint8"])["int8/uint8"],
        Workload(batch=4, threads=1),
    )
    row = totals[(totals["hardware"] == "zen5") & (totals["policy"] == "int8/uint8")].iloc[0]
    assert row["latency_s"] == pytest.approx(report.total.latency_s)
    assert (row["latency_low_s"], row["latency_high_s"]) == pytest.approx(report.interval)
    assert len(layers) == 3 * 10
    for name in names - {"comparison.csv", "layers.csv"}:
        with Image.open(tmp_path / name) as image:
            assert image.size[0] >= 1600


def test_a_plan_is_compared_beside_the_precisions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(Digits(), lambda index, layer: "int8/uint8" if index else "int4/uint4")
    plan.save(tmp_path / "plan.json")
    arguments = ["hardware", "compare", "zen5", "--plan", str(tmp_path), "--precision", "int8/uint8"]
    assert main([*arguments, "--task", "digits", "--out", str(tmp_path)]) == 0
    assert f"plan {plan.digest}" in capsys.readouterr().out
    totals = pd.read_csv(tmp_path / "comparison.csv").set_index("policy")
    assert list(totals.index) == ["float", "int8/uint8", f"plan {plan.digest}"]
    assert totals["weight_bytes"].is_monotonic_decreasing
    assert set(pd.read_csv(tmp_path / "layers.csv").query(f"policy == 'plan {plan.digest}'")["precision"]) == {
        *("int4/uint4", "int8/uint8"),
    }
    assert main(arguments) == 2
    assert "names no task" in capsys.readouterr().err


# Figures


def inside(figure) -> bool:
    """Whether nothing of a figure is cut off, hence its border white."""
    pixels = np.asarray(Image.open(io.BytesIO(style.png(figure))).convert("L"))
    return all((line == 255).all() for line in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_figures_show_what_the_tables_say(network: Network, choosy: Device) -> None:
    compared = [run(choosy, network)]
    totals, layers = totals_frame(compared), layers_frame(compared)
    info = layer_times_info(totals, layers)
    assert list(info.seconds) == ["float", "int8/uint8", "int8/uint8-token"]
    assert list(info.refused) == ["int4/uint8"]
    figure = draw_layer_times(info)
    assert len(figure.axes) == 3
    for axis, row in zip(figure.axes, (row for row in compared[0].rows if row.report), strict=True):
        heights = sum(bar.get_height() for bar in axis.patches)
        assert heights * 1e-6 == pytest.approx(row.report.total.latency_s)
        assert axis.get_title(loc="left").startswith(f"{row.policy}: ")
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == [*network.names, "other"]
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
    assert NOTE in figure.axes[-1].get_xlabel()

    points = roofline_info(choosy, 2, totals, layers)
    assert points.peaks == {"fp32": 317e9, "int8": 1350e9}
    assert points.bandwidths == {"l1": 685e9}
    assert len(points.intensity) == 3 * 4
    assert set(points.policy) == {0, 1, 3}
    assert (points.attained <= np.minimum(1350e9, points.intensity * 685e9)).all()
    figure = draw_roofline(points)
    drawn = np.concatenate([np.asarray(found.get_offsets()) for found in figure.axes[0].collections])
    expected = np.column_stack([points.intensity, points.attained])
    assert sorted(map(tuple, drawn)) == sorted(map(tuple, expected))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["l1 685 GB/s", "int8 1.35 Top/s", "fp32 317 Gop/s"]
    assert [text.get_text() for text in figure.legends[0].get_texts()][:3] == [*info.seconds]


def test_what_is_no_layer_does_not_dwarf_the_layers() -> None:
    seconds = np.zeros((len(PART_COLOURS), 3))
    seconds[0, :2], seconds[-1, 2] = 1e-5, 5e-4
    (axis,) = draw_layer_times(LayerTimesInfo("zen5", ("a", "b"), {"float": seconds}, {"float": "1 ms"}, {})).axes
    assert axis.get_ylim()[1] == pytest.approx(22.4)
    assert [text.get_text().strip() for text in axis.texts] == ["500"]


def test_nothing_to_draw_writes_the_tables_alone(network: Network, timeless: Device, tmp_path: Path) -> None:
    written = write_comparison([run(timeless, network)], tmp_path / "new")
    assert [path.name for path in written] == ["comparison.csv", "layers.csv"]
    assert (tmp_path / "new" / "comparison.csv").is_file()


@pytest.mark.parametrize("count", [1, 60])
def test_figures_have_room_for_any_number_of_layers(count: int) -> None:
    rng = np.random.default_rng(count)
    names = tuple(f"features.{i // 3}.conv.{i % 3}$1$_long_name" for i in range(count))
    policies = ("float", "int8/uint8", "int4/uint8-token", "mxfp4/fp8_e4m3")
    seconds = {name: rng.uniform(0, 1e-4, (len(PART_COLOURS), count + 1)) for name in policies[:3]}
    refused = {policies[3]: "a reason of many words, " * 12}
    assert inside(draw_layer_times(LayerTimesInfo("zen5", names, seconds, dict.fromkeys(policies, "1 ms"), refused)))
    points = RooflineInfo(
        title="a device with $a$ name of some length, and its runtime",
        peaks={"int8": 1e15, "fp8": 1.1e15, "fp32": 2e13},
        bandwidths={"l2": 9e12, "dram": 3e12},
        policies=policies,
        policy=np.arange(3 * count) % 3,
        kinds=tuple(rng.choice(["conv", "depthwise", "odd"], 3 * count)),
        intensity=10 ** rng.uniform(-1, 4, 3 * count),
        attained=10 ** rng.uniform(8, 15, 3 * count),
    )
    assert inside(draw_roofline(points))


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".npy"])
def test_tables_for_other_tools(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"costs{suffix}"
    assert main(["hardware", "table", "zen5", "--task", "digits", "--out", str(path)]) == 0
    assert f"Wrote {path}" in capsys.readouterr().out
    if suffix == ".npy":
        assert np.load(path).shape == (10, 8, 8)
        return
    frame = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    assert len(frame) == 10 * 3
    assert set(frame["weight"]) == {"float", "int8", "int4"}
    assert (frame["latency_s"] > 0).all()


def test_tables_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["hardware", "table", "zen5", "--task", "digits", "--out"]
    assert main([*given, str(tmp_path / "costs.txt")]) == 2
    assert "costs.txt ends in '.txt'" in capsys.readouterr().err
    assert main([*given, str(tmp_path / "costs.csv"), "--precision", "int9"]) == 2
    assert "int9" in capsys.readouterr().err
