"""What both tools are given, and how their plans are written down: the network, the data, the budgets, the counting."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from search.tasks.fashion_mnist import FashionMNIST

HERE = Path(__file__).parent
BUDGETS = (2.5, 3.0, 3.5, 4.0, 5.0)  # nominal bits per weight, averaged over all weights of all layers
BITS = (2, 4, 8)  # what a layer's weights may have
INPUT_BITS = 8
REPORT_SAMPLES = 2000  # the first images of the report split
CALIBRATION_BATCH = 100
COLUMNS = [
    "tool",
    "variant",
    "budget",
    "average_weight_bits",
    "seconds",
    "processor_seconds",
    "accuracy",
    "accuracy_without_bias_correction",
]


class Subject(NamedTuple):
    """What a tool quantizes: the trained network as it is (batch norm not folded), and the data it may see."""

    task: FashionMNIST
    model: nn.Module
    calibration: list[tuple[Tensor, Tensor]]
    report: tuple[Tensor, Tensor]

    def accuracy(self, model: Callable[[Tensor], Tensor]) -> float:
        """Returns top-1 accuracy on the first `REPORT_SAMPLES` images of the report split."""
        images, labels = self.report
        with torch.no_grad():
            guesses = torch.cat([model(batch).argmax(-1) for batch in torch.split(images, 500)])
        return round((guesses == labels).double().mean().item(), 6)


def subject() -> Subject:
    """Returns ResNet-20 on Fashion-MNIST with its 500 calibration images, in one thread."""
    torch.set_num_threads(1)
    task = FashionMNIST("resnet20")
    images, labels = task.load("calibration")
    batches = zip(torch.split(images, CALIBRATION_BATCH), torch.split(labels, CALIBRATION_BATCH), strict=True)
    images, labels = task.load("report")
    return Subject(task, task.model, list(batches), (images[:REPORT_SAMPLES], labels[:REPORT_SAMPLES]))


def weight_counts(model: nn.Module) -> dict[str, int]:
    """Returns the number of weights of every convolution and linear layer by module name; biases do not count."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {name: layer.weight.numel() for name, layer in layers.items()}


def average_bits(bits: Mapping[str, int], counts: Mapping[str, int]) -> float:
    """Returns nominal bits per weight; `bits` must name exactly the layers of `counts`.

    Raises:
        ValueError: If a layer is missing or unknown, or has bits that were not offered.
    """
    if bits.keys() != counts.keys() or not set(bits.values()) <= set(BITS):
        raise ValueError(f"a plan must give each of {sorted(counts)} one of {BITS} bits, got {dict(bits)}")
    return sum(bits[name] * count for name, count in counts.items()) / sum(counts.values())


def plan(
    variant: str, budget: float, bits: Mapping[str, int], counts: Mapping[str, int], **facts: Any
) -> dict[str, Any]:
    """Returns one record of the result file.

    Raises:
        ValueError: If the plan is over budget by our count.
    """
    average = average_bits(bits, counts)
    if average > budget:
        raise ValueError(f"{variant} overshot {budget} bits per weight: {average}")
    weight_bits = {name: bits[name] for name in counts}
    return {"variant": variant, "budget": budget, "average_weight_bits": average, **facts, "weight_bits": weight_bits}


def seconds_since(wall: float, processor: float) -> dict[str, float]:
    """Returns wall-clock seconds, and those of one processor core, which count nobody else's work."""
    now = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
    return {name: round(value, 2) for name, value in now.items()}


def write(tool: str, version: str, given: Subject, settings: Mapping[str, Any], plans: list[dict[str, Any]]) -> None:
    """Writes `{tool}.json`, and plans.csv anew from the result files of all tools that are there."""
    result = {
        "tool": tool,
        "version": version,
        "torch": torch.__version__,
        "task": given.task.name,
        "task_fingerprint": given.task.fingerprint,
        "report_samples": REPORT_SAMPLES,
        "float_accuracy": given.accuracy(given.model),
        "settings": settings,
        "plans": plans,
    }
    (HERE / f"{tool}.json").write_text(json.dumps(result, indent=1) + "\n")
    results = [json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))]
    with (HERE / "plans.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for other in results:
            table.writerows({"tool": other["tool"], **found} for found in other["plans"])
