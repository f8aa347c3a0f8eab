"""Fashion-MNIST on the first 1,000 images of every split, so that an evaluation takes a second."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from search.tasks.classification import Labelled
from search.tasks.fashion_mnist import FashionMNIST
from search.tasks.task import Split


class Fashion1000(FashionMNIST):
    """The shipped ResNet-20, judged on 1,000 images to compare plans, and on another 1,000 for the promise."""

    name = "fashion_1000"

    def batches(self, split: Split) -> Iterator[Labelled]:
        return islice(super().batches(split), 1000 // self.batch_size)
