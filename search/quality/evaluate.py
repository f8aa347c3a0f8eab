"""The true metric of a policy, and its paired drop against the float model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hwmodels import Precision
from search.errors import DataError
from search.files import replacing
from search.policy import Policy
from search.quality.dealing import Piece, dealing_keeps_bits, pieces_of, rest_of
from search.quality.interval import drop_interval
from search.quality.racing import Racing, Track
from search.quality.store import EvaluationStore, Order, SampleScores
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
    return np.concatenate(scores_by_batch(task, model, batches))


def scores_by_batch(task: Task, model: nn.Module, batches: Iterable[Any]) -> list[np.ndarray]:
    """Scores a model on batches of a task, one array a batch.

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
    return scores


def all_batches(task: Task, split: Split) -> list[Any]:
    """The batches of a split.

    Raises:
        DataError: If there are none.
    """
    batches = list(task.batches(split))
    if not batches:
        raise DataError(f"the {split} split of task {task.name} is empty")
    return batches


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
    batches = all_batches(task, split)
    return batch_scores(task, model, batches[: math.ceil(fidelity * len(batches))])


MICROSECONDS = 6
"""Digits of seconds."""


class Evaluator:
    """Measures policies on a task's splits against the float network.

    Attributes:
        task: The task.
        simulated: Its simulated network.
        directory: Where files are kept.
        racing: How races are run; None where policies are always measured in full.
        store: Where scores are kept for all runs; None keeps none.
        seconds: What measurements of policies have taken so far; those of the store count as when they were made.
        was_served: Whether the store knew the last measurement as a whole, before anybody measured it for this search.
    """

    def __init__(
        self,
        task: Task,
        simulated: QuantizedModel,
        directory: Path | None = None,
        racing: Racing | None = None,
        floats: QuantizedModel | None = None,
        store: EvaluationStore | None = None,
    ) -> None:
        """Creates an evaluator.

        Args:
            task: The task.
            simulated: Its simulated network.
            directory: Where the float network's scores are kept, so that a resumed run need not measure it again;
                a store takes its place.
            racing: How races are run; a task without a score per sample knows none.
            floats: The simulated network whose float weights are the float network's, if not `simulated`.
            store: Where scores are kept for all runs; it must be that of this task and network.
        """
        self.task = task
        self.simulated = simulated
        self.directory = directory
        self.racing = racing if task.per_sample else None
        self.store = store
        self.seconds = 0.0
        self.was_served = False
        self._floats = floats or simulated
        self._reference: dict[Split, np.ndarray] = {}
        self._counts: dict[Split, np.ndarray] = {}  # scores of each batch; known where there is a store

    def of(self, simulated: QuantizedModel, repairs: Any = None) -> Evaluator:
        """Returns an evaluator of another simulated network, such as a repaired one, against the same float network.

        Args:
            simulated: The network.
            repairs: What was done to it, as plain values from which anyone would make the same; None keeps its scores
                out of the store.
        """
        store = self.store.repaired(repairs) if self.store and repairs else None
        other = Evaluator(self.task, simulated, self.directory, self.racing, self._floats, store)
        other._reference, other._counts = self._reference, self._counts
        return other

    def network(self, policy: Mapping[str, Precision]) -> nn.Module:
        """The network that is measured for a policy, quantized by it."""
        return self.simulated.apply(policy)

    def float_scores(self, split: Split) -> np.ndarray:
        """Scores of the float network on a whole split, measured once."""
        if self.store and split not in self._counts:
            self._reference[split], self._counts[split] = self._stored_floats(self.store, split)
        elif split not in self._reference:
            self._reference[split] = self._own_floats(split)
        return self._reference[split]

    def _stored_floats(self, store: EvaluationStore, split: Split) -> tuple[np.ndarray, np.ndarray]:
        known = store.floats(split)
        if known is None:
            parts = scores_by_batch(self.task, self._floats.apply({}), all_batches(self.task, split))
            known = np.concatenate(parts), np.array([len(part) for part in parts])
            store.keep_floats(split, *known)
        return known

    def _own_floats(self, split: Split) -> np.ndarray:
        path = self.directory / f"float_{split}.npy" if self.directory else None
        if path and path.is_file():
            kept: np.ndarray = np.load(path)
            return kept
        scores = sample_scores(self.task, self._floats.apply({}), split)
        if path:
            with replacing(path) as aside, aside.open("wb") as file:
                np.save(file, scores)
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
        if self.store is None:
            started = time.perf_counter()
            scores = sample_scores(self.task, self.network(policy), split, fidelity)
            self.seconds += time.perf_counter() - started
            return scores
        known = self._known(policy, split, len(self.float_scores(split)))
        counts = self._counts[split]
        places = np.split(np.arange(counts.sum()), counts.cumsum()[:-1])[: math.ceil(fidelity * len(counts))]
        found, asked = known, np.concatenate(places)
        if not known.measured[asked].all():
            batches = all_batches(self.task, split)[: len(places)]
            found = self._complete(known, policy, list(zip(batches, places, strict=True)))
        self._settle(policy, split, known, found, asked)
        asked_for: np.ndarray = found.values[asked]
        return asked_for

    def race(self, policy: Mapping[str, Precision], incumbents: Sequence[np.ndarray]) -> Finish:
        """Measures a policy on the selection split until it is surely worse than an incumbent, or to the end.

        A race that is not stopped has measured every sample once: its quality is what `measure` finds, as far as the
        network computes the same for a sample whatever else is in its batch.

        Args:
            policy: The policy.
            incumbents: Their scores on the whole split in its own order, best incumbent first.
        """
        track, reference = self._track, self.float_scores("selection")
        order, part = track.split.order, self._part
        known = found = self._known(policy, part, len(order))
        seen = order[:0]
        for pieces in self._pieces:
            found = self._complete(found, policy, pieces)
            seen = order[: len(seen) + sum(len(places) for _, places in pieces)]
            if len(seen) < len(order) and track.is_lost(found.values[seen], incumbents):
                break
        self._settle(policy, part, known, found, seen)
        scores = found.values[seen]
        if len(seen) < len(order):
            return Finish(self._quality(scores, reference[seen], track.shifts(scores)), len(seen) / len(order))
        return Finish(self._quality(found.values, reference), 1.0, found.values)

    @property
    def foresight(self) -> int:
        """How many of the measurements that come next are worth ordering; 1 where nobody else measures."""
        return self.store.helpers.foresight if self.store else 1

    def order(
        self,
        policies: Iterable[Policy],
        split: Split,
        fidelity: float = 1.0,
        rivals: Sequence[Sequence[Policy]] | None = None,
    ) -> None:
        """Has helpers measure what will be asked for, as far as the store does not know it.

        Args:
            policies: The policies.
            split: On which data.
            fidelity: Share of the split.
            rivals: For races: the policies that each is raced against, best first.
        """
        if self.foresight == 1:
            return
        assert self.store is not None
        part, samples = split if rivals is None else self._part, len(self.float_scores(split))
        subject, orders = self.store.subject(self.simulated), []
        for number, policy in enumerate(policies):
            known = self.store.known(self.simulated, policy, part, samples).measured
            if not known[: math.ceil(fidelity * samples)].all():
                against = None if rivals is None else tuple(rivals[number])
                orders.append(Order(subject, policy, split, part, fidelity, against))
        self.store.helpers.order(orders)

    def fill(self, order: Order) -> bytes:
        """Measures what another process ordered, into the store; returns the file that is there then.

        A race is against those rivals whose scores the store knows: it may only last longer than it has to.
        """
        assert self.store is not None
        if order.rivals is None:
            self.scores(order.policy, order.split, order.fidelity)
        else:
            samples = len(self.float_scores(order.split))
            known = [self.store.known(self.simulated, rival, order.part, samples) for rival in order.rivals]
            self.race(order.policy, [scores.values for scores in known if scores.measured.all()])
        return self.store.file(self.simulated, order.policy, order.part).read_bytes()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is measured in this block, for somebody else, is not counted."""
        counted = self.seconds, self.was_served
        try:
            yield
        finally:
            self.seconds, self.was_served = counted

    def _known(self, policy: Mapping[str, Precision], part: str, samples: int) -> SampleScores:
        if self.store is None:
            return SampleScores.none(samples)
        return self.store.scores(self.simulated, Policy(policy), part, samples)

    def _complete(self, known: SampleScores, policy: Mapping[str, Precision], pieces: Sequence[Piece]) -> SampleScores:
        """Measures what is not known yet of some batches."""
        lacking = [piece for piece in pieces if not known.measured[piece[1]].all()]
        if not lacking:
            return known
        started = time.perf_counter()
        model, values, measured = self.network(policy), known.values.copy(), known.measured.copy()
        for batch, places in (rest_of(piece, known.measured) for piece in lacking):
            values[places] = batch_scores(self.task, model, [batch])
            measured[places] = True
        return SampleScores(values, measured, known.seconds + time.perf_counter() - started)

    def _settle(
        self,
        policy: Mapping[str, Precision],
        part: str,
        known: SampleScores,
        found: SampleScores,
        asked: np.ndarray,
    ) -> None:
        """Spends the seconds of what was asked for, known or found just now, and keeps what was found."""
        found = replace(found, seconds=round(found.seconds, MICROSECONDS))  # so that sums of them are the same again
        self.seconds += round(known.seconds_for(asked) + found.seconds - known.seconds, MICROSECONDS)
        is_known = bool(known.measured[asked].all())
        self.was_served = is_known and not known.is_ordered
        if self.store and not is_known:
            self.store.keep(self.simulated, Policy(policy), part, found)

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

    @cached_property
    def _pieces(self) -> list[list[Piece]]:
        """What each look of a race measures."""
        return pieces_of(self._track.split)

    @property
    def _part(self) -> str:
        """What the store calls the selection split when it is raced on."""
        return self._raced_part if self.store else "selection"

    @cached_property
    def _raced_part(self) -> str:
        """Where the store keeps scores of races: with those of the split if they are the same to the last bit."""
        assert self.racing is not None
        racing, split, batches = self.racing, self._track.split, all_batches(self.task, "selection")
        if split.unit == "batch" or dealing_keeps_bits(self.task, self._floats.apply({}), batches, split):
            return "selection"
        return f"selection_raced_{racing.first}_{racing.growth:g}_{racing.seed}"

    def _quality(self, scores: np.ndarray, reference: np.ndarray, shifts: tuple[float, float] | None = None) -> Quality:
        drop, *ends = drop_interval(self.task, scores, reference, shifts)
        return Quality(self.task.reduce(scores), len(scores), drop, *(ends if self.task.per_sample else ()))
