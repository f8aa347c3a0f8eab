"""The networks of the study, their layers tied into a few units, so that every policy can be measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hwmodels import Network, StorageModel, Workload
from search.pricing import Pricing
from search.quantize.fold import fold_batch_norm
from search.quantize.settings import QuantizerSettings
from search.quantize.simulate import QuantizedModel
from search.space import SearchSpace, build_space
from search.tasks.digits import Digits
from search.tasks.fashion_mnist import FashionMNIST
from search.tasks.task import Task
from search.trace import trace

WEIGHTS = ("int2", "int4", "int8")
INPUT = "uint8"
NETWORKS: dict[str, tuple[Callable[[], Task], int]] = {"resnet20": (FashionMNIST, 7), "digits": (Digits, 4)}
"""Task and number of units by name; digits is for trying things out."""


@dataclass(frozen=True)
class Bench:
    """A calibrated network whose space is small enough to be measured whole.

    Attributes:
        name: Its key in `NETWORKS`.
        task: The task.
        network: Its layers.
        space: Weights of every unit in one of `WEIGHTS`, inputs in `INPUT`.
        pricing: Bits and bytes of its policies.
        simulated: The simulated network.
    """

    name: str
    task: Task
    network: Network
    space: SearchSpace
    pricing: Pricing
    simulated: QuantizedModel


def make_bench(name: str, repair: str) -> Bench:
    """Folds, traces and calibrates a network.

    Args:
        name: A key of `NETWORKS`.
        repair: What applying a choice repairs, `QuantizerSettings.repair`.
    """
    make, count = NETWORKS[name]
    task = make()
    folded = fold_batch_norm(task.model, task.example_input)
    network = trace(folded.model, task.example_input)
    space = build_space(network, WEIGHTS, [INPUT], ties=equal_compute(network, count))
    simulated = QuantizedModel(folded.model, network, QuantizerSettings(repair=repair), reuse_memory=True)
    simulated.calibrate(task.inputs(batch) for batch in task.batches("calibration"))
    return Bench(name, task, network, space, Pricing(network, space, StorageModel(), Workload()), simulated)


def equal_compute(network: Network, count: int) -> list[list[str]]:
    """Cuts the layers, in execution order, into `count` runs of about equal compute."""
    total, done = sum(layer.macs for layer in network), 0.0
    runs: list[list[str]] = [[] for _ in range(count)]
    for layer in network:
        middle = done + layer.macs / 2
        runs[min(int(count * middle / total), count - 1)].append(layer.name)
        done += layer.macs
    return runs
