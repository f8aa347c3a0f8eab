"""Lookup tables: their files, what they are strict about, and what cost models make of them."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance import CostModelContract
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import Layer, Network, Precision, Roofline, StorageModel, Workload, load_device
from hwmodels.compare import latency_interval
from hwmodels.cost import COSTS
from hwmodels.cost_file import COLUMNS as COST_COLUMNS
from hwmodels.cost_file import write_costs
from hwmodels.haq_table import BitTable, read_haq_table, to_haq_table, write_haq_table
from hwmodels.lookup import COLUMNS, LookupTable, Timing
from hwmodels.lookup_model import MEASURED, Lookup
from hwmodels.lookup_sites import QUANTILE_80, timing_sigma
from hwmodels.site import Site
from hwmodels.table_file import read_rows

TOY = load_device(Path(__file__).parent / "devices" / "toy.yaml")
FLOAT, INT8, INT4 = (Precision.parse(name) for name in ("float", "int8/uint8", "int4/uint8"))
CONV = Site("conv2d", 1, 16, 32, (3, 3), (1, 1), 1, (8, 8), (8, 8))
ONE = Workload(threads=1)
REFERENCE = Path(os.environ.get("BITPLAN_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data"))
HAQ = REFERENCE / "haq_mobilenetv2_latency.npy"
needs_table = pytest.mark.skipif(not HAQ.exists(), reason=f"BITPLAN_REFERENCE_DATA has no {HAQ.name}")


def timed(site: Site, precision: Precision | str = INT8, p50_s: float = 1e-4, **more: Any) -> Timing:
    """A timing whose percentiles lie a factor of 1.1 apart."""
    precision = Precision.parse(precision) if isinstance(precision, str) else precision
    rest = {"threads": 1, "p20_s": p50_s / 1.1, "p80_s": p50_s * 1.1, "samples": 30, "kernel": "gemm"}
    rest |= {"is_fallback": False, "device": "toy", "runtime": "none 1.0"}
    return Timing(site=site, precision=precision, p50_s=p50_s, **(rest | more))


def linear(rows: int, inputs: int, outputs: int) -> Site:
    return Site("linear", rows, inputs, outputs)


def fc(name: str, inputs: int, outputs: int, **more: Any) -> Layer:
    """A linear layer that stands alone: without tensors there are no conversions."""
    shape = {"weight_shape": (outputs, inputs), "input_shape": (1, inputs), "output_shape": (1, outputs)}
    return Layer(name, "linear", **(shape | {"macs": inputs * outputs} | more))


# Files

shapes = st.lists(st.integers(1, 9), min_size=2, max_size=2).map(tuple)
words = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp", "Zs")), max_size=8)
names = words.filter(bool)
seconds = st.floats(1e-9, 1e3)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    groups = draw(st.sampled_from((1, 2, 8)))
    channels = st.integers(1, 64).map(lambda n: n * groups)
    if draw(st.booleans()):
        return linear(draw(st.integers(1, 4096)), draw(st.integers(1, 4096)), draw(st.integers(1, 4096)))
    return Site(
        "conv2d",
        draw(st.integers(1, 64)),
        draw(channels),
        draw(channels),
        draw(shapes),
        draw(shapes),
        groups,
        draw(shapes),
        draw(shapes),
    )


@st.composite
def tables(draw: st.DrawFn) -> LookupTable:
    device, runtime = draw(names), draw(names)
    found = {}
    for site in draw(st.lists(sites(), max_size=4)):
        precision = Precision.parse(
            draw(st.sampled_from(("float", "int8/uint8", "int4-g128", "fp8_e4m3/fp8_e4m3-token")))
        )
        low, middle, high = sorted(draw(st.tuples(seconds, seconds, seconds)))
        timing = Timing(
            *(site, precision, draw(st.integers(1, 8)), low, middle, high, draw(st.integers(1, 99)), draw(words)),
            *(draw(st.booleans()), device, runtime, draw(st.sampled_from((math.nan, 3.65e9))), draw(words)),
        )
        found[timing.key] = timing
    return LookupTable(tuple(found.values()))


@given(table=tables(), suffix=st.sampled_from((".csv", ".parquet")))
def test_files_hold_the_very_table(tmp_path_factory: pytest.TempPathFactory, table: LookupTable, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"round_trip{suffix}"
    table.write(path)
    back = LookupTable.read(path)
    assert back == table
    assert back.digest == table.digest
    assert LookupTable(back.timings[::-1]).digest == table.digest, "the order of rows says nothing"


def test_digest_is_of_all_that_is_said() -> None:
    timing = timed(CONV, clock_hz=1e9, source="here")
    digests = {
        LookupTable((replace(timing, **change),)).digest
        for change in ({}, {"p50_s": 1.01e-4}, {"source": "there"}, {"clock_hz": math.nan}, {"is_fallback": True})
    }
    assert len(digests) == 5
    assert all(digest.startswith("sha256:") for digest in digests)


def row(**changes: str) -> dict[str, str]:
    """A row of a file, as texts."""
    values = {"device": "toy", "runtime": "none 1.0", "kind": "conv2d", "batch": "1", "in_channels": "16"}
    values |= {"out_channels": "32", "kernel_size": "3x3", "stride": "1x1", "groups": "1", "in_size": "8x8"}
    values |= {"out_size": "8x8", "weight": "int8", "input": "uint8", "threads": "1", "p20_s": "1e-4"}
    values |= {"p50_s": "1.1e-4", "p80_s": "1.2e-4", "samples": "30", "kernel": "k", "is_fallback": "false"}
    return values | {"clock_hz": "", "source": ""} | changes


def write_csv(path: Path, *rows: dict[str, str]) -> Path:
    lines = [",".join(rows[0]), *(",".join(one.values()) for one in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_file_of_another_program_is_read(tmp_path: Path) -> None:
    swapped = dict(reversed(row(is_fallback="True", clock_hz="3.65e9").items()))  # columns in any order
    (timing,) = LookupTable.read(write_csv(tmp_path / "table.csv", swapped)).timings
    assert timing.site == CONV
    assert timing.precision == INT8
    assert (timing.p20_s, timing.is_fallback, timing.clock_hz) == (1e-4, True, 3.65e9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "conv2"}, r"kind: 'conv2' is none; did you mean 'conv2d'\?"),
        ({"batch": "0"}, r"batch: must be at least 1, got 0"),
        ({"batch": "1.0"}, r"batch: '1.0' is no whole number"),
        ({"kernel_size": "3"}, r"kernel_size: must be 2 sizes above 0, such as 3x3 for a conv2d, got '3'"),
        ({"kernel_size": "3*3"}, r"kernel_size: '3\*3' is no size such as 3x3"),
        ({"kind": "linear"}, r"kernel_size: must be empty for a linear, got '3x3'"),
        ({"groups": "3"}, r"groups: 3 do not divide 16 and 32 channels"),
        ({"weight": "int8x"}, r"weight: 'int8x' is no format; .*did you mean 'int8'\?"),
        ({"weight": "uint8-token"}, r"weight: uint8-token finds its scales at run time"),
        ({"input": "ternary"}, r"input: ternary is for weights"),
        ({"p20_s": "nan"}, r"p20_s: must be finite and above 0, got nan"),
        ({"p50_s": ""}, r"p50_s: must be finite and above 0, got nan"),
        ({"p50_s": "-1"}, r"p50_s: must be finite and above 0, got -1.0"),
        ({"p80_s": "inf"}, r"p80_s: must be finite and above 0, got inf"),
        ({"p50_s": "9"}, r"p50_s: must lie between p20_s and p80_s"),
        ({"p50_s": "fast"}, r"p50_s: 'fast' is no number"),
        ({"samples": "0"}, r"samples: must be at least 1, got 0"),
        ({"threads": "-1"}, r"threads: must be at least 1, got -1"),
        ({"is_fallback": "maybe"}, r"is_fallback: 'maybe' is neither true nor false"),
        ({"device": ""}, r"device: is empty"),
        ({"clock_hz": "0"}, r"clock_hz: must be finite and above 0, or empty"),
    ],
)
def test_wrong_values_are_named_by_file_line_and_column(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    path = write_csv(tmp_path / "table.csv", row(), row(**{"in_size": "9x9", **changes}))
    with pytest.raises(ValueError, match=rf"table\.csv, line 3: {message}"):
        LookupTable.read(path)


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with pytest.raises(ValueError, match=r"no column is called 'thread'; did you mean 'threads'\?"):
        LookupTable.read(write_csv(path, row(thread="1")))
    lacking = {name: value for name, value in row().items() if name not in ("kernel", "source")}
    with pytest.raises(ValueError, match="missing columns: kernel, source"):
        LookupTable.read(write_csv(path, lacking))
    path.write_text(f"{','.join(row())},batch\n{','.join(row().values())},1\n")
    with pytest.raises(ValueError, match="column 'batch' occurs twice"):
        LookupTable.read(path)
    path.write_text(f"{','.join(row())}\n1,2\n")
    with pytest.raises(ValueError, match="line 2: 2 values for 22 columns"):
        LookupTable.read(path)
    path.write_text("")
    with pytest.raises(ValueError, match="missing columns: device, runtime"):
        LookupTable.read(path)


def test_one_site_is_timed_once_on_one_device(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with pytest.raises(ValueError, match=r"line 3: site, weight, input and threads are those of line 2"):
        LookupTable.read(write_csv(path, row(), row(p20_s="1e-5")))
    with pytest.raises(ValueError, match=r"table\.csv: runtime: a table is of one, got none 1\.0, none 2\.0"):
        LookupTable.read(write_csv(path, row(), row(threads="2", runtime="none 2.0")))
    with pytest.raises(ValueError, match=r"timed twice: conv2d of batch 1, 16 to 32, kernel 3x3.* at int8/uint8"):
        LookupTable((timed(CONV), timed(CONV, p50_s=2e-4)))
    with pytest.raises(ValueError, match="kernel: must be one line"):
        timed(CONV, kernel="a\nb")


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in '\.txt'; a table ends in \.csv or \.parquet"):
        LookupTable(()).write(tmp_path / "table.txt")
    with pytest.raises(ValueError, match=r"cannot read table .*none\.csv"):
        LookupTable.read(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"cannot read table .*none\.parquet"):
        LookupTable.read(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("device")
    with pytest.raises(ValueError, match="is no Parquet file"):
        LookupTable.read(tmp_path / "text.parquet")
    (tmp_path / "table.csv").write_text("old")
    with pytest.raises(ValueError, match="empty; time something first"):
        Lookup(LookupTable(()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "text.parquet"], "nothing is left aside"


def test_find_is_exact() -> None:
    table = LookupTable((timed(CONV), timed(CONV, "float")))
    assert table.find(CONV, INT8, 1) is table.timings[0]
    assert table.find(CONV, INT8, 2) is None
    assert table.find(replace(CONV, batch=2), INT8, 1) is None
    assert table.find(CONV, Precision.parse("int8-channel/uint8"), 1) is None


# What networks cost


SIZES = (64, 96, 160, 256, 384)


def law(site: Site, precision: Precision) -> float:
    """Made-up seconds of a linear layer: smooth in its sizes, and not the roofline's."""
    return 2e-6 + (site.macs * (precision.weight.bits + 8)) ** 0.9 * 1e-11


