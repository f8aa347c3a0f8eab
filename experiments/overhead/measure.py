"""How much slower is a simulated quantized forward pass than the folded float one?

    python experiments/overhead/measure.py

Times both on ResNet-20 at batch 500, interleaved in one run, and writes overhead.csv: median seconds of each and the
median of the ratios pair by pair. Weights are untrained: time does not depend on them.
"""

from __future__ import annotations

import csv
import statistics
import time
from pathlib import Path

import torch

from hwmodels import Precision
from search.policy import Policy
from search.quantize.fold import fold_batch_norm
from search.quantize.simulate import QuantizedModel, exact_inference
from search.tasks.networks import resnet20
from search.trace import trace

HERE = Path(__file__).parent
BATCH, PAIRS, WARM_UP = 500, 15, 3


def timed(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Seconds of one forward pass."""
    started = time.perf_counter()
    model(images)
    return time.perf_counter() - started


def main() -> None:
    """Measures, prints and writes the figures."""
    torch.manual_seed(0)
    images = torch.randn(BATCH, 1, 28, 28)
    folded = fold_batch_norm(resnet20(), images[:2]).model
    network = trace(folded, images[:2])
    copy = fold_batch_norm(resnet20(), images[:2]).model
    quantized = QuantizedModel(copy, network, reuse_memory=True)
    quantized.calibrate([images])
    rows = []
    for name in ("int8/uint8", "int4/uint4", "int4/float"):
        model = quantized.apply(Policy.uniform(network, Precision.parse(name)))
        with exact_inference():
            pairs = [(timed(folded, images), timed(model, images)) for _ in range(PAIRS + WARM_UP)][WARM_UP:]
        ratio = statistics.median(simulated / plain for plain, simulated in pairs)
        plain, simulated = (statistics.median(times) for times in zip(*pairs, strict=True))
        rows.append(
            {"policy": name, "float_s": round(plain, 4), "quantized_s": round(simulated, 4), "ratio": round(ratio, 3)}
        )
        print(f"{name}: float {plain:.3f} s, quantized {simulated:.3f} s, ratio {ratio:.3f}")
    with (HERE / "overhead.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
