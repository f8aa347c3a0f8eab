"""Ranges of a network's logits: what counts is what the softmax makes of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hwmodels import Format
from search.quantize.formats import quantize_rows
from search.quantize.ranges.search import Criterion, one_by_one

MOST_ROWS = 1024
MOST_VALUES = 1 << 19


class LogitSample:
    """Rows of logits drawn evenly from all that pass by, in memory that does not grow with them.

    Each row gets a random number, and those with the smallest numbers stay, so that every row is as likely to be kept.
    """

    def __init__(self, seed: int = 0) -> None:
        """Keeps at most 1024 rows and 2**19 values, but one row at least.

        Args:
            seed: Of the random numbers; the same rows in the same batches give the same sample.
        """
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)
        self._rows = torch.empty(0, 0)

    @property
    def rows(self) -> Tensor:
        """The sample, float32 on the CPU, shape `(rows, classes)`; no rows where nothing was added."""
        return self._rows

    def add(self, logits: Tensor) -> None:
        """Adds a batch of logits; classes lie along the last axis.

        Raises:
            ValueError: If a value is not finite, or there are other classes than before.
        """
        if not logits.numel():
            return
        new = logits.detach().float().reshape(-1, logits.shape[-1])
        if not new.isfinite().all():
            raise ValueError("a logit is NaN or infinite")
        if len(self._rows) and new.shape[1] != self._rows.shape[1]:
            raise ValueError(f"logits of {new.shape[1]} classes came after logits of {self._rows.shape[1]}")
        most = min(MOST_ROWS, max(MOST_VALUES // new.shape[1], 1))
        keys = torch.cat([self._keys, torch.rand(len(new), generator=self._generator)])
        kept = keys.argsort(stable=True)[:most]
        held = kept[kept < len(self._rows)]
        drawn = kept[kept >= len(self._rows)]
        added = new[(drawn - len(self._rows)).to(new.device)].cpu()
        self._rows = torch.cat([self._rows[held], added]) if len(held) else added
        self._keys = keys[torch.cat([held, drawn])]


def cross_entropy(sample: LogitSample, format: Format) -> Criterion:
    """Returns the criterion of cross-entropy between the softmax of the logits and of the quantized logits, in nats.

    Nagel et al., "A White Paper on Neural Network Quantization", 2021, arXiv 2106.08295, section 3.1.
    """
    rows = sample.rows
    wanted, flat = rows.softmax(1), rows.reshape(1, -1)

    def one(scale: Tensor, zero_point: Tensor | None) -> Tensor:
        parameters = {"scale": scale} if zero_point is None else {"scale": scale, "zero_point": zero_point}
        quantized = quantize_rows(flat, format, parameters).reshape(rows.shape)
        return -(wanted * F.log_softmax(quantized, 1)).sum(1, dtype=torch.float64).mean()[None]

    return one_by_one(one)
