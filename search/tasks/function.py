"""A task made of a model, calibration inputs and one function that returns its quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from search.errors import ConfigError, closest
from search.tasks.task import Split, Task

DIVERGENCES = ("kl", "squared_error")


class FunctionTask(Task):
    """Judges a model by `evaluate(model, split) -> float` alone.

    Without a score per sample there is no racing and no interval of the drop; reports say so.
    """

    per_sample: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
        calibration: Iterable[Any],
        evaluate: Callable[[nn.Module, Split], float],
        name: str = "task",
        metric: str = "quality",
        higher_is_better: bool = True,
        divergence: str = "kl",
    ) -> None:
        """Creates the task.

        Args:
            model: The trained model; it is never altered.
            example_input: One batch of inputs: a tensor, a tuple of positional or a mapping of keyword inputs.
            calibration: Batches of inputs, in the same form.
            evaluate: Returns the metric of a model on the `selection` or the `report` split.
            name: What run directories and tags call the task.
            metric: Name of the metric.
            higher_is_better: False for errors and losses.
            divergence: How outputs are compared with the float model's: `kl` for logits, else `squared_error`.

        Raises:
            ConfigError: If `divergence` is unknown or there is no calibration batch.
        """
        self.model = model
        self.example_input = example_input
        self.name, self.metric, self.higher_is_better = name, metric, higher_is_better
        self.evaluate = evaluate
        self._calibration = list(calibration)
        if not self._calibration:
            raise ConfigError("`calibration` is empty; give at least one batch of inputs")
        if divergence not in DIVERGENCES:
            raise ConfigError(
                f"divergence={divergence!r} is unknown{closest(divergence, DIVERGENCES)}; allowed: kl, squared_error"
            )
        self._divergence = divergence

    def batches(self, split: Split) -> Iterable[Any]:
        return self._calibration if split == "calibration" else [split]

    def inputs(self, batch: Any) -> Any:
        return batch

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        if isinstance(batch, str):
            return torch.tensor(float(self.evaluate(model, batch)), dtype=torch.float64)  # type: ignore[arg-type]
        return super().outputs(model, batch)

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.reshape(1)

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        if self._divergence == "kl":
            return super().divergence(reference, outputs)
        return (reference.double() - outputs.double()).square().reshape(len(reference), -1).mean(1)

    def tangent(self, reference: Tensor, change: Tensor) -> Tensor:
        if self._divergence == "kl":
            return super().tangent(reference, change)
        change = change.to(torch.promote_types(change.dtype, torch.float32)).reshape(len(change), -1)
        return change * math.sqrt(2 / change.shape[1])

    def targets(self, batch: Any, outputs: Tensor) -> Tensor | None:
        return outputs.argmax(-1) if self._divergence == "kl" else None
