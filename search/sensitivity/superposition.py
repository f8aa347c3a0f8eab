"""Superposition: a policy's outputs foretold, sample by sample, as the base's plus what its choices change alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from search.errors import DataError
from search.files import replacing
from search.tasks.task import Task

CLASSES_ONLY = (
    "margin_error",
    "error",
)  # readings that compare classes with one another, so that the rest has no place
TO_REFERENCE = ("divergence_to", "squared")  # readings that compare with the float network's outputs, not with targets
CHUNK = 2**22  # numbers computed at once, 16 MiB


@dataclass(frozen=True)
class Superposition:
    """Outputs of the base, and what every single choice changes in them.

    Attributes:
        base: Outputs of the base that were kept (`search.sensitivity.reduction`), float32, shape `(rows, outputs)`.
        changes: What each choice adds to them, float32, shape `(choices, rows, outputs)`; zero where the base makes it.
        reference: The float network's outputs, float32, shape `(rows, outputs)`; the base's where that is float.
        targets: Position of each row's target among its outputs, int64, shape `(rows,)`; None without logits.
        samples: The sample of the calibration split that each row belongs to, int64, shape `(rows,)`.
        reading: What turns outputs into a loss by default: a name in `search.solve.readings`.
        has_rest: Whether the last output is the logsumexp of all classes that are not kept.
        shapes: Of complete outputs, the shape of every batch's, by the batch's number in the split; else None.
    """

    base: np.ndarray
    changes: np.ndarray
    reference: np.ndarray
    targets: np.ndarray | None
    samples: np.ndarray
    reading: str
    has_rest: bool = False
    shapes: Mapping[int, tuple[int, ...]] | None = None

    def outputs(self, positions: np.ndarray) -> np.ndarray:
        """Foretells the outputs of one policy, float32, shape `(rows, outputs)`.

        Args:
            positions: The positions of its choices, shape `(decisions,)`.
        """
        found: np.ndarray = self.base + self.changes[np.asarray(positions)].sum(0)
        return found

    def losses(self, positions: np.ndarray, reading: str | None = None) -> np.ndarray:
        """Foretells the losses of policies, float64, shape `(policies,)`.

        Args:
            positions: The positions of their choices, shape `(policies, decisions)`.
            reading: A name in `search.solve.readings`; by default the superposition's own.
        """
        from search.solve.readings import reading as reading_of

        seen = self.seen_by(reading or self.reading)
        read = reading_of(reading or self.reading, seen.targets)
        positions = np.asarray(positions)
        losses = np.empty(len(positions))
        step = max(1, CHUNK // max(1, seen.base.size))
        for start in range(0, len(positions), step):
            chunk = positions[start : start + step]
            outputs = np.repeat(seen.base[None], len(chunk), 0)
            for made in chunk.T:
                outputs += seen.changes[made]
            losses[start : start + step] = read(outputs)
        return losses

    def seen_by(self, reading: str) -> Seen:
        """The arrays that a search with a reading takes, without the rest where classes are compared.

        Raises:
            DataError: If the reading needs targets, and there are none.
        """
        classes = slice(None, -1 if self.has_rest and reading in CLASSES_ONLY else None)
        targets = self.reference[:, classes] if reading in TO_REFERENCE else self.targets
        if targets is None:
            raise DataError(
                f"the reading {reading} needs a target class per row, but the outputs are no logits; "
                f"take one of {', '.join(TO_REFERENCE)}, or let the task override `targets`"
            )
        return Seen(self.base[:, classes], self.changes[:, :, classes], targets)

    def metric(self, task: Task, positions: np.ndarray) -> float | None:
        """Foretells the task's own metric of one policy on the samples kept.

        Args:
            task: The task that was scored.
            positions: The positions of the policy's choices, shape `(decisions,)`.

        Returns:
            The metric; None where outputs were left out, or the task has no score per sample.
        """
        if not (self.shapes and task.per_sample):
            return None
        scores, rows = [], self.outputs(positions)
        batches = dict(islice(enumerate(task.batches("calibration")), max(self.shapes) + 1))
        for number, shape in self.shapes.items():
            count = int(np.prod(shape)) // rows.shape[1]
            scores.append(task.score(torch.from_numpy(rows[:count].reshape(shape)), batches[number]))
            rows = rows[count:]
        return task.reduce(torch.cat(scores).double().numpy())

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays by name, for a file; `from_arrays` reads them."""
        arrays = {name: getattr(self, name) for name in ("base", "changes", "reference", "samples")}
        arrays |= {"reading": np.array(self.reading), "has_rest": np.array(self.has_rest)}
        if self.targets is not None:
            arrays["targets"] = self.targets
        if self.shapes:
            arrays["shapes"] = np.array([(number, *shape) for number, shape in self.shapes.items()])
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Superposition:
        """Reads what `arrays` wrote."""
        shapes = {int(number): tuple(map(int, shape)) for number, *shape in arrays.get("shapes", ())}
        return cls(
            base=arrays["base"],
            changes=arrays["changes"],
            reference=arrays["reference"],
            targets=arrays.get("targets"),
            samples=arrays["samples"],
            reading=str(arrays["reading"]),
            has_rest=bool(arrays["has_rest"]),
            shapes=shapes or None,
        )

    def save(self, path: Path) -> None:
        """Writes everything to one `.npz` file, in one step."""
        with replacing(path) as aside, aside.open("wb") as file:
            arrays: dict[str, Any] = {**self.arrays()}
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Superposition:
        """Reads what `save` wrote."""
        with np.load(path) as file:
            return cls.from_arrays({name: file[name] for name in file.files})


@dataclass(frozen=True)
class Seen:
    """What a search on a superposition takes.

    Attributes:
        base: Outputs of the base, float32, shape `(rows, outputs)`.
        changes: What each choice adds, float32, shape `(choices, rows, outputs)`.
        targets: What a reading compares with: positions of targets, int64, shape `(rows,)`, or for `divergence_to` and
            `squared` the float network's outputs, float32, shape `(rows, outputs)`.
    """

    base: np.ndarray
    changes: np.ndarray
    targets: np.ndarray


def merge_superpositions(parts: Sequence[Superposition]) -> Superposition:
    """Puts the rows of disjoint shards one after the other, in the order of the samples.

    Raises:
        DataError: If there are none, or they keep different outputs.
    """
    if not parts or len({(part.changes.shape[0], part.changes.shape[2], part.has_rest) for part in parts}) > 1:
        raise DataError("superpositions can be merged only from shards of the same scoring, at least one")
    samples = np.concatenate([part.samples for part in parts])
    order = np.argsort(samples, kind="stable")
    shapes = [part.shapes for part in parts]
    targets = [part.targets for part in parts if part.targets is not None]
    return replace(
        parts[0],
        base=np.concatenate([part.base for part in parts])[order],
        changes=np.concatenate([part.changes for part in parts], 1)[:, order],
        reference=np.concatenate([part.reference for part in parts])[order],
        targets=np.concatenate(targets)[order] if targets else None,
        samples=samples[order],
        shapes=dict(sorted((n, s) for part in shapes for n, s in (part or {}).items())) if all(shapes) else None,
    )


def default_reading(task: Task, has_logits: bool) -> str:
    """The reading that stands for a task's metric.

    The margin error stands for accuracies, the cross-entropy for metrics that fall with it, such as perplexity; without
    a score per sample there may be no labels either, and the divergence from the float network is all there is.
    """
    if not has_logits:
        return "squared"
    if task.higher_is_better:
        return "margin_error"
    return "cross_entropy" if task.per_sample else "divergence_to"
