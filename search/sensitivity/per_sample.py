"""Gradients of weights and biases for every sample by itself, from what a layer read and the gradient at its output.

A convolution's are those of one convolution in which every sample is a group of its own (Rochette et al., 2019, arXiv
1912.06015); a linear layer's are products over a sample's positions (Goodfellow, 2015, arXiv 1510.01799); an
embedding's are sums over the positions of each row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd


def by_sample(x: Tensor, axis: int, samples: int) -> Tensor:
    """Returns a tensor with one entry per sample, shape `(samples, its part of the axis, ...)`.

    Args:
        x: Samples lie along `axis`, each with as many neighbouring entries.
        axis: The axis.
        samples: Number of samples.
    """
    first = x.movedim(axis, 0)
    return first.reshape(samples, len(first) // samples, *first.shape[1:])


def weight_gradients(module: nn.Module, x: Tensor, gradient: Tensor) -> Tensor:
    """Returns the gradient of a layer's weight for every sample, float32, shape `(samples, *weight)`.

    Args:
        module: A linear layer, a convolution of any kind, or an embedding.
        x: What it read, as `by_sample` has it.
        gradient: The gradient at what it returned, likewise.
    """
    if isinstance(module, nn.Embedding):
        return _embedding(module, x, gradient.float())
    if isinstance(module, nn.Linear):
        return gradient.float().flatten(1, -2).mT @ x.float().flatten(1, -2)
    return _convolution(module, x.float(), gradient.float())


def bias_gradients(module: nn.Module, gradient: Tensor) -> Tensor:
    """Returns the gradient of a layer's bias for every sample, float32, shape `(samples, channels)`."""
    if isinstance(module, _ConvNd):
        return gradient.float().flatten(3).sum((1, 3))
    return gradient.float().flatten(1, -2).sum(1)


def _embedding(module: nn.Embedding, ids: Tensor, gradient: Tensor) -> Tensor:
    samples, rows = len(ids), module.num_embeddings
    places = ids.flatten(1) + rows * torch.arange(samples, device=ids.device).unsqueeze(1)
    found = gradient.new_zeros(samples * rows, module.embedding_dim)
    return found.index_add_(0, places.flatten(), gradient.flatten(0, -2)).view(samples, rows, -1)


def _convolution(module: Any, x: Tensor, gradient: Tensor) -> Tensor:
    """The weight's gradients of one convolution whose groups are those of all samples.

    A sample that takes several entries of the batch axis, such as the frames of a video, gets one group per entry.
    """
    entries = x.shape[0] * x.shape[1]
    x, padding = _padded(module, x.flatten(0, 1))
    found = torch.ops.aten.convolution_backward(
        _as_channels(gradient.flatten(0, 1)),
        _as_channels(x),
        x.new_empty(1).expand(entries * module.weight.shape[0], *module.weight.shape[1:]),  # only its shape is read
        None,
        module.stride,
        padding,
        module.dilation,
        module.transposed,
        module.output_padding,
        module.groups * entries,
        [False, True, False],
    )[1]
    return found.view(gradient.shape[0], -1, *module.weight.shape).sum(1)  # type: ignore[no-any-return]


def _padded(module: Any, x: Tensor) -> tuple[Tensor, Any]:
    """The input of a convolution with its borders filled, and how many zeros it is to add itself."""
    if module.transposed or (module.padding_mode == "zeros" and not isinstance(module.padding, str)):
        return x, module.padding
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0,) * len(module.kernel_size)


def _as_channels(x: Tensor) -> Tensor:
    """The entries of a batch as groups of channels of a single one, shape `(1, batch * channels, ...)`."""
    return x.reshape(1, -1, *x.shape[2:])
