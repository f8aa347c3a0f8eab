"""Predicts AI Hub's latencies of networks that were left out of the fit.

    python -m experiments.cost_models.qualcomm [--trace] [--write-devices]

Reads aihub_latency.csv from BITPLAN_REFERENCE_DATA; writes the CSVs and figures of this folder and prints the tables of
its README. `--trace` counts the networks anew (features.csv), `--write-devices` writes the device files from the fit.
"""

from __future__ import annotations

import argparse

import pandas as pd

from search.files import replacing, write_text

from . import chips, features, figure
from .fit import Rates, fit
from .study import PREDICTORS, join, latency_errors, leave_one_out, ratio_errors, ratios
from .timings import CHIPS, RUNTIME, TABLE, digest, read_timings, spread

HERE = chips.HERE
OTHER_RUNTIMES = ("tflite", "onnx")


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", action="store_true", help="trace the networks and count them anew")
    parser.add_argument("--write-devices", action="store_true", help="write the device files from the fit")
    given = parser.parse_args()
    if given.trace:
        write(features.count_all(), "features")
    counted, timings = pd.read_csv(HERE / "features.csv"), read_timings()

    predicted, rates = [], {}
    for chip in CHIPS:
        for runtime in (RUNTIME, *OTHER_RUNTIMES):
            rows = join(timings, counted, chip, runtime)
            if rows.model.nunique() < 10:
                continue
            predicted.append(leave_one_out(rows).assign(chip=chip, runtime=runtime))
            if runtime == RUNTIME:
                rates[chip] = fit(rows)
    by_run = pd.concat(predicted, ignore_index=True).groupby(["chip", "runtime"], sort=False)
    latency = each(by_run, latency_errors)
    ratio = each(by_run, ratios)
    by_ratio = each(ratio.groupby(["chip", "runtime"], sort=False), ratio_errors)
    primary = pd.concat(predicted)[lambda rows: rows.runtime == RUNTIME]
    anchors = chips.read_anchors()
    tested = against_anchors(anchors, counted, rates)
    spreads = spread(timings)

    errors = {f"{name}_error": primary[f"{name}_s"] / primary.latency_s - 1 for name in PREDICTORS}
    write(primary[["chip", "model", "precision"]].assign(**errors), "errors")
    write(latency, "latency_errors")
    write(ratio[ratio.runtime == RUNTIME].drop(columns="runtime"), "ratios")
    write(by_ratio, "ratio_errors")
    write(spreads, "spread")
    write(parameters(rates), "parameters")
    write(tested, "anchor_errors")
    with replacing(HERE / "latencies.png") as aside:
        aside.write_bytes(figure.draw_latencies(primary, list(chips.SHIPPED)))
    pairs = [("8 Gen 3", "float/w8a8"), ("8 Elite", "float/w8a8"), ("8 Gen 3", "float/w8a16")]
    with replacing(HERE / "ratios.png") as aside:
        aside.write_bytes(figure.draw_ratios(ratio[ratio.runtime == RUNTIME], pairs))
    if given.write_devices:
        for chip in chips.SHIPPED.values():
            resting = chips.evidence(primary[primary.chip == chip.key])
            write_text(chips.file_of(chip), chips.render(chip, rates[chip.key], resting, digest(TABLE), anchors))
    for table in (latency, by_ratio, spreads):
        print(markdown(table[table.runtime == RUNTIME].drop(columns="runtime")), end="\n\n")
    print(markdown(tested))


def each(groups: object, measure: object) -> pd.DataFrame:
    """What `measure` makes of each chip and runtime, with these in front."""
    found = [measure(rows).assign(chip=chip, runtime=runtime) for (chip, runtime), rows in groups]  # type: ignore
    table = pd.concat(found, ignore_index=True)
    return table[["chip", "runtime", *[name for name in table if name not in ("chip", "runtime")]]]


def against_anchors(anchors: pd.DataFrame, counted: pd.DataFrame, rates: dict[str, Rates]) -> pd.DataFrame:
    """Relative errors on the networks that no fit has seen."""
    rows = anchors.merge(counted, on=["model", "precision"])
    found = []
    for chip, some in rows.groupby("chip", sort=False):
        some = some[some.precision.isin(rates[str(chip)].paths)]
        found.append(some.assign(error=rates[str(chip)].seconds(some) / some.latency_s - 1))
    return pd.concat(found)[["chip", "model", "precision", "latency_s", "error"]]


def parameters(rates: dict[str, Rates]) -> pd.DataFrame:
    """The fitted rates, a row per chip and precision."""
    rows = []
    for chip, one in rates.items():
        shared = {
            "launch_s": one.launch_s,
            "between_overhead_s": one.overhead_s,
            "between_bandwidth": one.bandwidth,
            "layer_bandwidth": one.layer_bandwidth,
        }
        rows += [{"chip": chip, "precision": name, **vars(path), **shared} for name, path in one.paths.items()]
    return pd.DataFrame(rows)


def write(table: pd.DataFrame, name: str) -> None:
    """Writes a table beside this file, four digits of each number."""
    with replacing(HERE / f"{name}.csv") as aside:
        table.to_csv(aside, index=False, float_format=None if name == "features" else "%.4g")


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown: shares in per cent, ratios with two digits."""
    percents = {"mape", "within_20", "sign", "error", "share_slower"} | ({"median"} if "mape" in table else set())
    lines = [" | ".join(table.columns), " | ".join("---" for _ in table.columns)]
    for record in table.to_dict("records"):
        cells = []
        for name, value in record.items():
            if isinstance(value, float):
                value = "" if value != value else f"{value:.0%}" if name in percents else f"{value:.3g}"
            cells.append(str(value))
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    main()
