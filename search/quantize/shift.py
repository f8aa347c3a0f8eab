"""The shift of a layer's mean output that a weight error causes, from the mean of the layer's input.

The layers handled are linear in their input, so the mean output is the output for the mean input, exactly; for a
convolution the mean is taken over samples only, so that padding at the borders counts as it does in the network (Nagel
et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, arXiv 1906.04721, section 4.2).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

LINEAR_KINDS = (nn.Linear, _ConvNd)


class Mean:
    """The mean of a layer's inputs over samples: of shape `(features,)`, or of one sample for a convolution."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, x: Tensor) -> None:
        """Adds a batch of inputs; inputs of a convolution with another size than the first are left out."""
        rows = input_rows(self._module, x)
        total = rows.sum(0, dtype=torch.float32)
        if self._sum is None:
            self._sum = torch.zeros_like(total)
        if total.shape == self._sum.shape:
            self._sum += total
            self._count += len(rows)

    @property
    def value(self) -> Tensor | None:
        """The mean, float32; None before anything was seen."""
        return self._sum / self._count if self._sum is not None and self._count else None


def input_rows(module: Any, x: Tensor) -> Tensor:
    """Returns an input as rows that a layer treats alike: vectors of a linear layer, samples of a convolution."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    return x if x.dim() == 2 + len(module.kernel_size) else x.unsqueeze(0)


def product(module: Any, weight: Tensor, rows: Tensor) -> Tensor:
    """Returns what a layer makes of rows of inputs with another weight and without its bias, float32.

    Args:
        module: A linear layer or a convolution of any kind.
        weight: Shaped as its own.
        rows: As `input_rows` returns them.
    """
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(weight.float(), requires_grad=False), "bias": None}
    probe._forward_hooks, probe._forward_pre_hooks = {}, {}
    with torch.no_grad():
        returned: Tensor = probe.forward(rows.float())
    return returned


def expected_shift(module: Any, weight_error: Tensor, mean_input: Tensor) -> Tensor:
    """Returns how far a weight error moves the mean output of every channel, shape `(channels,)`, float32.

    The two arguments may change places: a weight and the mean error of its input give the shift that this one causes.

    Args:
        module: A linear layer or a convolution of any kind.
        weight_error: Quantized weight minus float weight.
        mean_input: The mean of its inputs, as `Mean` has it.
    """
    moved = product(module, weight_error, mean_input.unsqueeze(0))
    return moved[0] if isinstance(module, nn.Linear) else moved[0].flatten(1).mean(1)