def grid(precision: Precision = INT8, **more: Any) -> tuple[Timing, ...]:
    """Timings of linear layers by `law`."""
    found = [linear(1, inputs, outputs) for inputs, outputs in itertools.product(SIZES, repeat=2)]
    return tuple(timed(site, precision, law(site, precision), **more) for site in found)


def priced(model: Any, layer: Layer, precision: Precision | str, workload: Workload = ONE) -> Any:
    precision = Precision.parse(precision) if isinstance(precision, str) else precision
    return model.cost_table(Network((layer,)), {layer.name: (precision,)}, workload).layers[layer.name][precision]


@pytest.mark.parametrize("device", [None, TOY])
def test_exact_hit_is_what_was_measured(device: Any) -> None:
    model = Lookup(LookupTable((*grid(), timed(linear(1, 64, 65), INT8, 7.7e-5))), device)
    layer = fc("fc", 64, 65, calls=3, macs=3 * 64 * 65)
    found = priced(model, layer, INT8)
    assert found.cost.latency_s == 3 * 7.7e-5
    assert (found.tier, found.path) == ("measured", MEASURED)
    assert found.cost.weight_bytes == priced(StorageModel(), layer, INT8).cost.weight_bytes
    (known,) = model.find(layer, (INT8,), ONE)
    assert known is not None
    assert known.timing is model.table.timings[-1], "where the number comes from"


