"""The forward sweep: what each choice, made alone, does to the outputs, in one pass over the calibration split.

From the outputs come scores (divergence from the float network, loss, metric), interactions, as products of all pairs
of output changes in the metric of `search.sensitivity.tangent`, and the output changes themselves, which a
superposition adds up.

Memory: a choice holds at most `NUMBERS` + `FEATURES` float32 numbers, 512 KiB, so that 60 layers x 9 formats take less
than 300 MiB; besides, the outputs of the float network, and of the base, on the shard, and what `PrefixRunner` records.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from search.errors import ConfigError, DataError
from search.files import replacing
from search.quality.interval import drop
from search.quantize.prefix import PrefixRunner
from search.quantize.simulate import QuantizedModel
from search.sensitivity.choices import Base, Choice
from search.sensitivity.gram import Gram, merge_grams, scaled
from search.sensitivity.lens import Bounds, Found, Lens, has_loss, make_lenses
from search.sensitivity.reduction import NUMBERS, OUTPUTS, Extent
from search.sensitivity.superposition import Superposition, default_reading, merge_superpositions
from search.tasks.task import Task

WIDTH = 64
GRAM_CHUNK = 2**12  # features multiplied at once in float64

Progress = Callable[[int, int], None]
Share = Callable[["Sweep"], None]
"""Has choices that a sweep misses measured, by whom it likes; perhaps not all: the rest is measured afterwards."""


@dataclass(frozen=True)
class ForwardScores:
    """What a forward sweep found, by the flat positions of choices; all is zero for choices that the base makes.

    Attributes:
        kl: By how much each choice raises the mean divergence from the float network over that of the base, in nats
            for logits, shape `(choices,)`.
        loss: By how much it raises the mean loss, shape `(choices,)`; None for a task without a loss.
        drop: By how much it worsens the metric, shape `(choices,)`; None for a task without a score per sample.
        linear: The mean of (gradient of the divergence at the base) . (change of the outputs), shape `(choices,)`;
            zero at a float base.
        constant: Mean divergence of the base itself; zero at a float base.
        gram: Interactions: products of the changes in the metric at the base.
        superposition: The output changes.
        score: Mean of `task.score` with each choice made, shape `(choices,)`; None like `drop`.
        base_score: The same of the base.
    """

    kl: np.ndarray
    loss: np.ndarray | None
    drop: np.ndarray | None
    linear: np.ndarray
    constant: float
    gram: Gram
    superposition: Superposition
    score: np.ndarray | None
    base_score: float | None

    @property
    def samples(self) -> int:
        """Number of samples of the shard."""
        return self.gram.count

    @property
    def curvature(self) -> np.ndarray:
        """What `linear` leaves of `kl`, shape `(choices,)`: for logits the divergence from the base, never negative."""
        left: np.ndarray = np.maximum(self.kl - self.linear, 0)
        return left

    @property
    def scaled(self) -> np.ndarray:
        """Mean interactions, scaled so that they are exact, with `constant` and `linear`, for every single choice."""
        return scaled(self.gram.mean, self.curvature)


def forward_scores(
    task: Task,
    simulated: QuantizedModel,
    choices: Sequence[Choice],
    base: Base | None = None,
    *,
    width: int = WIDTH,
    outputs: int = OUTPUTS,
    numbers: int = NUMBERS,
    reading: str | None = None,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    directory: Path | None = None,
    progress: Progress = lambda done, total: None,
    share: Share | None = None,
) -> ForwardScores:
    """Scores choices by what each does to the outputs on the calibration split.

    Args:
        task: Gives the data, the divergence, and whatever of loss, metric and targets it has.
        simulated: The network, calibrated.
        choices: The choices, in the order of their positions.
        base: The policy from which they are told apart; by default the float network.
        width: Most numbers that interactions keep of a sample; more coordinates are projected. Of many samples, fewer
            are kept of each, `FEATURES` of all.
        outputs: Most outputs that the superposition keeps of a row.
        numbers: Most numbers that it keeps of a choice, rows x outputs.
        reading: What the superposition reads of outputs, a name in `search.solve.readings`; by default what stands
            for the task's metric.
        seed: Of what is drawn: rows, places and projections.
        shard: `(i, n)` for the i-th of n parts of the split, its batches i, i + n, ...; `merge_scores` joins parts.
        directory: Where the result of each choice is written as it comes; what is there is not measured again. It must
            belong to this model, data and quantizer; base, shard and the settings here are told apart.
        progress: Called with the number of choices measured and their total.
        share: Has others measure some of the choices into `directory`.

    Raises:
        ConfigError: If there is no such shard.
        DataError: If the divergence of a choice is not a number, or a file in `directory` is damaged.
        UnsupportedError: If interactions cannot be derived from the task's divergence.
    """
    bounds = Bounds(width, outputs, numbers, seed)
    sweep = Sweep(task, simulated, choices, base, bounds, shard, directory)
    if share and directory:
        share(sweep)
    at_base = sweep.at_base
    totals = np.tile(at_base.totals, (len(choices), 1))
    changes = np.zeros((len(choices), *at_base.changes.shape), np.float32)
    features = np.zeros((len(choices), *at_base.features.shape), np.float32)
    for done, (job, found) in enumerate(sweep.run(sweep.jobs), 1):
        totals[job], changes[job], features[job] = found.totals, found.changes, found.features
        progress(done, len(sweep.jobs))

    lenses, own, extents = sweep.lenses, sweep.own, sweep.extents
    samples = sum(extents[number].samples for number in own)
    divergence, slope, loss, score = (totals / samples).T
    base_divergence, _, base_loss, base_score = (at_base.totals / samples).tolist()
    return _with_drop(
        task,
        ForwardScores(
            kl=divergence - base_divergence,
            loss=loss - base_loss if has_loss(task) else None,
            drop=None,
            linear=slope,
            constant=base_divergence,
            gram=_gram(features, samples),
            superposition=_superposition(task, lenses, own, extents, changes, reading),
            score=score if task.per_sample else None,
            base_score=base_score if task.per_sample else None,
        ),
    )


class Sweep:
    """Measures what choices do, made alone, each kept in a file of its own.

    Attributes:
        jobs: Positions of the choices that there is something to measure about: those that the base does not make.
        own: Numbers of the batches in the shard.
        lenses: What is looked at of the outputs on each of them.
        extents: How large every batch of the split is.
        at_base: What is found at the base.
    """

    def __init__(
        self,
        task: Task,
        simulated: QuantizedModel,
        choices: Sequence[Choice],
        base: Base | None = None,
        bounds: Bounds | None = None,
        shard: tuple[int, int] = (0, 1),
        directory: Path | None = None,
    ) -> None:
        """Runs the float network and the base; takes what `forward_scores` does.

        Raises:
            ConfigError: If there is no such shard.
            DataError: If the divergence of the base is not a number.
            UnsupportedError: If interactions cannot be derived from the task's divergence.
        """
        base, bounds = base or {}, bounds or Bounds(WIDTH, OUTPUTS, NUMBERS, 0)
        batches = list(task.batches("calibration"))
        self.own = _batches_of(shard, len(batches))
        self.lenses, self.extents = make_lenses(task, simulated, batches, self.own, base, bounds)
        self.at_base = Found.joined([lens(lens.point) for lens in self.lenses])
        _check_finite(self.at_base, "of the base" if base else "of the float network from itself")
        self.jobs = [position for position, choice in enumerate(choices) if not choice.is_in(base)]
        self._choices, self._base = choices, base
        self._runner = PrefixRunner(simulated, task, [batches[number] for number in self.own])
        identity = [sorted((layer, str(held)) for layer, held in base.items()), *shard, *astuple(bounds)]
        self._paths = {job: directory / _file_name(choices[job], identity) for job in self.jobs} if directory else {}

    @property
    def missing(self) -> list[int]:
        """Positions of the choices whose files are not there."""
        return [job for job in self.jobs if job not in self._paths or not self._paths[job].is_file()]

    def write(self, jobs: Sequence[int], written: Callable[[], None] = lambda: None) -> None:
        """Measures choices whose files are not there, and writes those; calls `written` after each."""
        missing = set(self.missing)
        for _ in self.run([job for job in jobs if job in missing]):
            written()

    def file(self, job: int) -> bytes:
        """The file of a choice that is measured."""
        return self._paths[job].read_bytes()

    def put(self, job: int, file: bytes) -> None:
        """Takes the file of a choice that was measured elsewhere."""
        with replacing(self._paths[job]) as aside:
            aside.write_bytes(file)

    def run(self, jobs: Sequence[int]) -> Iterator[tuple[int, Found]]:
        """Yields positions and what was found of them, first those whose files are there; others' files are written.

        Raises:
            DataError: If the divergence of a choice is not a number, or a file is damaged.
        """
        known = [job for job in jobs if job in self._paths and self._paths[job].is_file()]
        for job in known:
            yield self._checked(job, Found.load(self._paths[job]))
        rest = [job for job in jobs if job not in known]
        policies = [self._choices[job].on(self._base) for job in rest]
        for index, parts in self._runner.sweep(policies, lambda outputs, number: self.lenses[number](outputs)):
            job, found = rest[index], Found.joined(parts)
            if self._paths:
                found.save(self._paths[job])
            yield self._checked(job, found)

    def _checked(self, job: int, found: Found) -> tuple[int, Found]:
        _check_finite(found, f"with {self._choices[job]}")
        return job, found


def merge_scores(task: Task, parts: Sequence[ForwardScores]) -> ForwardScores:
    """Joins the scores of the shards of one sweep.

    Raises:
        DataError: If there are none, or they do not belong together.
    """
    gram = merge_grams(part.gram for part in parts)

    def mean(values: Sequence[Any]) -> Any:
        if any(value is None for value in values):
            return None
        return sum(value * part.samples for value, part in zip(values, parts, strict=True)) / gram.count

    merged = ForwardScores(
        kl=mean([part.kl for part in parts]),
        loss=mean([part.loss for part in parts]),
        drop=None,
        linear=mean([part.linear for part in parts]),
        constant=mean([part.constant for part in parts]),
        gram=gram,
        superposition=merge_superpositions([part.superposition for part in parts]),
        score=mean([part.score for part in parts]),
        base_score=mean([part.base_score for part in parts]),
    )
    return _with_drop(task, merged)


def _file_name(choice: Choice, identity: Sequence[Any]) -> str:
    """Name of the file that keeps a choice's result."""
    whole = [choice.decision.side, choice.decision.layers, str(choice.format), *identity]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16] + ".npz"


