"""Predicts public tables of measured matrix products three ways, and writes how far off each is.

python -m experiments.cost_models.gemm --data FOLDER [--peaks FILE] [--out FOLDER] [--write-devices]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pandas as pd

from experiments.cost_models.gemm import figure, summary
from experiments.cost_models.gemm.predict import Predictions, predict
from experiments.cost_models.gemm.tables import PATHS, Table, read_table, table_files
from hwmodels.calibration_file import calibrate_file
from hwmodels.device import FOLDER
from search.files import replacing

HERE = Path(__file__).parent
DATA = Path(os.environ.get("BITPLAN_REFERENCE_DATA", HERE.parents[3] / "shared" / "data")) / "gemm"
SUMMARIES = {
    "paths": summary.path_errors,
    "pairs": summary.pair_errors,
    "parameters": summary.parameters,
    "few": summary.few_errors,
}


def main() -> None:
    """Reads the command line and runs the study, one table after the other."""
    parser = argparse.ArgumentParser(prog="experiments.cost_models.gemm", description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of *.parquet tables, or one of them")
    parser.add_argument("--peaks", type=Path, help="YAML: a device file, or compute and bandwidth, for all tables read")
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder for CSV files and figures (default: the study's)"
    )
    parser.add_argument("--write-devices", action="store_true", help="write the fits into the shipped device files")
    given = parser.parse_args()
    done = []
    for file in table_files(given.data):
        table = read_table(file, given.peaks)
        for name in table.skipped:
            print(f"{table.name}: nothing is known about {name}, left out")
        if given.write_devices and table.device is None:
            raise ValueError(f"no shipped device is what {table.name} was timed on: leave out --write-devices")
        print(f"{table.name}: {len(table.rows)} timings, peaks of {table.peaks.name}", flush=True)
        done.append(predict(table))
        if given.write_devices:
            write_device(done[-1])
    write(done, given.out)


def write(done: list[Predictions], folder: Path) -> None:
    """Writes the study's CSV files and figures."""
    frames = {name: pd.concat([make(found) for found in done], ignore_index=True) for name, make in SUMMARIES.items()}
    for name, frame in frames.items():
        with replacing(folder / f"{name}.csv") as aside:
            frame.to_csv(aside, index=False, float_format="%.4g")
    pictures = {"scatter": figure.scatter(done), "signs": figure.signs(frames["pairs"])}
    for name, picture in pictures.items():
        with replacing(folder / f"{name}.png") as aside:
            aside.write_bytes(picture)
    wide = frames["paths"].pivot(index=["table", "format"], columns="model", values="median")
    print(wide[["raw", "calibrated", "interpolated"]].map("{:.1%}".format).to_string())


def write_device(found: Predictions) -> None:
    """Writes the fits of a table into the device file that it is named after."""
    table = found.table
    fits = {PATHS[name].path: fit for name, fit in found.fits.items()}
    calibrate_file(FOLDER / f"{table.device}.yaml", fits, table.digest, source_of(table))


def source_of(table: Table) -> str:
    """What a device file says its calibration was fitted to."""
    return f"fitted to {table.name} of github.com/ai-dynamo/aiconfigurator (Apache-2.0)"


if __name__ == "__main__":
    main()