@pytest.mark.parametrize("device", [None, TOY])
def test_between_sites_utilisation_is_interpolated(device: Any) -> None:
    model = Lookup(LookupTable(grid()), device)
    layer = fc("fc", 120, 200)
    found = priced(model, layer, INT8)
    assert found.tier == "interpolated"
    assert found.path == "interpolated linear int8/uint8"
    assert found.cost.latency_s == pytest.approx(law(linear(1, 120, 200), INT8), rel=0.05)
    table = model.cost_table(Network((layer,)), {"fc": (INT8,)}, ONE)
    assert 0 < table.sigmas[found.path] < 0.3
    assert table.tiers["latency_s"] == ("interpolated" if device is None else "calibrated"), "as the device's launch is"


def test_a_table_of_one_number_of_threads_needs_no_other() -> None:
    table = Lookup(LookupTable(grid())).cost_table(Network((fc("fc", 120, 200),)), {"fc": (INT8,)}, Workload(threads=7))
    assert table.layers["fc"][INT8].tier == "interpolated"
    assert "timed with threads=1: set workload.threads to that" in table.warnings[0]


def test_groups_do_not_mix() -> None:
    """Depthwise convolutions are not interpolated from dense ones, nor other threads or precisions."""
    dense = [timed(replace(CONV, out_channels=n)) for n in (16, 32, 64, 128)]
    model = Lookup(LookupTable(tuple(dense)))
    shape = {"input_shape": (1, 16, 8, 8), "output_shape": (1, 16, 8, 8), "kernel": (3, 3), "stride": (1, 1)}
    depthwise = Layer("dw", "conv2d", weight_shape=(16, 1, 3, 3), macs=9 * 1024, groups=16, **shape)
    with pytest.raises(ValueError, match=r"layer dw: the table has no conv2d .* groups 16"):
        priced(model, depthwise, INT8)
    conv = Layer("conv", "conv2d", weight_shape=(16, 16, 3, 3), macs=9 * 16 * 1024, **shape)
    assert priced(model, conv, INT8).tier == "measured"
    several = Lookup(LookupTable((*dense, replace(dense[0], threads=4))))
    with pytest.raises(ValueError, match="threads=2"):
        priced(several, conv, INT8, Workload(threads=2))


