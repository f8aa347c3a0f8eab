"""Tasks that score top-1 accuracy over tensors held in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from search.errors import DataError
from search.tasks.task import Split, Task

CHECKPOINTS = Path(__file__).parent / "checkpoints"

Labelled = tuple[Tensor, Tensor]  # images (N, C, H, W) float32, labels (N,) int64


class Classification(Task):
    """Top-1 accuracy of a network that maps images to logits.

    Subclasses implement `load` and `network`, and set `checkpoint`; images stay in memory as float32.
    """

    batch_size: int = 500
    training_batch_size: int = 64
    checkpoint: Path

    @abstractmethod
    def load(self, split: str) -> Labelled:
        """Returns images and labels of a split, or of `train`."""

    @abstractmethod
    def network(self) -> nn.Module:
        """Returns the network with fresh weights."""

    @cached_property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The trained network, read from `checkpoint`, in evaluation mode."""
        if not self.checkpoint.is_file():
            raise DataError(
                f"no checkpoint at {self.checkpoint}; train it with "
                f"`python -m search.tasks.training {self.name} --out {self.checkpoint}`"
            )
        network = self.network()
        network.load_state_dict(load_file(self.checkpoint))
        return network.eval()

    @cached_property
    def example_input(self) -> Tensor:
        """Two calibration images, so that nothing specialises to a batch of one."""
        return self.load("calibration")[0][:2]

    def batches(self, split: Split) -> Iterator[Labelled]:
        images, labels = self.load(split)
        return zip(torch.split(images, self.batch_size), torch.split(labels, self.batch_size), strict=True)

    def training_batches(self, epoch: int) -> Iterator[Labelled]:
        """Yields the training images in batches of `training_batch_size`, shuffled by the epoch."""
        images, labels = self.load("train")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
        return ((images[index], labels[index]) for index in torch.split(order, self.training_batch_size))

    def loss(self, outputs: Tensor, batch: Labelled) -> Tensor:
        """Returns the cross-entropy in nats."""
        return F.cross_entropy(outputs, batch[1].to(outputs.device), reduction="none")

    def score(self, outputs: Tensor, batch: Labelled) -> Tensor:
        """Returns 1 where the largest logit is the label's, else 0."""
        return (outputs.argmax(-1) == batch[1]).double()


def stratified_splits(labels: Tensor, sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
    """Deals sample indices into disjoint splits of exactly `sizes`, each with the classes in proportion.

    Args:
        labels: Class of every sample, shape `(N,)`; `sizes` must add up to N.
        sizes: Split name to number of samples.
        seed: Seed of the shuffle.
    """
    from sklearn.model_selection import train_test_split

    rest, splits = torch.arange(len(labels)).numpy(), {}
    for name, size in list(sizes.items())[:-1]:
        chosen, rest = train_test_split(rest, train_size=size, stratify=labels[rest].numpy(), random_state=seed)
        splits[name] = torch.from_numpy(chosen).sort().values
    return splits | {list(sizes)[-1]: torch.from_numpy(rest).sort().values}
