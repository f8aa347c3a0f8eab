"""Holds cost models against networks that were timed on this CPU; times nothing itself.

python -m experiments.cost_models.this_cpu [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from experiments.cost_models.this_cpu import figure
from experiments.cost_models.this_cpu.predict import HERE, path_errors, predict, summary
from search.files import replacing


def main() -> None:
    """Writes predictions, their summary, the errors of each path, and the figures."""
    parser = argparse.ArgumentParser(prog="experiments.cost_models.this_cpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for CSV files and figures; default: the study's")
    out = parser.parse_args().out
    whole, layers = predict(pd.read_csv(HERE / "measured.csv"))
    found = {"whole": whole, "layers": layers, "summary": summary(whole, layers), "paths": path_errors()}
    for name, table in found.items():
        with replacing(out / f"{name}.csv") as aside:
            table.to_csv(aside, index=False, float_format="%.4g", lineterminator="\n")
    for name, image in (("whole", figure.whole(whole)), ("layers", figure.layers(layers))):
        with replacing(out / f"{name}.png") as aside:
            aside.write_bytes(image)
    print(found["summary"].round(3).to_string(index=False))
    print(found["paths"].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
