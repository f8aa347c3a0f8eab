"""Tables of latency by layer, weight bits and input bits, as HAQ keeps them: arrays in a `.npy` file.

Shape `(layers, weight bits, input bits)`, both bits counted from 1, the layers in the order they run: a compact way to
hand one network's costs from one tool to another. The one that github.com/mit-han-lab/haq ships (MIT) is of MobileNetV2
at batch 16, integers of shape (53, 8, 8); their unit is nowhere stated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hwmodels.base import Choices, CostModel, fixed_storage, storage_columns
from hwmodels.cost import COSTS, CostTable, LayerCosts, Tier, Workload
from hwmodels.network import Layer, Network
from hwmodels.precision import FLOAT, Format, Precision
from hwmodels.table_file import replacing

LATENCY, ENERGY = COSTS.index("latency_s"), COSTS.index("energy_j")

NOMINAL_HZ = 1e9
"""Clock that cycles are turned into seconds with where none is given: good for ratios only."""

BITS = 8
"""Weight and input bits that HAQ's table goes up to."""


def read_haq_table(path: str | Path) -> np.ndarray:
    """Reads a table, shape `(layers, weight bits, input bits)`, integers (cycles) or floats (seconds).

    Raises:
        ValueError: If the file cannot be read or holds something else.
    """
    try:
        table = np.load(path, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"cannot read table {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no .npy file of numbers: {error}") from error
    if not isinstance(table, np.ndarray):
        raise ValueError(f"{path} holds several arrays; a table by bits is one")
    return check_haq_table(table, str(path))