def test_what_the_table_does_not_reach_is_refused_without_a_device() -> None:
    model = Lookup(LookupTable((*grid()[:5], timed(CONV, "float"))))
    message = (
        r"layer fc: the table has no linear of batch 1, 100 to 200, at int4/uint8 with threads=1; it has linear at "
        r"int8/uint8 with threads=1; nearest: linear of batch 1, 64 to \d+, at int8/uint8 .*; time it, or give a device"
    )
    with pytest.raises(ValueError, match=message):
        priced(model, fc("fc", 100, 200), INT4)
    gru = Layer("gru", "gru", weight_shape=(8, 8), macs=64)
    with pytest.raises(ValueError, match="it has conv2d, linear, no gru; time it"):
        priced(model, gru, INT8)
    assert model.refusal(fc("fc", 1, 1), INT8) is None
    assert (
        model.refusal(fc("fc", 1, 1), INT4)
        == "no linear was timed at int4/uint8; it has linear at int8/uint8 with threads=1"
    )
    assert "other operations" in model.cost_table(Network(()), {}, ONE).warnings[0]


def test_what_the_table_does_not_reach_is_the_devices_roofline() -> None:
    model, roofline = Lookup(LookupTable(grid()), TOY), Roofline(TOY)
    layers = fc("known", 64, 64), fc("between", 100, 100), fc("beyond", 64, 64)
    choices = {"known": (INT8,), "between": (INT8,), "beyond": (FLOAT,)}
    network = Network(layers)
    table, plain = (one.cost_table(network, choices, ONE) for one in (model, roofline))
    tiers = [table.layers[name][rows[0]].tier for name, rows in choices.items()]
    assert tiers == ["measured", "interpolated", "calibrated"]
    assert table.layers["beyond"][FLOAT] == plain.layers["beyond"][FLOAT]
    assert table.tiers["latency_s"] == "calibrated"
    assert table.fixed == plain.fixed
    assert "1 of 3 choices lie beyond the table" in table.warnings[0]
    assert "25 timings of toy (none 1.0), sha256:" in table.source
    energy = [one.layers["known"][INT8].cost for one in (table, plain)]
    idle = TOY.energy.idle_power.number
    more = (energy[0].latency_s - energy[1].latency_s) * idle
    assert energy[0].energy_j - energy[1].energy_j == pytest.approx(more, rel=1e-9)
    stranger = LookupTable((timed(linear(1, 64, 64), device="other"),))
    warnings = Lookup(stranger, TOY).cost_table(Network(layers[:1]), {"known": (INT8,)}, ONE).warnings
    assert warnings == ("the table was timed on other, the device is toy",)


