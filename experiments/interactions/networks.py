"""The networks of the study, calibrated, and their search spaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hwmodels import Network, StorageModel, Workload
from search.pricing import Pricing
from search.quantize.fold import fold_batch_norm
from search.quantize.settings import QuantizerSettings
from search.quantize.simulate import QuantizedModel
from search.space import SearchSpace, build_space
from search.tasks.classification import Labelled
from search.tasks.digits import Digits
from search.tasks.fashion_mnist import FashionMNIST
from search.tasks.task import Task
from search.tasks.text import Text
from search.trace import shared_parameters, trace

RUNS = Path(__file__).parent / "runs"
WIDE = (("int2", "int3", "int4", "int5", "int6", "int8"), ("uint4", "uint6", "uint8"))
"""Weight and input formats that policies are drawn from."""

NARROW = (("int2", "int4", "int8"), ("uint8",))
"""Weight and input formats that plans are made of."""


class NoisedDigits(Digits):
    """Digits, a fifth of the calibration images noised."""

    def load(self, split: str) -> Labelled:
        return noised(super().load(split)) if split == "calibration" else super().load(split)


class NoisedFashionMNIST(FashionMNIST):
    """Fashion-MNIST, a fifth of the calibration images noised."""

    def load(self, split: str) -> Labelled:
        return noised(super().load(split)) if split == "calibration" else super().load(split)


def noised(data: Labelled) -> Labelled:
    """Adds Gaussian noise to every fifth image, as strong as the images' own spread."""
    images, labels = data
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * images.std()
    noise[torch.arange(len(images)) % 5 > 0] = 0
    return images + noise, labels


NETWORKS: dict[str, Callable[[], Task]] = {
    "digits": Digits,
    "resnet20": lambda: FashionMNIST("resnet20"),
    "mobilenetv2": lambda: FashionMNIST("mobilenetv2"),
    "text": Text,
    "digits_noised": NoisedDigits,
    "resnet20_noised": lambda: NoisedFashionMNIST("resnet20"),
}


@dataclass(frozen=True)
class Bench:
    """A calibrated network.

    Attributes:
        name: Its key in `NETWORKS`.
        task: The task.
        network: Its layers.
        simulated: The simulated network.
    """

    name: str
    task: Task
    network: Network
    simulated: QuantizedModel

    @property
    def label(self) -> str:
        """Name of the network and of the repair in the loop, for files."""
        repair = self.simulated.settings.repair
        return self.name if repair == "none" else f"{self.name}_{repair}"

    def space(self, formats: tuple[Sequence[str], Sequence[str]]) -> SearchSpace:
        """The space of some weight and input formats."""
        return build_space(self.network, *formats, ties=shared_parameters(self.simulated.model, self.network))

    def pricing(self, space: SearchSpace) -> Pricing:
        """Bits and bytes of the space's policies."""
        return Pricing(self.network, space, StorageModel(), Workload())


def make_bench(name: str, repair: str = "none") -> Bench:
    """Folds, traces and calibrates a network.

    Args:
        name: A key of `NETWORKS`.
        repair: What applying a choice repairs, `QuantizerSettings.repair`.
    """
    task = NETWORKS[name]()
    folded = fold_batch_norm(task.model, task.example_input)
    network = trace(folded.model, task.example_input)
    simulated = QuantizedModel(folded.model, network, QuantizerSettings(repair=repair), reuse_memory=True)
    simulated.calibrate(task.inputs(batch) for batch in task.batches("calibration"))
    return Bench(name, task, network, simulated)