def _batches_of(shard: tuple[int, int], batches: int) -> range:
    """Numbers of the batches in a shard."""
    index, count = shard
    if not 0 <= index < count <= batches:
        raise ConfigError(
            f"shard={shard} of {batches} calibration batches; give (i, n) with 0 <= i < n <= {batches}, "
            "or cut the split into smaller batches"
        )
    return range(index, batches, count)


def _gram(features: np.ndarray, samples: int) -> Gram:
    """Products of all pairs of choices, some features at a time, so that no copy of all is made."""
    gram = Gram.empty(len(features))
    for start in range(0, features.shape[1], GRAM_CHUNK):
        gram += Gram.of(features[:, start : start + GRAM_CHUNK], 0)
    return replace(gram, count=samples)


def _superposition(
    task: Task,
    lenses: Sequence[Lens],
    own: range,
    extents: Sequence[Extent],
    changes: np.ndarray,
    reading: str | None,
) -> Superposition:
    kept = [lens.rows for lens in lenses]
    starts = np.cumsum([0, *(extent.samples for extent in extents)])
    samples = [starts[number] + rows.samples.cpu().numpy() for number, rows in zip(own, kept, strict=True)]
    targets = [rows.targets.cpu().numpy() for rows in kept if rows.targets is not None]
    is_complete = all(rows.is_complete for rows in kept)
    return Superposition(
        base=np.concatenate([lens.kept.cpu().numpy() for lens in lenses]),
        changes=changes,
        reference=np.concatenate([lens.rows(lens.reference).cpu().numpy() for lens in lenses]),
        targets=np.concatenate(targets) if targets else None,
        samples=np.concatenate(samples),
        reading=reading or default_reading(task, has_logits=bool(targets)),
        has_rest=kept[0].has_rest,
        shapes={number: extents[number].shape for number in own} if is_complete else None,
    )


def _with_drop(task: Task, scores: ForwardScores) -> ForwardScores:
    """Adds the drops of the metric, which `task.reduce` makes of mean scores."""
    if scores.score is None or scores.base_score is None:
        return scores
    reference = np.array([scores.base_score])
    return replace(scores, drop=np.array([drop(task, np.array([score]), reference) for score in scores.score]))


def _check_finite(found: Found, where: str) -> None:
    if not np.isfinite(found.totals[0]):
        raise DataError(
            f"the divergence is {found.totals[0]} {where}; the model's outputs on the calibration split must be finite"
        )