def write_haq_table(path: str | Path, table: np.ndarray) -> None:
    """Writes a table to a `.npy` file: aside first, then renamed.

    Raises:
        ValueError: If it is no table by bits, or the path does not end in `.npy`.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"{path} ends in {path.suffix!r}; a table by bits ends in .npy")
    check_haq_table(table, "the table")
    with replacing(path) as aside, aside.open("wb") as file:
        np.save(file, table, allow_pickle=False)


def check_haq_table(table: np.ndarray, name: str) -> np.ndarray:
    """Returns the table if it is one: three axes, real numbers, finite and not negative.

    Raises:
        ValueError: If it is none; `name` says whose table in the message.
    """
    if table.ndim != 3 or 0 in table.shape or table.dtype.kind not in "iuf":
        raise ValueError(
            f"{name} holds {table.dtype} of shape {table.shape}; a table by bits is integers or floats of "
            "(layers, weight bits, input bits)"
        )
    wrong = ~(np.isfinite(table) & (table >= 0))
    if wrong.any():
        layer, weight, input_ = (int(axis[0]) for axis in np.nonzero(wrong))
        raise ValueError(
            f"{name} has {table[layer, weight, input_]} for layer {layer} at {weight + 1} weight bits and "
            f"{input_ + 1} input bits; latencies are finite and not negative"
        )
    return table


def to_haq_table(
    model: CostModel, network: Network, workload: Workload, bits: int = BITS, clock_hz: float | None = None
) -> np.ndarray:
    """Latency of every layer at `int1` to `intN` weights and `uint1` to `uintN` inputs, by any cost model.

    Layers that keep their input in float have the same latency at all input bits. What the format has no room for is
    left out: other operations, starting the network, conversions between layers.

    Args:
        model: What prices the layers.
        network: The network.
        workload: Its workload.
        bits: N.
        clock_hz: For cycles, rounded to integers as HAQ's are; None for seconds.

    Returns:
        Shape `(layers, bits, bits)`.

    Raises:
        ValueError: If the model cannot price one of the precisions, or knows no latency.
    """
    sides = [Format(one) for one in range(1, bits + 1)], [Format(one, signed=False) for one in range(1, bits + 1)]
    choices = {
        layer.name: [Precision(w, a) for w in sides[0] for a in (sides[1] if layer.quantizes_input else [FLOAT])]
        for layer in network
    }
    priced = model.cost_table(network, choices, workload)
    columns = [priced.layers[name].column("latency_s", precisions) for name, precisions in choices.items()]
    seconds = np.stack([np.broadcast_to(column.reshape(bits, -1), (bits, bits)) for column in columns])
    if np.isnan(seconds).any():
        raise ValueError(f"{model.name} knows no latency, so there is nothing to write; take a model of a device")
    return seconds if clock_hz is None else np.rint(seconds * clock_hz).astype(np.int64)


class BitTable(CostModel):
    """Looks up the latency of each layer in turn by the bits of its weights and inputs; counts the rest.

    It is the table of one network at one batch size. It knows static integers alone, so no float network: give
    `budget.reference=int8`. It knows no energy, and nothing of other operations, of threads, or of conversions.
    """

    def __init__(
        self,
        table: np.ndarray | str | Path,
        batch: int,
        name: str = "",
        clock_hz: float | None = None,
        tier: Tier = "index",
        source: str = "",
    ) -> None:
        """Takes a table, or the path of its `.npy` file.

        Args:
            table: Shape `(layers, weight bits, input bits)`; integers are cycles, floats are seconds.
            batch: The batch size it is of.
            name: What tables and plans call the target; by default the file's name.
            clock_hz: Clock that cycles count; None where not known, when a nominal one stands in: for ratios alone.
            tier: How far its latencies can be trusted; `index` is for a table whose unit or clock is not known.
            source: Where it comes from, in words.

        Raises:
            ValueError: If it is no such table, or the clock is not positive.
        """
        path = None if isinstance(table, np.ndarray) else Path(table)
        self.table = read_haq_table(path) if path else check_haq_table(np.asarray(table), name or "the table")
        self.batch, self.tier = batch, tier
        self.name = name or (path.stem if path else "bit table")
        self.source = source or (str(path) if path else "an array of latencies")
        if clock_hz is not None and not 0 < clock_hz < math.inf:
            raise ValueError(f"clock_hz must be finite and above 0, or null, got {clock_hz}")
        self.unit_s = 1.0
        if self.table.dtype.kind in "iu":
            clock = NOMINAL_HZ if clock_hz is None else clock_hz
            self.unit_s = 1 / clock
            self.source += f", cycles at a {'nominal ' if clock_hz is None else ''}clock of {clock:g} Hz"

    def refusal(self, layer: Layer, precision: Precision) -> str | None:
        sides = (precision.weight, precision.input)
        if all(
            side.is_static_integer and side.bits <= most for side, most in zip(sides, self.table.shape[1:], strict=True)
        ):
            return None
        _, weight_bits, input_bits = self.table.shape
        return (
            f"{precision} is not in the table, which has integers of 1 to {weight_bits} bits for weights "
            f"and of 1 to {input_bits} for inputs"
        )

    def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
        """Prices every choice of every layer.

        Raises:
            ValueError: If the network has another number of layers, the workload another batch, or the table lacks a
                precision.
        """
        if workload.batch != self.batch or len(network) != len(self.table):
            raise ValueError(
                f"the table is of a network of {len(self.table)} layers at batch {self.batch}, "
                f"got {len(network)} layers at batch {workload.batch}"
            )
        rows = {layer.name: row for layer, row in zip(network, self.table, strict=True)}
        layers = {
            name: self._layer(network[name], rows[name], precisions, workload) for name, precisions in choices.items()
        }
        tiers: dict[str, Tier] = {"weight_bytes": "exact", "activation_bytes": "exact", "bit_ops": "exact"}
        return CostTable(layers, fixed_storage(network), {"latency_s": self.tier, **tiers}, self.source)

    def _layer(self, layer: Layer, row: np.ndarray, precisions: Sequence[Precision], workload: Workload) -> LayerCosts:
        for precision in precisions:
            why = self.refusal(layer, precision)
            if why is not None:
                raise ValueError(f"layer {layer.name}: {why}")
        numbers = storage_columns(layer, precisions, workload)
        weight_bits = [precision.weight.bits - 1 for precision in precisions]
        input_bits = [precision.input.bits - 1 for precision in precisions]
        numbers[:, LATENCY] = row[weight_bits, input_bits] * self.unit_s
        numbers[:, ENERGY] = math.nan
        return LayerCosts(precisions, numbers, [("", "", self.name, self.tier, "")] * len(precisions))
