"""Which of a task's outputs are kept of every choice: all where they are few, else rows and outputs that matter.

A row is what one softmax is taken over: the logits of a sample, or of a token of it. Of many rows a random subset is
kept. Of many classes a row keeps the target, those the float network scores highest, and the `rest`: the logsumexp of
all others. So of a single choice are exact, on kept rows: the logits of kept classes, and, since the softmax over what
is kept is the true one with all others added up, their probabilities and the cross-entropy of the target. The
divergence computed from kept rows is that of the coarser distribution, never more than the true one: what is lost is
how probability moves within the rest. Which class comes first is right unless it is one of the rest. Outputs that are
no logits are kept by sample, at the same random places in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search.errors import DataError
from search.sensitivity.tangent import belongs
from search.tasks.task import Task

OUTPUTS = 64
NUMBERS = 2**16  # rows x outputs kept of one choice: 256 KiB


@dataclass(frozen=True)
class Extent:
    """How large one batch's outputs are.

    Attributes:
        shape: Shape of the outputs.
        rows: Number of rows that have a target; of samples, where outputs are no logits.
        has_logits: Whether they are logits.
    """

    shape: tuple[int, ...]
    rows: int
    has_logits: bool

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.shape[0]

    @property
    def row_count(self) -> int:
        """Number of rows, with or without target."""
        return int(np.prod(self.shape[:-1])) if self.has_logits else self.samples

    @property
    def width(self) -> int:
        """Number of outputs in a row."""
        return self.shape[-1] if self.has_logits else int(np.prod(self.shape[1:]))


def extent_of(task: Task, batch: Any, outputs: Tensor) -> Extent:
    """Measures the float network's outputs on a batch."""
    targets = targets_of(task, batch, outputs)
    if targets is None:
        return Extent(tuple(outputs.shape), len(outputs), False)
    return Extent(tuple(outputs.shape), int(_named(targets, outputs.shape[-1]).sum()), True)


def targets_of(task: Task, batch: Any, outputs: Tensor) -> Tensor | None:
    """The class of every row of the float network's outputs, shape `(rows,)`; None where they are no logits.

    They are not taken for logits if a task overrides `divergence`, but not `targets`.
    """
    targets = task.targets(batch, outputs) if belongs(task, "targets") else None
    return None if targets is None else targets.reshape(-1).to(outputs.device, torch.int64)


def _named(targets: Tensor, classes: int) -> Tensor:
    return (targets >= 0) & (targets < classes)


@dataclass(frozen=True)
class OutputRows:
    """What is kept of one batch's outputs.

    Attributes:
        extent: How large the outputs are.
        rows: Rows kept, int64; None for all.
        classes: Of every row kept, the classes kept apart from the rest, int64, shape `(rows, outputs - 1)`, the target
            first; where outputs are no logits, places kept in every sample, shape `(outputs,)`; None for all.
        targets: Position of the target among a row's outputs, int64, shape `(rows,)`; None where there are no logits.
        samples: The sample that each row belongs to, counted within the batch, int64, shape `(rows,)`.
    """

    extent: Extent
    rows: Tensor | None
    classes: Tensor | None
    targets: Tensor | None
    samples: Tensor

    @property
    def has_rest(self) -> bool:
        """Whether the last output of a row stands for all classes that are not kept."""
        return self.extent.has_logits and self.classes is not None

    @property
    def is_complete(self) -> bool:
        """Whether all outputs are kept as they are."""
        return self.rows is None and self.classes is None

    def __call__(self, outputs: Tensor) -> Tensor:
        """Returns what is kept of outputs, float32, shape `(rows, outputs)`."""
        kept = outputs.reshape(self.extent.row_count, self.extent.width)
        if self.rows is not None:
            kept = kept[self.rows]
        kept = kept.float()
        if self.classes is None:
            return kept
        if not self.has_rest:
            return kept[:, self.classes]
        rest = kept.scatter(1, self.classes, -torch.inf).logsumexp(1, keepdim=True)
        return torch.cat([kept.gather(1, self.classes), rest], 1)


def shared_width(extents: Sequence[Extent], outputs: int = OUTPUTS) -> int:
    """How many outputs a row of any batch keeps, if at most `outputs`."""
    return min(outputs, *(extent.width for extent in extents))


def quotas(extents: Sequence[Extent], width: int, numbers: int = NUMBERS) -> list[int]:
    """How many rows each batch may keep, in proportion to those it has, so that all together stay within `numbers`.

    Args:
        extents: Of all batches.
        width: Outputs kept of a row.
        numbers: Most numbers kept, rows x outputs; at least one row is kept.

    Raises:
        DataError: If no row has a target.
    """
    total = sum(extent.rows for extent in extents)
    if not total:
        raise DataError(
            "no row of the outputs on the calibration split has a class of the model as its target; "
            "let `Task.targets` return such, or None if outputs are no logits"
        )
    allowed = min(total, max(1, numbers // width))
    ends = [allowed * end // total for end in accumulate(extent.rows for extent in extents)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def choose_rows(
    task: Task, batch: Any, reference: Tensor, quota: int, outputs: int = OUTPUTS, seed: tuple[int, int] = (0, 0)
) -> OutputRows:
    """Chooses what is kept of a batch's outputs.

    Args:
        task: Gives the targets.
        batch: The batch.
        reference: What the float network returns for it, shape `(samples, ...)`.
        quota: Most rows kept.
        outputs: Most outputs kept of a row.
        seed: Of the draws: one that all batches share, for places in samples, and the batch's own, for rows.
    """
    targets, extent = targets_of(task, batch, reference), extent_of(task, batch, reference)
    device, width = reference.device, extent.width
    every = torch.arange(extent.row_count, device=device)
    rows = every if targets is None else every[_named(targets, width)]
    if len(rows) > quota:
        rows = rows[_draw(len(rows), quota, seed).to(device)]
    samples = rows // max(1, extent.row_count // extent.samples)
    kept = None if len(rows) == len(every) else rows
    if targets is None:
        places = _draw(width, outputs, seed[:1]).to(device) if width > outputs else None
        return OutputRows(extent, kept, places, None, samples)
    targets = targets[rows]
    if width <= outputs:
        return OutputRows(extent, kept, None, targets, samples)
    logits = reference.reshape(-1, width)[rows].float()
    classes = logits.scatter(1, targets.unsqueeze(1), torch.inf).topk(outputs - 1).indices
    return OutputRows(extent, kept, classes, torch.zeros_like(targets), samples)


def _draw(count: int, size: int, seed: Sequence[int]) -> Tensor:
    """`size` of the numbers below `count`, in order."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(count, size, replace=False)))
