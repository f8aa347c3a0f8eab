"""Which values share a scale: a tensor laid out as rows, one row per scale, codebook or threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hwmodels import Format


@dataclass(frozen=True)
class Groups:
    """A tensor as rows that share a scale each.

    Channel 0's groups come first; within a channel, values keep the order they have in memory when the channel axis is
    moved to the front: inputs, then kernel positions. Rows that are views share the tensor's memory.

    Attributes:
        rows: Shape `(groups, values)`, in the tensor's type; a channel's last group may be padded with zeros.
        mask: True for values of the tensor, False for padding, shape as `rows`; None where nothing is padded.
    """

    rows: Tensor
    mask: Tensor | None
    _like: Tensor
    _axis: int

    def restore(self, rows: Tensor) -> Tensor:
        """Returns rows as a tensor of the original's shape and memory layout, in the type of `rows`; drops padding."""
        if self._like.dim() == 0:
            return rows.reshape(())
        moved = self._like.movedim(self._axis, 0).shape
        channels = moved[0]
        if self.mask is not None:
            rows = rows.reshape(channels, -1)[:, : math.prod(moved[1:])]
        values = rows.reshape(moved).movedim(0, self._axis)
        if values.stride() == self._like.stride():
            return values
        return torch.empty_like(self._like, dtype=rows.dtype).copy_(values)


def to_groups(tensor: Tensor, format: Format, axis: int = 0) -> Groups:
    """Lays a weight out in the rows that share a scale, of which there are `format.groups(tensor.shape, axis)`.

    Groups are consecutive values of one channel along `axis`. A group larger than a channel holds the whole channel.
    """
    if tensor.dim() == 0:
        return Groups(tensor.reshape(1, 1), None, tensor, 0)
    by_channel = tensor.movedim(axis, 0).reshape(tensor.shape[axis], math.prod(_others(tensor, axis)))
    if format.granularity != "group":
        count = format.groups(tensor.shape, axis)
        return Groups(by_channel.reshape(count, tensor.numel() // max(count, 1)), None, tensor, axis)
    values = by_channel.shape[1]
    size = min(format.group, values) or 1
    padding = -values % size
    rows = F.pad(by_channel, (0, padding)).reshape(-1, size) if padding else by_channel.reshape(-1, size)
    return Groups(rows, _mask(by_channel, size) if padding else None, tensor, axis)


def _others(tensor: Tensor, axis: int) -> list[int]:
    axis %= tensor.dim()
    return [size for dim, size in enumerate(tensor.shape) if dim != axis]


def _mask(by_channel: Tensor, size: int) -> Tensor:
    channels, values = by_channel.shape
    inside = torch.arange(math.ceil(values / size) * size, device=by_channel.device) < values
    return inside.expand(channels, -1).reshape(-1, size)