def test_precisions_that_run_alike_share_timings() -> None:
    bare, with_device = Lookup(LookupTable(grid())), Lookup(LookupTable((*grid(), *grid(FLOAT))), TOY)
    layer = fc("fc", 64, 64)
    same = ("int8-channel/uint8", "int8-full/uint8-tensor")
    for name in same:
        assert priced(bare, layer, name).cost.latency_s == law(linear(1, 64, 64), INT8)
    for name in ("int4/uint8", "int8-channel/int8"):
        with pytest.raises(ValueError, match="the table has no linear"):
            priced(bare, layer, name)
    for name in (*same, "int4/uint8", "int8/int8"):  # held in 8 bits, computed as int8
        found = priced(with_device, layer, name)
        assert (found.tier, found.cost.latency_s) == ("measured", law(linear(1, 64, 64), INT8)), name
    assert priced(with_device, layer, "int4/uint8").support == "storage"
    fallen = priced(with_device, layer, "int2/int2")  # computed in fp32
    assert (fallen.tier, fallen.support, fallen.compute) == ("measured", "fallback", "fp32")
    assert fallen.cost.latency_s == law(linear(1, 64, 64), FLOAT)
    assert priced(with_device, layer, "int8/uint8-token").tier == "calibrated", "its scales are found at run time"
    exact = Lookup(LookupTable((*grid(), timed(linear(1, 64, 64), "int8/int8", 9e-5))), TOY)
    assert priced(exact, layer, "int8/int8").cost.latency_s == 9e-5, "a precision's own timing comes first"


def test_fallback_of_a_timing_is_told() -> None:
    site = linear(1, 64, 64)
    table = LookupTable((timed(site, INT8, is_fallback=True),))
    for device in (None, TOY):
        found = priced(Lookup(table, device), fc("fc", 64, 64), INT8)
        assert (found.support, found.compute) == ("fallback", "")


def test_refusals_are_the_devices_where_there_is_one() -> None:
    model = Lookup(LookupTable(grid()), TOY)
    depthwise = Layer("dw", "conv2d", weight_shape=(4, 1, 3, 3), groups=4)
    assert model.refusal(depthwise, INT8) == "depthwise convolutions have no integer kernel"


def test_devices_without_threads_take_the_tables() -> None:
    def single(rate: Any) -> Any:
        return rate[2]

    memory = tuple(replace(level, bandwidth=single(level.bandwidth)) for level in TOY.memory)
    compute = {name: replace(peak, peak=single(peak.peak)) for name, peak in TOY.compute.items()}
    model = Lookup(LookupTable(grid()), replace(TOY, memory=memory, compute=compute))
    assert priced(model, fc("fc", 64, 64), INT8, Workload(threads=2)).tier == "measured"
    assert priced(Lookup(LookupTable(grid()), TOY), fc("fc", 64, 64), INT8, Workload(threads=2)).tier == "calibrated"


def test_each_number_of_threads_is_interpolated_by_itself() -> None:
    two = (timed(t.site, t.precision, t.p50_s / (2 - t.site.in_channels / 400), threads=2) for t in grid())
    model, network = Lookup(LookupTable((*grid(), *two)), TOY), Network((fc("fc", 120, 200),))
    tables = {n: model.cost_table(network, {"fc": (INT8,)}, Workload(threads=n)) for n in (1, 2, 1)}
    (path,) = {table.layers["fc"][INT8].path for table in tables.values()}
    assert tables[1].sigmas[path] != tables[2].sigmas[path]
    assert tables[1].layers["fc"][INT8].cost.latency_s > tables[2].layers["fc"][INT8].cost.latency_s
    with pytest.raises(ValueError, match=r"figures for 1 to 2 threads, got workload\.threads=3"):
        priced(model, fc("fc", 64, 64), INT8, Workload(threads=3))


