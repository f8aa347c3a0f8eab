"""Tasks on which forecasts can be told exactly: additive networks, regression, wide logits, sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tiny import TinyTask
from torch import Tensor, nn
from torch.nn import functional as F

from search.tasks.task import Split, Task


class Branches(nn.Module):
    """Three linear layers on a third of the input each, added up: output changes of weight choices add up exactly."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.left, self.middle, self.right = (nn.Linear(8, outputs) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        left, middle, right = x.split(8, -1)
        return self.left(left) + self.middle(middle) + self.right(right)


class BranchTask(Task):
    """Top-1 accuracy of additive branches, on samples or sequences of them.

    Attributes:
        shape: Of a sample.
    """

    name = "branches"

    def __init__(self, outputs: int = 5, shape: tuple[int, ...] = (), sizes: tuple[int, ...] = (30, 30, 12)) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = Branches(outputs).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        self._batches = [torch.randn(size, *shape, 24, generator=generator) for size in sizes]
        self._labels = []
        for batch in self._batches:
            noise = torch.randn(*batch.shape[:-1], outputs, generator=generator)
            self._labels.append((self.model(batch) + noise).argmax(-1))
        self.example_input = self._batches[0][:2]

    def batches(self, split: Split) -> Iterator[Any]:
        return zip(self._batches, self._labels, strict=True)

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs.argmax(-1) == batch[1]).double().reshape(len(outputs), -1).mean(1)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        each = F.cross_entropy(outputs.flatten(0, -2), batch[1].flatten(), reduction="none")
        return each.reshape(len(outputs), -1).mean(1)


class Perplexity(BranchTask):
    """The same, judged by perplexity."""

    metric, higher_is_better = "perplexity", False

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.loss(outputs, batch).double()

    def reduce(self, scores: Any) -> float:
        return float(torch.tensor(scores).mean().exp())


class Regression(TinyTask):
    """Outputs that are numbers; only the divergence says so."""

    name = "regression"

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        return (reference - outputs).double().square().sum(1)

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.double().abs().mean(1)
