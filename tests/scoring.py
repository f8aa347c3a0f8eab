"""Tasks made of a model and tensors, for tests of sensitivity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tiny import Bench, make_bench
from torch import Tensor, nn
from torch.nn import functional as F

from search.sensitivity.choices import Choice, choices_of
from search.tasks.task import Split, Task


class Given(Task):
    """A model on given inputs, with labels if there are any, in batches of `batch_size`."""

    name = "given"

    def __init__(self, model: nn.Module, inputs: Tensor, labels: Tensor | None = None, batch_size: int = 5) -> None:
        self.model, self.example_input = model.eval(), inputs[:2]
        self.data, self.labels, self.batch_size = inputs, labels, batch_size

    def batches(self, split: Split) -> Iterator[Any]:
        parts = [self.data] if self.labels is None else [self.data, self.labels]
        cut = [torch.split(part, self.batch_size) for part in parts]
        return iter(cut[0]) if self.labels is None else zip(*cut, strict=True)

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.flatten(1).sum(1)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        if self.labels is None:
            return super().loss(outputs, batch)
        return F.cross_entropy(outputs.movedim(-1, 1), batch[1], reduction="none").reshape(len(outputs), -1).mean(1)


class Squared(Given):
    """Half the squared distance, from the targets as loss and from the float outputs as divergence."""

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        return 0.5 * (reference - outputs).square().flatten(1).sum(1)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return self.divergence(batch[1], outputs)


def bench_of(
    task: Task, weight: Sequence[str], input: Sequence[str], **options: Any
) -> tuple[Bench, tuple[Choice, ...]]:
    """The simulated network of a task, and the choices of its space."""
    bench = make_bench(task, weight, input, **options)
    return bench, choices_of(bench.space)


def output_changes(bench: Bench, choices: Sequence[Choice], base: Any = None) -> Tensor:
    """What every choice does to the outputs on all of the calibration data, shape `(choices, samples, ...)`."""
    base = base or {}

    def outputs(policy: Any) -> Tensor:
        model = bench.simulated.apply(policy)
        with torch.no_grad():
            return torch.cat([bench.task.outputs(model, batch) for batch in bench.task.batches("calibration")])

    reference = outputs(base)
    changes = torch.stack([outputs(choice.on(base)) - reference for choice in choices])
    bench.simulated.apply({})
    return changes


def mean_and_error(values: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The mean of independent estimates, and its standard error."""
    stacked = torch.stack([torch.as_tensor(value) for value in values])
    return stacked.mean(0), stacked.std(0) / len(stacked) ** 0.5
