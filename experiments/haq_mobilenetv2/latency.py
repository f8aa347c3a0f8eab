"""HAQ's latency table of MobileNetV2 as a cost model, and what HAQ's published plan costs on it.

The table is `lib/simulator/lookup_tables/qmobilenetv2_imagenet100_batch16_latency_table.npy` of
github.com/mit-han-lab/haq (MIT): integers of shape (53 layers, 8 weight bits, 8 input bits), batch 16. Its unit is
nowhere stated; its numbers fit clock cycles of a bit-serial accelerator, and so they are called here.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hwmodels import CostModel, CostTable, Layer, Network, Precision, Workload
from hwmodels.base import Choices, fixed_storage, storage_cost
from hwmodels.cost import LayerCost, Tier
from search.errors import DataError
from search.policy import Policy

HERE = Path(__file__).parent
FILE = "haq_mobilenetv2_latency.npy"
SHAPE = (53, 8, 8)
BATCH = 16

CLOCK_HZ = 1e9
"""Nominal, for HAQ's is not published: a nanosecond stands for a cycle, and latencies are good for ratios only."""


class LatencyTable(CostModel):
    """Looks up the latency of each layer in turn, at batch 16, by the bits of its weights and inputs; counts the rest.

    Latencies are cycles of a simulator at a nominal clock, hence of tier `index`. It knows no energy and no float
    network: give `budget.reference=int8`.
    """

    name = "haq_mobilenetv2"

    def __init__(self, cycles: np.ndarray) -> None:
        """Creates the cost model.

        Args:
            cycles: Shape `(layers, weight bits, input bits)`, the bits counted from 1.
        """
        self.cycles = cycles

    def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
        if workload.batch != BATCH or len(network) != len(self.cycles):
            raise ValueError(
                f"the table is of a network of {len(self.cycles)} layers at batch {BATCH}, "
                f"got {len(network)} layers at batch {workload.batch}"
            )
        row = {layer.name: number for number, layer in enumerate(network)}
        layers = {
            name: {precision: self._price(network[name], row[name], precision, workload) for precision in precisions}
            for name, precisions in choices.items()
        }
        tiers: dict[str, Tier] = {"weight_bytes": "exact", "activation_bytes": "exact", "bit_ops": "exact"}
        source = f"github.com/mit-han-lab/haq, latency table of MobileNetV2, cycles at a nominal {CLOCK_HZ:g} Hz"
        return CostTable(layers, fixed_storage(network), {"latency_s": "index", **tiers}, source)

    def _price(self, layer: Layer, row: int, precision: Precision, workload: Workload) -> LayerCost:
        sides = (precision.weight, precision.input)
        if not all(side.is_static_integer and side.bits <= most for side, most in zip(sides, SHAPE[1:], strict=True)):
            raise ValueError(f"layer {layer.name}: {precision} is not in the table, which has integers of 1 to 8 bits")
        cycles = int(self.cycles[row, precision.weight.bits - 1, precision.input.bits - 1])
        counted = storage_cost(layer, precision, workload)
        return LayerCost(replace(counted, latency_s=cycles / CLOCK_HZ, energy_j=float("nan")), "bit-serial")


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
    cycles: np.ndarray = np.load(path)
    if cycles.shape != SHAPE or cycles.dtype.kind != "i":
        raise DataError(f"{path} holds {cycles.dtype} of shape {cycles.shape}; HAQ's table is integers of {SHAPE}")
    return cycles
