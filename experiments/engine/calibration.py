"""How long does calibration take, in float passes over the same data?

    python experiments/engine/calibration.py

On ResNet-20 and 500 Fashion-MNIST training images (random ones where the data set is not installed), with one thread:
the pass that observes the inputs of all layers, and then their ranges in six formats, by every method. Each is timed
next to a float pass; the figures are medians over the repeats, the ratio the median of the ratios repeat by repeat.
"""

from __future__ import annotations

import csv
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from hwmodels import Format, Network
from search.errors import DataError
from search.quantize.fold import fold_batch_norm
from search.quantize.ranges import METHODS
from search.quantize.settings import QuantizerSettings
from search.quantize.simulate import QuantizedModel, exact_inference
from search.tasks.fashion_mnist import FashionMNIST
from search.trace import trace

HERE = Path(__file__).parent
FORMATS = [Format.parse(name) for name in ("uint2", "uint3", "uint4", "uint6", "uint8", "int8")]
REPEATS = 7


def calibration_images(task: FashionMNIST) -> Tensor:
    """The task's 500 calibration images, shape `(500, 1, 28, 28)`."""
    try:
        return torch.cat([images for images, _ in task.batches("calibration")])
    except DataError as error:
        print(f"random images: {error}")
        return torch.randn(500, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def measure(model: nn.Module, network: Network, images: Tensor, method: str) -> dict[str, str | float]:
    """Seconds of a float pass, of the observing pass and of finding all ranges, after a first round to warm up."""
    simulated = QuantizedModel(model, network, QuantizerSettings(input_range=method))
    layers = [layer.name for layer in network if layer.quantizes_input]
    rounds = []
    for _ in range(REPEATS + 1):
        times = [time.perf_counter()]
        with exact_inference():
            model(images)
        times.append(time.perf_counter())
        simulated.calibrate([images])
        times.append(time.perf_counter())
        for layer in layers:
            for format in FORMATS:
                simulated.input_range(layer, format)
        times.append(time.perf_counter())
        rounds.append([after - before for before, after in pairwise(times)])
    medians = [statistics.median(seconds) for seconds in zip(*rounds[1:], strict=True)]
    ratio = statistics.median((observe + ranges) / plain for plain, observe, ranges in rounds[1:])
    names = ("float_s", "observe_s", "ranges_s")
    figures = {name: round(seconds, 4) for name, seconds in zip(names, medians, strict=True)}
    return {"method": method, "ranges": len(layers) * len(FORMATS)} | figures | {"float_passes": round(ratio, 2)}


def main() -> None:
    """Measures, prints and writes the figures."""
    torch.set_num_threads(1)
    task = FashionMNIST()
    images = calibration_images(task)
    model = fold_batch_norm(task.model, images[:2]).model
    network = trace(model, images[:2])
    rows = []
    for method in METHODS:
        if method != "cross_entropy":
            rows.append(measure(model, network, images, method))
            print(rows[-1])
    with (HERE / "calibration.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
