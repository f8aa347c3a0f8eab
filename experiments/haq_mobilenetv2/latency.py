"""HAQ's latency table of MobileNetV2 as a cost model, and what HAQ's published plan costs on it.

The table is `lib/simulator/lookup_tables/qmobilenetv2_imagenet100_batch16_latency_table.npy` of
github.com/mit-han-lab/haq (MIT): integers of shape (53 layers, 8 weight bits, 8 input bits), batch 16. Its unit is
nowhere stated; its numbers fit clock cycles of a bit-serial accelerator, and so they are called here.
HAQ's clock is not published either: cycles become seconds at a nominal one, hence of tier `index`, for ratios alone.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hwmodels import Network, Precision
from hwmodels.haq_table import BitTable, read_haq_table
from search.errors import DataError
from search.policy import Policy

HERE = Path(__file__).parent
FILE = "haq_mobilenetv2_latency.npy"
SHAPE = (53, 8, 8)
BATCH = 16


def cost_model(cycles: np.ndarray) -> BitTable:
    """The table as a cost model: it knows no energy and no float network, so give `budget.reference=int8`."""
    source = "github.com/mit-han-lab/haq, latency table of MobileNetV2"
    return BitTable(cycles, BATCH, "haq_mobilenetv2", source=source)


@dataclass(frozen=True)
class Published:
    """The plan that HAQ's README prints for a ratio of 0.6.

    Attributes:
        weights: Weight bits of every layer.
        inputs: Input bits of every layer; -1 for the first one, whose input HAQ leaves as it is.
    """

    weights: tuple[int, ...]
    inputs: tuple[int, ...]

    @classmethod
    def load(cls) -> Published:
        """Reads `published.json`."""
        strategy = json.loads((HERE / "published.json").read_text())["strategy"]
        return cls(*zip(*strategy, strict=True))

    def policy(self, network: Network) -> Policy:
        """The plan as a policy; images have 8 bits, and so has the first input."""
        pairs = zip(network.names, self.weights, self.inputs, strict=True)
        return Policy({name: Precision.parse(f"int{w}/uint{8 if i < 0 else i}") for name, w, i in pairs})

    def cycles_as_coded(self, cycles: np.ndarray) -> int:
        """What HAQ's code makes of it: the first input's -1 becomes the index -2, the entry of 7 bits."""
        return sum(int(row[w - 1, i - 1]) for row, w, i in zip(cycles, self.weights, self.inputs, strict=True))


def table_path(given: Path | None) -> Path:
    """Where the table is: as given, else in the folder that `BITPLAN_REFERENCE_DATA` names.

    Raises:
        DataError: If there is none.
    """
    folder = os.environ.get("BITPLAN_REFERENCE_DATA")
    path = given or (Path(folder) / FILE if folder else None)
    if path is None or not path.is_file():
        raise DataError(
            f"HAQ's latency table is not at {path}; get lib/simulator/lookup_tables/"
            "qmobilenetv2_imagenet100_batch16_latency_table.npy from github.com/mit-han-lab/haq and give --table PATH, "
            f"or set BITPLAN_REFERENCE_DATA to a folder that holds it as {FILE}"
        )
    return path


def load_cycles(path: Path) -> np.ndarray:
    """Reads the table.

    Raises:
        DataError: If the file holds another one.
    """
    try:
        cycles = read_haq_table(path)
    except ValueError as error:
        raise DataError(str(error)) from error
    if cycles.shape != SHAPE or cycles.dtype.kind != "i":
        raise DataError(f"{path} holds {cycles.dtype} of shape {cycles.shape}; HAQ's table is integers of {SHAPE}")
    return cycles
