"""The true metric of a policy, and its paired drop against the float model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hwmodels import Precision
from search.errors import DataError
from search.files import replacing
from search.quality.interval import paired_interval
from search.quantize.simulate import QuantizedModel, exact_inference
from search.tasks.task import Split, Task


@dataclass(frozen=True)
class Quality:
    """A measured quality.

    Attributes:
        value: The task's metric.
        samples: How many samples it was measured on.
        drop: How much worse than the float model on the same samples; negative where better.
        drop_low: Lower end of the drop's 95% interval; NaN where the task gives no score per sample.
        drop_high: Upper end of the drop's 95% interval; NaN likewise.
    """

    value: float
    samples: int
    drop: float
    drop_low: float = math.nan
    drop_high: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: NaN becomes None."""
        return {name: None if value != value else value for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quality:
        """Reads what `to_dict` wrote."""
        low, high = (math.nan if values[name] is None else values[name] for name in ("drop_low", "drop_high"))
        return cls(values["value"], values["samples"], values["drop"], low, high)

    @classmethod
    def of_trial(cls, metrics: Mapping[str, Any]) -> Quality:
        """Reads a trial's metrics."""
        return cls.from_dict({**metrics, "value": metrics["quality"]})


def sample_scores(task: Task, model: nn.Module, split: Split, fidelity: float = 1.0) -> np.ndarray:
    """Scores a model sample by sample, shape `(samples,)`.

    Args:
        task: What to measure.
        model: The network to measure.
        split: On which data.
        fidelity: Share of the split's batches used, the first ones, in (0, 1].

    Raises:
        DataError: If the split is empty or the task returns anything but one score per sample.
    """
    batches = list(task.batches(split))
    if not batches:
        raise DataError(f"the {split} split of task {task.name} is empty")
    scores = []
    with exact_inference():
        for batch in batches[: math.ceil(fidelity * len(batches))]:
            found = task.score(task.outputs(model, batch), batch)
            if found.dim() != 1:
                raise DataError(
                    f"{type(task).__name__}.score returned shape {tuple(found.shape)}; "
                    "it must return one value per sample"
                )
            scores.append(found.double().cpu().numpy())
    return np.concatenate(scores)


class Evaluator:
    """Measures policies on a task's splits against the float network."""

    def __init__(self, task: Task, simulated: QuantizedModel, directory: Path | None = None) -> None:
        """Creates an evaluator.

        Args:
            task: The task.
            simulated: Its simulated network.
            directory: Where the float network's scores are kept, so that a resumed run need not measure it again.
        """
        self.task = task
        self.simulated = simulated
        self._directory = directory
        self._reference: dict[Split, np.ndarray] = {}

    def float_scores(self, split: Split) -> np.ndarray:
        """Scores of the float network on a whole split, measured once."""
        if split in self._reference:
            return self._reference[split]
        path = self._directory / f"float_{split}.npy" if self._directory else None
        if path and path.is_file():
            scores: np.ndarray = np.load(path)
        else:
            scores = self._scores({}, split, 1.0)
            if path:
                with replacing(path) as aside, aside.open("wb") as file:
                    np.save(file, scores)
        self._reference[split] = scores
        return scores

    def float_quality(self, split: Split) -> Quality:
        """Quality of the float network itself."""
        scores = self.float_scores(split)
        return Quality(float(scores.mean()), len(scores), 0.0, 0.0, 0.0)

    def measure(self, policy: Mapping[str, Precision], split: Split, fidelity: float = 1.0) -> Quality:
        """Measures a policy on the first `fidelity` of a split's batches."""
        scores = self._scores(policy, split, fidelity)
        reference = self.float_scores(split)[: len(scores)]
        differences = reference - scores if self.task.higher_is_better else scores - reference
        if not self.task.per_sample:
            return Quality(float(scores[0]), 1, float(differences[0]))
        return Quality(float(scores.mean()), len(scores), *paired_interval(differences))

    def _scores(self, policy: Mapping[str, Precision], split: Split, fidelity: float) -> np.ndarray:
        return sample_scores(self.task, self.simulated.apply(policy), split, fidelity)
