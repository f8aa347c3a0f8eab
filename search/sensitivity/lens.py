"""What a policy's outputs are compared with, batch by batch, and what is found by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from search.errors import DataError
from search.files import replacing
from search.quantize.prefix import PrefixRunner
from search.quantize.simulate import QuantizedModel
from search.sensitivity.choices import Base
from search.sensitivity.reduction import Extent, OutputRows, choose_rows, extent_of, quotas, shared_width
from search.sensitivity.tangent import Projection, slope, tangent
from search.tasks.task import Task

FEATURES = 2**16  # numbers kept of one choice for interactions, samples x width: 256 KiB


@dataclass(frozen=True)
class Bounds:
    """How much is kept of a choice.

    Attributes:
        width: Most numbers that interactions keep of a sample.
        outputs: Most outputs that the superposition keeps of a row.
        numbers: Most numbers that it keeps, rows x outputs.
        seed: Of what is drawn.
    """

    width: int
    outputs: int
    numbers: int
    seed: int


@dataclass(frozen=True)
class Found:
    """What one policy does on one or more batches.

    Attributes:
        totals: Sums over samples of divergence, slope, loss and score, NaN where the task has none; shape `(4,)`.
        features: Projected coordinates of the change of the outputs, all samples in a row, float32.
        changes: What it changes in the outputs kept, float32, shape `(rows, outputs)`.
    """

    totals: np.ndarray
    features: np.ndarray
    changes: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Found]) -> Found:
        """Puts what was found on several batches together."""
        totals = np.sum([part.totals for part in parts], 0)
        return cls(totals, np.concatenate([p.features for p in parts]), np.concatenate([p.changes for p in parts]))

    def save(self, path: Path) -> None:
        """Writes it to one `.npz` file, in one step."""
        with replacing(path) as aside, aside.open("wb") as file:
            np.savez(file, totals=self.totals, features=self.features, changes=self.changes)

    @classmethod
    def load(cls, path: Path) -> Found:
        """Reads what `save` wrote.

        Raises:
            DataError: If the file is not whole.
        """
        try:
            with path.open("rb") as opened, np.load(opened) as file:
                return cls(file["totals"], file["features"], file["changes"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DataError(f"{path} is damaged ({error}); delete it, and its choice is measured again") from error


@dataclass(frozen=True)
class Lens:
    """What the outputs of a policy on one batch are compared with.

    Attributes:
        task: The task.
        batch: The batch.
        reference: The float network's outputs.
        point: The base's outputs.
        gradient: Derivative of the divergence at the base's outputs; None at a float base, where it is zero.
        rows: Which outputs are kept.
        kept: Those of the base.
        projection: What makes coordinates few.
    """

    task: Task
    batch: Any
    reference: Tensor
    point: Tensor
    gradient: Tensor | None
    rows: OutputRows
    kept: Tensor
    projection: Projection

    def __call__(self, outputs: Tensor) -> Found:
        """Compares the outputs of a policy on this batch.

        Raises:
            DataError: If the task's divergence is not one value per sample.
            UnsupportedError: If interactions cannot be derived from it.
        """
        with torch.no_grad():
            distances = self.task.divergence(self.reference, outputs)
            if distances.shape != (len(outputs),):
                raise DataError(
                    f"{type(self.task).__name__}.divergence returned shape {tuple(distances.shape)}; "
                    "it must return one value per sample"
                )
            change = _precise(outputs) - _precise(self.point)
            totals = [
                _sum(distances),
                0.0 if self.gradient is None else _sum(self.gradient * change),
                _sum(self.task.loss(outputs, self.batch)) if has_loss(self.task) else np.nan,
                _sum(self.task.score(outputs, self.batch)) if self.task.per_sample else np.nan,
            ]
            features = self.projection(tangent(self.task, self.point, change)).float()
            changes = self.rows(outputs) - self.kept
        return Found(np.array(totals), features.flatten().cpu().numpy(), changes.cpu().numpy())


def make_lenses(
    task: Task,
    simulated: QuantizedModel,
    batches: Sequence[Any],
    own: range,
    base: Base,
    bounds: Bounds,
) -> tuple[list[Lens], list[Extent]]:
    """What outputs on the shard's batches are compared with, and how large outputs are on all batches.

    The float network runs on all of them, so that every shard chooses the same rows as the whole.
    """

    def measured(found: Tensor, number: int) -> tuple[Extent, Tensor | None]:
        return extent_of(task, batches[number], found), found.clone() if number in own else None

    seen = PrefixRunner(simulated, task, batches).run({}, measured)
    extents = [extent for extent, _ in seen]
    references = [reference for _, reference in seen if reference is not None]
    points = references
    if base:
        points = PrefixRunner(simulated, task, [batches[n] for n in own]).run(base, lambda found, n: found.clone())
    outputs = shared_width(extents, bounds.outputs)
    limits = quotas(extents, outputs, bounds.numbers)
    width = max(1, min(bounds.width, FEATURES // sum(extent.samples for extent in extents)))
    lenses = []
    for number, reference, point in zip(own, references, points, strict=True):
        rows = choose_rows(task, batches[number], reference, limits[number], outputs, (bounds.seed, number))
        gradient = slope(task, reference, point) if base else None
        projection = Projection(width, (bounds.seed, number))
        lenses.append(Lens(task, batches[number], reference, point, gradient, rows, rows(point), projection))
    return lenses, extents


def has_loss(task: Task) -> bool:
    """Whether a task has a loss of its own."""
    return type(task).loss is not Task.loss


def _precise(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def _sum(values: Tensor) -> float:
    return float(values.double().sum())
