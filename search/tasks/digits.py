"""The digits task: a ResNet-8 on scikit-learn's 8x8 handwritten digits, small enough to search in seconds."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from search.tasks.classification import CHECKPOINTS, Classification, Labelled, stratified_splits
from search.tasks.networks import ResNet, digits_net

SIZES = {"train": 897, "calibration": 200, "selection": 350, "report": 350}


class Digits(Classification):
    """The 1,797 images of `sklearn.datasets.load_digits`, stratified: 897 train, 200, 350 and 350."""

    name = "digits"

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        """Creates the task.

        Args:
            checkpoint: A `.safetensors` file with the network's weights. Default: the one shipped with the package.
        """
        self.checkpoint = Path(checkpoint or CHECKPOINTS / "digits.safetensors")

    def network(self) -> ResNet:
        return digits_net()

    @cached_property
    def _splits(self) -> dict[str, Labelled]:
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.from_numpy(data.images).float().unsqueeze(1) / 16  # pixels are counts of 0 to 16
        labels = torch.from_numpy(data.target).long()
        splits = stratified_splits(labels, SIZES, seed=0)
        return {name: (images[index], labels[index]) for name, index in splits.items()}

    def load(self, split: str) -> Labelled:
        return self._splits[split]
