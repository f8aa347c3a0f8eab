"""How much slower is a simulated quantized forward pass than the folded float one, and how long does applying take?

    python experiments/engine/forward.py

Times both passes on ResNet-20 at batch 500, interleaved, and writes forward.csv: median seconds of each and the median
of the ratios pair by pair, with the memory of quantized inputs reused, as a search does, and not, as `plan.apply`
returns it.
Then apply.csv: milliseconds of applying a policy that differs from the last one in one layer, weights quantized before.
Weights are untrained: time does not depend on them.
"""

from __future__ import annotations

import copy
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from hwmodels import Precision
from search.policy import Policy
from search.quantize.fold import fold_batch_norm
from search.quantize.simulate import QuantizedModel, exact_inference
from search.tasks.networks import resnet20
from search.trace import trace

HERE = Path(__file__).parent
BATCH, PAIRS, WARM_UP = 500, 11, 2


def timed(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Seconds of one forward pass."""
    started = time.perf_counter()
    model(images)
    return time.perf_counter() - started


def compare(policy: str, reuse_memory: bool) -> dict[str, Any]:
    """Times one policy against the float network."""
    images = torch.randn(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    plain = fold_batch_norm(resnet20(), images[:2]).model
    network = trace(plain, images[:2])
    simulated = QuantizedModel(copy.deepcopy(plain), network, reuse_memory=reuse_memory)
    simulated.calibrate([images])
    quantized = simulated.apply(Policy.uniform(network, Precision.parse(policy)))
    with exact_inference():
        pairs = [(timed(plain, images), timed(quantized, images)) for _ in range(PAIRS + WARM_UP)][WARM_UP:]
    float_s, quantized_s = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(after / before for before, after in pairs)
    row = {"policy": policy, "reuse_memory": reuse_memory}
    return row | {"float_s": round(float_s, 4), "quantized_s": round(quantized_s, 4), "ratio": round(ratio, 3)}


def apply_one_layer(repeats: int = 200) -> list[dict[str, Any]]:
    """Times applying policies that differ in one layer's weight, or in its weight and input."""
    images = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    plain = fold_batch_norm(resnet20(), images[:2]).model
    network = trace(plain, images[:2])
    simulated = QuantizedModel(plain, network)
    simulated.calibrate([images])
    base = dict(Policy.uniform(network, Precision.parse("int8/uint8")))
    rows = []
    for changed in ("int4/uint8", "int4/uint4"):
        other = base | {network.names[len(network) // 2]: Precision.parse(changed)}
        simulated.apply(other)
        seconds = []
        for index in range(2 * repeats):
            started = time.perf_counter()
            simulated.apply(other if index % 2 else base)
            seconds.append(time.perf_counter() - started)
        row = {"changes": f"int8/uint8 to {changed}", "median_ms": round(1e3 * statistics.median(seconds), 4)}
        rows.append(row | {"worst_ms": round(1e3 * max(seconds), 4)})
    return rows


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows and writes them as CSV."""
    for row in rows:
        print(row, flush=True)
    with (HERE / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Measures, prints and writes the figures."""
    torch.manual_seed(0)
    write("apply.csv", apply_one_layer())
    policies = ("int8/uint8", "int4/uint8", "int4/uint4", "int4/float")
    write("forward.csv", [compare(policy, reuse) for policy in policies for reuse in (True, False)])


if __name__ == "__main__":
    main()
