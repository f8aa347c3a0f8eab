"""What the networks are built of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Activation = Callable[[], nn.Module] | None


class ConvNorm(nn.Module):
    """A convolution with "same" padding, its batch norm, and an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: Activation = nn.ReLU,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)
        self.activation = nn.Identity() if activation is None else activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class ConvNorm3d(ConvNorm):
    """The same in three dimensions."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        activation: Activation = nn.ReLU,
    ) -> None:
        nn.Module.__init__(self)
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, tuple(size // 2 for size in kernel), bias=False)
        self.norm = nn.BatchNorm3d(outputs)
        self.activation = nn.Identity() if activation is None else activation()


class Squeeze(nn.Module):
    """Squeeze and excitation: every channel scaled by what two small layers make of all channels' means."""

    def __init__(self, channels: int, squeezed: int, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.pool, self.activation, self.gate = nn.AdaptiveAvgPool2d(1), activation(), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.activation(self.fc1(self.pool(x)))))


class Residual(nn.Module):
    """`last(body(x) + shortcut(x))`."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, last: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut, self.last = body, shortcut or nn.Identity(), last or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x) + self.shortcut(x))


class Branches(nn.Module):
    """What several modules make of the same input, side by side along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def classifier(inputs: int, classes: int = 1000) -> nn.Sequential:
    """Means over positions, then one linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def rounded(channels: float, step: int = 8) -> int:
    """Channels rounded to a multiple of `step`, at most a tenth below what was asked (MobileNetV2's rule)."""
    nearest = max(step, int(channels + step / 2) // step * step)
    return nearest + step if nearest < 0.9 * channels else nearest


def fold(model: nn.Module) -> nn.Module:
    """Drops every batch norm that follows a convolution and gives the convolution its bias, in place."""
    for module in model.modules():
        if isinstance(module, ConvNorm) and not isinstance(module.norm, nn.Identity):
            weight = module.conv.weight
            module.conv.bias = nn.Parameter(torch.empty(len(weight), device=weight.device))
            module.norm = nn.Identity()
    return model
