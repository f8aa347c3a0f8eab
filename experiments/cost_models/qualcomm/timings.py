"""AI Hub's published latencies, and how their ratios spread over all networks."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[3]
REFERENCE = Path(os.environ.get("BITPLAN_REFERENCE_DATA", ROOT.parent / "shared" / "data"))
TABLE = REFERENCE / "aihub_latency.csv"
SOURCE = "github.com/quic/ai-hub-models at 52c080d, perf.yaml files (BSD-3)"

CHIPS = {
    "8 Gen 3": "Samsung Galaxy S24",
    "8 Elite": "Samsung Galaxy S25",
    "QCS6490": "Dragonwing RB3 Gen 2 Vision Kit",
    "8 Elite Gen 5": "Snapdragon 8 Elite Gen 5 QRD",
    "X Elite": "Snapdragon X Elite CRD",
    "QCS8550": "QCS8550 (Proxy)",
    "QCS9075": "Dragonwing IQ-9075 EVK",
}
"""Chip to the device that AI Hub times it in."""

PRECISIONS = {"w8a8": "int8/uint8", "w8a16": "int8/uint16", "float": "float/float"}
"""AI Hub's name to precision; `float` runs in fp16."""

PAIRS = (("float", "w8a8"), ("float", "w8a16"), ("w8a16", "w8a8"))
RUNTIME = "qnn_dlc"


def read_timings(path: Path = TABLE) -> pd.DataFrame:
    """Reads what ran on the NPU: columns `model, component, precision, chip, runtime, latency_s`."""
    rows = pd.read_csv(path)
    chips = {device: chip for chip, device in CHIPS.items()}
    rows = rows[(rows.compute_unit == "NPU") & rows.device.isin(chips) & rows.precision.isin(PRECISIONS)]
    rows = rows.assign(chip=rows.device.map(chips), latency_s=rows.latency_ms / 1e3)
    return rows[["model", "component", "precision", "chip", "runtime", "latency_s"]].reset_index(drop=True)


def digest(path: Path = TABLE) -> str:
    """`sha256:...` of the file."""
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def spread(timings: pd.DataFrame) -> pd.DataFrame:
    """Ratios of two precisions of the same network in the same runtime: median and quartiles per chip and pair."""
    index = ["chip", "runtime", "model", "component"]
    table = timings.pivot_table(index=index, columns="precision", values="latency_s", aggfunc="median")
    rows = []
    for slow, fast in PAIRS:
        ratios = (table[slow] / table[fast]).dropna()
        for name in CHIPS:
            of_chip = ratios[ratios.index.get_level_values("chip") == name]
            for runtime in (RUNTIME, "all"):
                some = of_chip if runtime == "all" else of_chip[of_chip.index.get_level_values("runtime") == runtime]
                if some.empty:
                    continue
                low, middle, high = some.quantile([0.25, 0.5, 0.75])
                slower = (some < 1).mean()  # the precision of fewer bits takes longer
                rows.append(
                    (name, runtime, f"{slow}/{fast}", len(some), middle, low, high, some.min(), some.max(), slower)
                )
    columns = ["chip", "runtime", "ratio", "pairs", "median", "q25", "q75", "least", "most", "share_slower"]
    return pd.DataFrame(rows, columns=columns)