def test_sigma_is_the_spread_of_the_timings() -> None:
    sigma = 0.1
    rng = np.random.default_rng(0)
    timings = []
    for number in range(1, 50):
        draws = 1e-4 * np.exp(sigma * rng.standard_normal(1000))
        p20, p50, p80 = np.percentile(draws, [20, 50, 80])
        timings.append(timed(linear(1, number, 1), INT8, p50, p20_s=p20, p80_s=p80))
    assert timing_sigma(timings) == pytest.approx(sigma, rel=0.05)
    assert math.isnan(timing_sigma([timed(CONV, samples=1)]))
    model = Lookup(LookupTable(tuple(timings)))
    report = model.network_cost(Network((fc("fc", 3, 1),)), {"fc": INT8}, ONE)
    low, high = latency_interval(report)
    assert math.log(high / low) / (2 * 1.2816) == pytest.approx(timing_sigma(timings), rel=1e-3)
    assert math.erf(QUANTILE_80 / math.sqrt(2)) == pytest.approx(0.6)


# Tables by bits


@given(
    cycles=st.lists(st.integers(0, 2**40), min_size=24, max_size=24),
    is_float=st.booleans(),
)
def test_npy_round_trip(tmp_path_factory: pytest.TempPathFactory, cycles: list[int], is_float: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "table.npy"
    table = np.array(cycles).reshape(2, 3, 4) * (1e-9 if is_float else 1)
    write_haq_table(path, table)
    back = read_haq_table(path)
    assert back.dtype == table.dtype
    assert np.array_equal(back, table)


def test_files_that_are_no_tables_by_bits(tmp_path: Path) -> None:
    path = tmp_path / "table.npy"
    with pytest.raises(ValueError, match="cannot read table"):
        read_haq_table(path)
    path.write_text("text")
    with pytest.raises(ValueError, match=r"is no \.npy file of numbers"):
        read_haq_table(path)
    np.save(path, np.zeros((3, 8)))
    with pytest.raises(ValueError, match=r"holds float64 of shape \(3, 8\)"):
        read_haq_table(path)
    np.save(path, np.full((1, 2, 2), -1))
    with pytest.raises(ValueError, match="has -1 for layer 0 at 1 weight bits and 1 input bits"):
        read_haq_table(path)
    with pytest.raises(ValueError, match=r"ends in \.npy"):
        write_haq_table(tmp_path / "table.csv", np.ones((1, 1, 1)))


def two_layers() -> Network:
    return Network((fc("a", 64, 64), fc("b", 64, 256, quantizes_input=False)))


def test_any_models_latencies_become_a_table_by_bits(tmp_path: Path) -> None:
    network, model = two_layers(), Roofline(TOY)
    table = to_haq_table(model, network, ONE)
    assert table.shape == (2, 8, 8)
    assert table[0, 3, 7] == priced(model, network["a"], INT4).cost.latency_s
    assert (table[1] == table[1][:, :1]).all(), "its input stays in float"
    assert table[1, 3, 0] == priced(model, network["b"], "int4").cost.latency_s
    cycles = to_haq_table(model, network, ONE, clock_hz=1e9)
    assert cycles.dtype == np.int64
    assert np.abs(cycles - table * 1e9).max() <= 0.5
    path = tmp_path / "toy.npy"
    write_haq_table(path, table)
    alone, looked_up = Network(network.layers[:1]), BitTable(table[:1], batch=1)
    assert np.array_equal(to_haq_table(looked_up, alone, ONE), table[:1])
    assert BitTable(path, batch=1).name == "toy"
    with pytest.raises(ValueError, match="storage knows no latency"):
        to_haq_table(StorageModel(), network, ONE)


def test_bit_table_says_what_it_knows() -> None:
    network = Network((fc("a", 64, 64),))
    cycles = np.arange(1, 7).reshape(1, 2, 3)
    model = BitTable(cycles, batch=1, name="chip", clock_hz=2.0)
    found = priced(model, network["a"], "int2/uint3")
    assert found.cost.latency_s == 3.0
    assert (found.tier, found.path) == ("index", "chip")
    assert model.source.endswith("cycles at a clock of 2 Hz")
    assert BitTable(cycles, batch=1).source.endswith("cycles at a nominal clock of 1e+09 Hz")
    assert BitTable(cycles * 1.0, batch=1).unit_s == 1, "floats are seconds"
    for name in ("int3/uint3", "int2/uint4", "float", "int2-g32/uint3", "int2/uint3-token"):
        with pytest.raises(
            ValueError, match=f"layer a: {name}.* is not in the table, which has integers of 1 to 2 bits"
        ):
            priced(model, network["a"], name)
        assert model.refusal(network["a"], Precision.parse(name))
    with pytest.raises(ValueError, match="1 layers at batch 1, got 1 layers at batch 2"):
        priced(model, network["a"], "int2/uint3", Workload(batch=2))
    with pytest.raises(ValueError, match="clock_hz must be finite and above 0"):
        BitTable(cycles, batch=1, clock_hz=0.0)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_costs_of_any_model_as_a_file(tmp_path: Path, suffix: str) -> None:
    table = Roofline(TOY).cost_table(two_layers(), {"a": (INT8, INT4), "b": (FLOAT,)}, ONE)
    path = tmp_path / f"costs{suffix}"
    write_costs(path, table)
    rows = [one for _, one in read_rows(path, COST_COLUMNS)]
    assert [(one["layer"], one["weight"], one["input"]) for one in rows] == [
        ("a", "int8", "uint8"),
        ("a", "int4", "uint8"),
        ("b", "float", "float"),
    ]
    for one in rows:
        expected = table.layers[one["layer"]][Precision.parse(f"{one['weight']}/{one['input']}")]
        assert {cost: one[cost] for cost in COSTS} == asdict(expected.cost)
        assert (one["tier"], one["path"], one["support"]) == (expected.tier, expected.path, expected.support)


@needs_table
def test_a_quarter_of_haqs_table_gives_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    from experiments.cost_models.tables.interpolation import BITS, BOTH, LAYERS, QUARTER, Entries, draw, predict

    entries = Entries.of(read_haq_table(HAQ))
    assert len(entries.layers) == 31, "twins are left out"
    assert len(entries.latency) == 31 * 64
    known = draw(entries, QUARTER, seed=0)
    assert known.sum() == 31 * 16
    off = {way: np.abs(predict(entries, known, way) / entries.latency - 1)[~known] for way in (BOTH, BITS, LAYERS)}
    assert np.median(off[BOTH]) < 0.012
    assert (off[BOTH] < 0.2).mean() > 0.95
    assert off[BOTH].mean() < off[BITS].mean() < 0.1 * off[LAYERS].mean()


# The contract


def contract_timings(precisions: Sequence[str], threads: int = 2) -> tuple[Timing, ...]:
    """Timings around the sites of the contract's network."""
    dense = [Site("conv2d", b, 3, n, (3, 3), (1, 1), 1, (4, 4), (4, 4)) for b in (1, 2, 8, 16) for n in (4, 8, 16)]
    depthwise = [Site("conv2d", b, n, n, (3, 3), (1, 1), n, (4, 4), (4, 4)) for b in (1, 2, 8, 16) for n in (4, 8, 16)]
    full = [linear(b, 128, n) for b in (1, 2, 8, 16) for n in (4, 10, 40)]
    return tuple(
        timed(site, precision, 1e-6 + site.macs * (Precision.parse(precision).weight.bits + 1) * 1e-12, threads=threads)
        for site in (*dense, *depthwise, *full)
        for precision in precisions
    )


class TestLookup(CostModelContract):
    @pytest.fixture
    def cost_model(self) -> Lookup:
        return Lookup(LookupTable(contract_timings(self.precisions)))


class TestLookupWithDevice(CostModelContract):
    @pytest.fixture
    def cost_model(self) -> Lookup:
        timings = (timing for timing in contract_timings(("int8/uint8", "float")))
        return Lookup(LookupTable(tuple(replace(timing, device="zen5") for timing in timings)), "zen5")


def test_columns_are_those_agreed() -> None:
    assert list(COLUMNS) == list(row())
