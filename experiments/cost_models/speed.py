"""How long cost tables take, and importing `hwmodels`.

    python -m experiments.cost_models.speed

Prices 200 linear layers at 64 precisions each, 1 to 8 bits on either side, and imports the package in fresh processes.
Prints the fastest run and the median beside the limit, in milliseconds, and writes speed.csv next to this file. What
else the machine is busy with shows in the median, and less in the fastest.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hwmodels import CostModel, Format, Layer, Network, Precision, Roofline, Tensor, Workload, load_device
from hwmodels.base import Choices
from hwmodels.bitserial import BitSerial
from search.files import write_text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAYERS, SIDE = 200, 256
BITS = range(1, 9)
TABLE_LIMIT_MS, IMPORT_LIMIT_MS = 50, 150
REPEATS, NEW = 15, 5

MODELS: dict[str, Callable[[], CostModel]] = {
    "zen5": lambda: Roofline("zen5"),
    "zen5 of integers throughout": lambda: Roofline(replace(load_device("zen5"), operations="integer")),
    "haq": lambda: BitSerial("haq"),
}
"""A roofline between whose layers are floats, the same where they are integers, and an accelerator."""


def main() -> None:
    """Times everything."""
    took = {f"cost_table {name}, first": (first(make), TABLE_LIMIT_MS) for name, make in MODELS.items()}
    took |= {f"cost_table {name}": (repeated(make()), TABLE_LIMIT_MS) for name, make in MODELS.items()}
    took["import hwmodels"] = imports(), IMPORT_LIMIT_MS
    lines = ["what,fastest_ms,median_ms,limit_ms"]
    for what, (seconds, limit) in took.items():
        lines.append(f'"{what}",{1e3 * min(seconds):.1f},{1e3 * statistics.median(seconds):.1f},{limit}')
    write_text(HERE / "speed.csv", "\n".join(lines) + "\n")
    print("\n".join(lines))


def first(make: Callable[[], CostModel]) -> list[float]:
    """Seconds of the first table of a new model: what its device can do is found out on the way."""
    network = chain()
    choices = every_choice(network)
    models = [make() for _ in range(NEW)]
    return [_seconds(model, network, choices) for model in models]


def repeated(model: CostModel) -> list[float]:
    """Seconds of tables of a model that has made one before."""
    network = chain()
    choices = every_choice(network)
    return [_seconds(model, network, choices) for _ in range(REPEATS + 1)][1:]


def imports() -> list[float]:
    """Seconds of importing the package in fresh processes, which must leave torch out."""
    code = "import sys, hwmodels; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    took = []
    for _ in range(NEW):
        command = [sys.executable, "-X", "importtime", "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        (line,) = (line for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "hwmodels")
        took.append(int(line.split("|")[1]) / 1e6)
    return took


def chain() -> Network:
    """Linear layers, each reading what the one before it left."""
    shape = (1, SIDE)
    layers = tuple(
        Layer(
            f"layer{number}",
            "linear",
            (f"tensor{number}",),
            (f"tensor{number + 1}",),
            (SIDE, SIDE),
            macs=SIDE * SIDE,
            input_shape=shape,
            output_shape=shape,
        )
        for number in range(LAYERS)
    )
    makers = [None, *(layer.name for layer in layers)]
    readers = [*((layer.name,) for layer in layers), ()]
    names = [f"tensor{number}" for number in range(LAYERS + 1)]
    tensors = {
        name: Tensor(name, shape, maker, reader) for name, maker, reader in zip(names, makers, readers, strict=True)
    }
    return Network(layers, (), tensors, 0, tuple(layer.name for layer in layers), (names[-1],))


def every_choice(network: Network) -> Choices:
    """All pairs of a weight format and an input format of 1 to 8 bits."""
    weights, inputs = ([Format.parse(f"{kind}{bits}") for bits in BITS] for kind in ("int", "uint"))
    return {name: tuple(Precision(weight, read) for weight in weights for read in inputs) for name in network.names}


def _seconds(model: CostModel, network: Network, choices: Choices) -> float:
    start = time.perf_counter()
    model.cost_table(network, choices, Workload())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
