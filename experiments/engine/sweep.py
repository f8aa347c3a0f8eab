"""What does a sweep over all single choices cost, in the full forward passes it stands for?

    python experiments/engine/sweep.py

Scores every layer of ResNet-20 in six weight formats on 500 Fashion-MNIST training images (random ones where the data
set is not installed), as the sensitivity table does: choices after the same prefix share it. Every choice is timed next
to a full pass with the same choice, in seconds of one thread's processor time, and both must return the same bits.
Weights are quantized before. What the sweep needs besides, trying out and recording the float network, counts with the
choice that it is needed for.

Writes sweep.csv, one row per layer and one for all. `--layers 6` takes every so manieth layer only, for a quick look.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwmodels import Format, Precision
from search.errors import DataError
from search.quantize.fold import fold_batch_norm
from search.quantize.prefix import PrefixRunner
from search.quantize.simulate import QuantizedModel
from search.tasks.fashion_mnist import FashionMNIST
from search.tasks.task import Task
from search.trace import trace

HERE = Path(__file__).parent
FORMATS = [Format.parse(name) for name in ("int2", "int3", "int4", "int5", "int6", "int8")]


def calibration_batches(task: Task) -> list[Any]:
    """The task's calibration batches, or random images of the same shape."""
    try:
        return list(task.batches("calibration"))
    except DataError as error:
        print(f"random images: {error}")
        generator = torch.Generator().manual_seed(0)
        return [(torch.randn(500, 1, 28, 28, generator=generator), torch.zeros(500, dtype=torch.int64))]


def measure(task: Task, most_layers: int | None) -> tuple[list[dict[str, Any]], int]:
    """Times every choice both ways, by layer; also returns the bytes that recordings took at most."""
    batches = calibration_batches(task)
    example = task.inputs(batches[0])[:2]
    folded = fold_batch_norm(task.model, example)
    network = trace(folded.model, example)
    simulated = QuantizedModel(folded.model, network, reuse_memory=True)
    simulated.calibrate(task.inputs(batch) for batch in batches)
    names = network.names[:: -(-len(network) // (most_layers or len(network)))]
    choices = [(name, format) for name in names for format in FORMATS]
    policies = [{name: Precision(format)} for name, format in choices]

    runner = PrefixRunner(simulated, task, batches)
    for policy in policies:
        simulated.apply(policy)
    runner.run({}, keep)

    seconds = defaultdict(lambda: [0.0, 0.0])
    sweep = runner.sweep(policies, keep)
    for _ in policies:
        started = time.process_time()
        index, outputs = next(sweep)
        swept = time.process_time()
        expected = runner.run(policies[index], keep)
        ended = time.process_time()
        assert all(map(torch.equal, outputs, expected)), choices[index]
        seconds[choices[index][0]][0] += ended - swept
        seconds[choices[index][0]][1] += swept - started
    assert runner.trouble is None, runner.trouble
    total = [sum(times) for times in zip(*seconds.values(), strict=True)]
    seconds[f"all {len(names)} layers"] = total
    rows = [
        {
            "layer": layer,
            "choices": len(policies) if times is total else len(FORMATS),
            "full_s": round(times[0], 3),
            "swept_s": round(times[1], 3),
            "ratio": round(times[1] / times[0], 3),
        }
        for layer, times in seconds.items()
    ]
    return rows, runner.peak_bytes


def keep(outputs: Tensor, batch: int) -> Tensor:
    return outputs


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="at most so many layers, evenly spread; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, peak_bytes = measure(FashionMNIST(), options.layers)
    for row in rows:
        print(row)
    print(f"recordings took {peak_bytes / 1e6:.0f} MB")
    if not options.layers:
        with (HERE / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
