"""The true metric of a policy, and its paired drop against the float model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hwmodels import Precision
from search.errors import DataError
from search.files import replacing
from search.quality.interval import drop_interval
from search.quality.racing import Racing, Track
from search.quality.subsets import shuffle_split
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
        """As JSON holds it: what is not a finite number becomes None."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quality:
        """Reads what `to_dict` wrote."""
        low, high = (math.nan if values[name] is None else values[name] for name in ("drop_low", "drop_high"))
        return cls(values["value"], values["samples"], values["drop"], low, high)

    @classmethod
    def of_trial(cls, metrics: Mapping[str, Any]) -> Quality:
        """Reads a trial's metrics."""
        return cls.from_dict({**metrics, "value": metrics["quality"]})


@dataclass(frozen=True)
class Finish:
    """How a measurement ended.

    Attributes:
        quality: What was measured; of a race that was stopped, on part of the split only, and with an interval for the
            whole split that holds whenever one stops.
        fidelity: Share of the split that was measured.
        scores: One score per sample of the split, in its own order; None where the race was stopped.
    """

    quality: Quality
    fidelity: float
    scores: np.ndarray | None = None


def batch_scores(task: Task, model: nn.Module, batches: Iterable[Any]) -> np.ndarray:
    """Scores a model sample by sample on batches of a task, shape `(samples,)`.

    Raises:
        DataError: If the task returns anything but one score per sample.
    """
    scores = []
    with exact_inference():
        for batch in batches:
            found = task.score(task.outputs(model, batch), batch)
            if found.dim() != 1:
                raise DataError(
                    f"{type(task).__name__}.score returned shape {tuple(found.shape)}; "
                    "it must return one value per sample"
                )
            scores.append(found.double().cpu().numpy())
    return np.concatenate(scores)


def sample_scores(task: Task, model: nn.Module, split: Split, fidelity: float = 1.0) -> np.ndarray:
    """Scores a model sample by sample on a split, shape `(samples,)`.

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
    return batch_scores(task, model, batches[: math.ceil(fidelity * len(batches))])


class Evaluator:
    """Measures policies on a task's splits against the float network.

    Attributes:
        task: The task.
        simulated: Its simulated network.
        directory: Where files are kept.
        racing: How races are run; None where policies are always measured in full.
        seconds: What measurements of policies have taken so far.
    """

    def __init__(
        self,
        task: Task,
        simulated: QuantizedModel,
        directory: Path | None = None,
        racing: Racing | None = None,
        floats: QuantizedModel | None = None,
    ) -> None:
        """Creates an evaluator.

        Args:
            task: The task.
            simulated: Its simulated network.
            directory: Where the float network's scores are kept, so that a resumed run need not measure it again.
            racing: How races are run; a task without a score per sample knows none.
            floats: The simulated network whose float weights are the float network's, if not `simulated`.
        """
        self.task = task
        self.simulated = simulated
        self.directory = directory
        self.racing = racing if task.per_sample else None
        self.seconds = 0.0
        self._floats = floats or simulated
        self._reference: dict[Split, np.ndarray] = {}

    def of(self, simulated: QuantizedModel) -> Evaluator:
        """Returns an evaluator of another simulated network, such as a repaired one, against the same float network."""
        other = Evaluator(self.task, simulated, self.directory, self.racing, self._floats)
        other._reference = self._reference
        return other

    def float_scores(self, split: Split) -> np.ndarray:
        """Scores of the float network on a whole split, measured once."""
        if split in self._reference:
            return self._reference[split]
        path = self.directory / f"float_{split}.npy" if self.directory else None
        if path and path.is_file():
            scores: np.ndarray = np.load(path)
        else:
            scores = sample_scores(self.task, self._floats.apply({}), split)
            if path:
                with replacing(path) as aside, aside.open("wb") as file:
                    np.save(file, scores)
        self._reference[split] = scores
        return scores

    def float_quality(self, split: Split) -> Quality:
        """Quality of the float network itself."""
        scores = self.float_scores(split)
        return Quality(self.task.reduce(scores), len(scores), 0.0, 0.0, 0.0)

    def measure(self, policy: Mapping[str, Precision], split: Split, fidelity: float = 1.0) -> Quality:
        """Measures a policy on the first `fidelity` of a split's batches."""
        scores = self.scores(policy, split, fidelity)
        return self._quality(scores, self.float_scores(split)[: len(scores)])

    def scores(self, policy: Mapping[str, Precision], split: Split, fidelity: float = 1.0) -> np.ndarray:
        """Scores a policy sample by sample on the first `fidelity` of a split's batches, shape `(samples,)`."""
        started = time.perf_counter()
        scores = sample_scores(self.task, self.simulated.apply(policy), split, fidelity)
        self.seconds += time.perf_counter() - started
        return scores

    def race(self, policy: Mapping[str, Precision], incumbents: Sequence[np.ndarray]) -> Finish:
        """Measures a policy on the selection split until it is surely worse than an incumbent, or to the end.

        A race that is not stopped has measured every sample once: its quality is what `measure` finds, as far as the
        network computes the same for a sample whatever else is in its batch.

        Args:
            policy: The policy.
            incumbents: Their scores on the whole split in its own order, best incumbent first.
        """
        track, reference = self._track, self.float_scores("selection")
        started = time.perf_counter()
        model, order = self.simulated.apply(policy), track.split.order
        scores, measured = np.full(len(reference), math.nan), 0
        for subset in track.split.subsets:
            scores[subset.places] = batch_scores(self.task, model, subset.batches)
            measured += len(subset.places)
            self.seconds += time.perf_counter() - started
            started = time.perf_counter()
            seen = scores[order[:measured]]
            if measured < len(scores) and track.is_lost(seen, incumbents):
                quality = self._quality(seen, reference[order[:measured]], track.shifts(seen))
                return Finish(quality, measured / len(scores))
        return Finish(self._quality(scores, reference), 1.0, scores)

    @cached_property
    def _track(self) -> Track:
        assert self.racing is not None
        racing, reference = self.racing, self.float_scores("selection")
        model = self.simulated.apply({})
        split = shuffle_split(
            list(self.task.batches("selection")),
            score=lambda batch: batch_scores(self.task, model, [batch]),
            scores=len(reference),
            looks=lambda units: racing.looks(len(reference), units),
            seed=racing.seed,
        )
        return Track(self.task, split, racing, reference)

    def _quality(self, scores: np.ndarray, reference: np.ndarray, shifts: tuple[float, float] | None = None) -> Quality:
        drop, *ends = drop_interval(self.task, scores, reference, shifts)
        return Quality(self.task.reduce(scores), len(scores), drop, *(ends if self.task.per_sample else ()))
