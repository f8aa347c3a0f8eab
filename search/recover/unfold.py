"""A layer as a matrix product: its weight as rows, its input as the patches that these rows are multiplied with.

A linear layer and a convolution of any kind compute, for each of their groups, `patches @ matrix.mT`. What follows from
that for one matrix (GPTQ, AdaRound) then holds for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvTransposeNd

CHUNK_VALUES = 1 << 23  # of the patches made at a time, 32 MiB


def as_matrix(module: Any, weight: Tensor) -> Tensor:
    """Returns a weight as the matrices of its groups, shape `(groups, channels of one group, fan_in)`.

    Output channels are in order: the groups' first ones come first.
    """
    groups = _groups(module)
    if isinstance(module, _ConvTransposeNd):
        inputs, channels = weight.shape[0] // groups, weight.shape[1]
        return weight.reshape(groups, inputs, channels, -1).transpose(1, 2).reshape(groups, channels, -1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def from_matrix(module: Any, matrix: Tensor, like: Tensor) -> Tensor:
    """Returns matrices of groups as a weight of the shape, type and memory layout of `like`; undoes `as_matrix`."""
    if isinstance(module, _ConvTransposeNd):
        channels, inputs = like.shape[1], like.shape[0] // module.groups
        matrix = matrix.reshape(module.groups, channels, inputs, -1).transpose(1, 2)
    return torch.empty_like(like).copy_(matrix.reshape(like.shape))


def count_rows(module: Any, x: Tensor) -> int:
    """Returns how many patches an input has: one for every position of every sample's output."""
    return math.prod(_windows(module, x).shape[: _positions(module)])


def patches(module: Any, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """Returns the patches of an input, shape `(groups, rows, fan_in)`, float32; columns are those of `as_matrix`.

    Args:
        module: A linear layer or a convolution.
        x: Its input.
        rows: Indices of the patches wanted, in the order of the output's samples and positions; all by default.
    """
    windows = _windows(module, x)
    positions = _positions(module)
    if rows is None:
        chosen = windows.flatten(0, positions - 1)
    else:
        chosen = windows[torch.unravel_index(rows.to(x.device), windows.shape[:positions])]
    if isinstance(module, _ConvTransposeNd):
        chosen = chosen.flip(tuple(range(2, chosen.dim())))  # a transposed kernel meets its inputs in reverse
    return _by_group(module, chosen.flatten(1))


def patch_chunks(module: Any, x: Tensor) -> Iterator[Tensor]:
    """Yields all patches of an input as `patches` has them, some samples at a time, so that memory stays bounded."""
    samples = x.reshape(-1, x.shape[-1]) if isinstance(module, nn.Linear) else _batched(module, x)
    if len(samples):
        per_sample = _windows(module, samples[:1]).numel()
        at_once = max(CHUNK_VALUES // max(per_sample, 1), 1)
        for start in range(0, len(samples), at_once):
            yield patches(module, samples[start : start + at_once])


def output_rows(module: Any, y: Tensor, rows: Tensor | None = None) -> Tensor:
    """Returns what a layer computes from its patches, shape `(groups, rows, channels of one group)`, float32."""
    channels_last = y.movedim(channel_axis(module), -1)
    flat = channels_last.reshape(-1, channels_last.shape[-1])
    if rows is not None:
        flat = flat[rows.to(y.device)]
    return _by_group(module, flat)


def channel_axis(module: Any) -> int:
    """Axis of a layer's output that holds its channels, counted from the end."""
    return -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)


def _groups(module: Any) -> int:
    return 1 if isinstance(module, nn.Linear) else int(module.groups)


def _by_group(module: Any, rows: Tensor) -> Tensor:
    """Splits rows between the groups, shape `(groups, rows, values of one group)`, float32."""
    groups = _groups(module)
    return rows.reshape(len(rows), groups, rows.shape[1] // groups).transpose(0, 1).float()


def _positions(module: Any) -> int:
    """Leading axes of `_windows` that count patches."""
    return 1 if isinstance(module, nn.Linear) else 1 + len(module.kernel_size)


def _batched(module: Any, x: Tensor) -> Tensor:
    """Gives a single sample, which convolutions take as well, a sample axis."""
    return x if x.dim() == 2 + len(module.kernel_size) else x.unsqueeze(0)


def _windows(module: Any, x: Tensor) -> Tensor:
    """Returns a view of what every output position sees, shape `(samples, *positions, inputs, *kernel)`.

    A transposed convolution is one with a reversed kernel over the input with `stride - 1` zeros between its values.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    x = _batched(module, x)
    if isinstance(module, _ConvTransposeNd):
        x, strides = _spread(module, x), (1,) * len(module.kernel_size)
    else:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, strides = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), module.stride
    for axis, (size, dilation, stride) in enumerate(zip(module.kernel_size, module.dilation, strides, strict=True)):
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x.movedim(1, 1 + len(module.kernel_size))


def _spread(module: Any, x: Tensor) -> Tensor:
    """Returns the input of a transposed convolution with zeros between its values, padded for the reversed kernel."""
    sizes = [(size - 1) * stride + 1 for size, stride in zip(x.shape[2:], module.stride, strict=True)]
    spread = x.new_zeros((*x.shape[:2], *sizes))
    steps: Any = (..., *(slice(None, None, stride) for stride in module.stride))
    spread[steps] = x
    pads: list[int] = []
    for size, dilation, padding, more in zip(
        module.kernel_size, module.dilation, module.padding, module.output_padding, strict=True
    ):
        edge = dilation * (size - 1) - padding
        pads = [edge, edge + more, *pads]  # `pad` wants the last axis first
    return F.pad(spread, pads)
