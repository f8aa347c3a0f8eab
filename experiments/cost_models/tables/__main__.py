"""HAQ's latency table of MobileNetV2, interpolated from a part of its own entries.

    python -m experiments.cost_models.tables [--table PATH]

Writes errors.csv, layers.csv and interpolation.png, and prints the table of the README.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.cost_models.tables.figure import draw
from experiments.cost_models.tables.interpolation import (
    ALL,
    BITS,
    BOTH,
    LAYERS,
    QUARTER,
    SECONDS,
    Entries,
    error_table,
    layer_table,
    one_bit_share,
    plan_errors,
)
from experiments.haq_mobilenetv2.latency import load_cycles, table_path
from search.errors import BitplanError
from search.files import replacing, write_text

HERE = Path(__file__).parent


def summary(entries: Entries, cycles: np.ndarray, errors: pd.DataFrame) -> str:
    """The table of the README: means over seeds with a quarter of the entries known."""
    kinds = list(dict.fromkeys(entries.kind.tolist()))
    lines = [
        f"| read from | median | mean | 90% below | within 20% | {' | '.join(kinds)} | whole plans, median |",
        "|" + "---|" * (6 + len(kinds)),
    ]
    quarter = errors[errors["known"] == QUARTER].drop(columns="seed").groupby(["from", "kind"]).mean()
    for way in (BOTH, BITS, LAYERS, SECONDS):
        found = quarter.loc[way]
        columns = [f"{found.loc[ALL, name]:.1%}" for name in ("median", "mean", "p90", "within_20")]
        columns += [f"{found.loc[kind, 'median']:.1%}, {found.loc[kind, 'mean']:.1%}" for kind in kinds]
        plans = np.median(list(plan_errors(entries, cycles, way)))
        lines.append(f"| {way} | {' | '.join(columns)} | {plans:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="HAQ's .npy; by default in the folder BITPLAN_REFERENCE_DATA names")
    options = parser.parse_args()
    try:
        cycles = load_cycles(table_path(options.table))
    except BitplanError as error:
        parser.error(str(error))
    entries = Entries.of(cycles)
    errors, layers = error_table(entries), layer_table(entries)
    write_text(HERE / "errors.csv", errors.to_csv(index=False, lineterminator="\n"))
    write_text(HERE / "layers.csv", layers.to_csv(index=False, lineterminator="\n"))
    with replacing(HERE / "interpolation.png") as aside:
        aside.write_bytes(draw(errors, layers))
    print(f"{len(entries.layers)} layers of different shape, {len(entries.latency)} entries")
    print(summary(entries, cycles, errors))
    of_all, of_tail = one_bit_share(entries)
    print(f"1 bit on a side: {of_all:.0%} of the entries, {of_tail:.0%} of those off by more than 20%")


if __name__ == "__main__":
    main()
