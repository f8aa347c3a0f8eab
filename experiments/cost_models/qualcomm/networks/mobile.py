"""Networks of depthwise convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .blocks import Activation, ConvNorm, Residual, Squeeze, classifier, rounded


def inverted_residual(
    inputs: int,
    hidden: int,
    outputs: int,
    kernel: int,
    stride: int,
    activation: Activation,
    squeeze: Callable[[int], nn.Module] | None = None,
) -> nn.Module:
    """Widened by a 1 x 1, filtered depthwise, narrowed by a 1 x 1 (Sandler et al., 2018, arXiv 1801.04381)."""
    layers: list[nn.Module] = [] if hidden == inputs else [ConvNorm(inputs, hidden, activation=activation)]
    layers.append(ConvNorm(hidden, hidden, kernel, stride, hidden, activation))
    if squeeze is not None:
        layers.append(squeeze(hidden))
    body = nn.Sequential(*layers, ConvNorm(hidden, outputs, activation=None))
    return Residual(body) if stride == 1 and inputs == outputs else body


def mobilenet_v2() -> nn.Module:
    """Sandler et al., 2018, width 1."""
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    modules: list[nn.Module] = [ConvNorm(3, 32, 3, 2, activation=nn.ReLU6)]
    inputs = 32
    for expansion, width, count, first in stages:
        for stride in (first, *[1] * (count - 1)):
            modules.append(inverted_residual(inputs, expansion * inputs, width, 3, stride, nn.ReLU6))
            inputs = width
    return nn.Sequential(*modules, ConvNorm(inputs, 1280, activation=nn.ReLU6), classifier(1280))


def mnasnet05() -> nn.Module:
    """MnasNet-B1 (Tan et al., 2019, arXiv 1807.11626) at half width, as torchvision has it."""
    stages = (
        (24, 3, 3, 3, 2),
        (40, 5, 3, 3, 2),
        (80, 5, 6, 3, 2),
        (96, 3, 6, 2, 1),
        (192, 5, 6, 4, 2),
        (320, 3, 6, 1, 1),
    )
    stem, inputs = rounded(16), rounded(8)
    modules: list[nn.Module] = [ConvNorm(3, stem, 3, 2), ConvNorm(stem, stem, 3, groups=stem)]
    modules.append(ConvNorm(stem, inputs, activation=None))
    for channels, kernel, expansion, count, first in stages:
        width = rounded(channels / 2)
        for stride in (first, *[1] * (count - 1)):
            modules.append(inverted_residual(inputs, expansion * inputs, width, kernel, stride, nn.ReLU))
            inputs = width
    return nn.Sequential(*modules, ConvNorm(inputs, 1280), classifier(1280))


LARGE = (
    *((3, 16, 16, "", 1), (3, 64, 24, "", 2), (3, 72, 24, "", 1), (5, 72, 40, "s", 2), (5, 120, 40, "s", 1)),
    *((5, 120, 40, "s", 1), (3, 240, 80, "h", 2), (3, 200, 80, "h", 1), (3, 184, 80, "h", 1), (3, 184, 80, "h", 1)),
    *((3, 480, 112, "sh", 1), (3, 672, 112, "sh", 1), (5, 672, 160, "sh", 2), (5, 960, 160, "sh", 1)),
    (5, 960, 160, "sh", 1),
)
SMALL = (
    *((3, 16, 16, "s", 2), (3, 72, 24, "", 2), (3, 88, 24, "", 1), (5, 96, 40, "sh", 2), (5, 240, 40, "sh", 1)),
    *(
        (5, 240, 40, "sh", 1),
        (5, 120, 48, "sh", 1),
        (5, 144, 48, "sh", 1),
        (5, 288, 96, "sh", 2),
        (5, 576, 96, "sh", 1),
    ),
    (5, 576, 96, "sh", 1),
)
"""Kernel, hidden channels, channels, `s` with squeeze and excitation and `h` with hard swish, stride."""


def mobilenet_v3(blocks: Sequence[tuple[int, int, int, str, int]], hidden: int) -> nn.Module:
    """Howard et al., 2019 (arXiv 1905.02244); `hidden` features before the last layer."""
    modules: list[nn.Module] = [ConvNorm(3, 16, 3, 2, activation=nn.Hardswish)]
    inputs = 16
    for kernel, middle, outputs, marks, stride in blocks:
        activation: Activation = nn.Hardswish if "h" in marks else nn.ReLU
        squeeze = partial(_hard_squeeze, divisor=4) if "s" in marks else None
        modules.append(inverted_residual(inputs, middle, outputs, kernel, stride, activation, squeeze))
        inputs = outputs
    modules += [ConvNorm(inputs, 6 * inputs, activation=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*modules, nn.Linear(6 * inputs, hidden), nn.Hardswish(), nn.Linear(hidden, 1000))


def _hard_squeeze(channels: int, divisor: int) -> nn.Module:
    return Squeeze(channels, rounded(channels / divisor), nn.ReLU, nn.Hardsigmoid)


def efficientnet(width: float, depth: float, head: int) -> nn.Module:
    """Tan and Le, 2019 (arXiv 1905.11946), B0 scaled in width and depth."""
    stages = ((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3))
    stages += ((6, 5, 2, 192, 4), (6, 3, 1, 320, 1))
    inputs = rounded(32 * width)
    modules: list[nn.Module] = [ConvNorm(3, inputs, 3, 2, activation=nn.SiLU)]
    for expansion, kernel, first, channels, count in stages:
        outputs = rounded(channels * width)
        for block in range(math.ceil(count * depth)):
            squeeze = partial(_squeeze, squeezed=max(1, inputs // 4))
            stride = 1 if block else first
            modules.append(inverted_residual(inputs, expansion * inputs, outputs, kernel, stride, nn.SiLU, squeeze))
            inputs = outputs
    return nn.Sequential(*modules, ConvNorm(inputs, head, activation=nn.SiLU), classifier(head))


def efficientnet_v2_s() -> nn.Module:
    """Tan and Le, 2021 (arXiv 2104.00298): the first stages widen by 3 x 3 convolutions instead of depthwise ones."""
    modules: list[nn.Module] = [ConvNorm(3, 24, 3, 2, activation=nn.SiLU)]
    inputs = 24
    for expansion, first, outputs, count in ((1, 1, 24, 2), (4, 2, 48, 4), (4, 2, 64, 4)):
        for block in range(count):
            modules.append(_fused_residual(inputs, expansion, outputs, 1 if block else first))
            inputs = outputs
    for expansion, first, outputs, count in ((4, 2, 128, 6), (6, 1, 160, 9), (6, 2, 256, 15)):
        for block in range(count):
            squeeze = partial(_squeeze, squeezed=inputs // 4)
            stride = 1 if block else first
            modules.append(inverted_residual(inputs, expansion * inputs, outputs, 3, stride, nn.SiLU, squeeze))
            inputs = outputs
    return nn.Sequential(*modules, ConvNorm(inputs, 1280, activation=nn.SiLU), classifier(1280))


def _squeeze(channels: int, squeezed: int) -> nn.Module:
    return Squeeze(channels, squeezed, nn.SiLU, nn.Sigmoid)


def _fused_residual(inputs: int, expansion: int, outputs: int, stride: int) -> nn.Module:
    if expansion == 1:
        body: nn.Module = ConvNorm(inputs, outputs, 3, stride, activation=nn.SiLU)
    else:
        wide = ConvNorm(inputs, expansion * inputs, 3, stride, activation=nn.SiLU)
        body = nn.Sequential(wide, ConvNorm(expansion * inputs, outputs, activation=None))
    return Residual(body) if stride == 1 and inputs == outputs else body


class ShuffleUnit(nn.Module):
    """Halves the channels, or the positions, and shuffles what comes out."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.splits = stride == 1
        self.left: nn.Module = nn.Identity()
        if not self.splits:
            self.left = nn.Sequential(ConvNorm(inputs, inputs, 3, 2, inputs, None), ConvNorm(inputs, half))
        self.right = nn.Sequential(
            ConvNorm(half if self.splits else inputs, half),
            ConvNorm(half, half, 3, stride, half, None),
            ConvNorm(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.splits else (x, x)
        n, _, height, width = x.shape
        joined = torch.cat([self.left(left), self.right(right)], 1)
        height, width = joined.shape[2:]
        return joined.view(n, 2, -1, height, width).transpose(1, 2).reshape(n, -1, height, width)


def shufflenet_v2() -> nn.Module:
    """Ma et al., 2018 (arXiv 1807.11164), at half width."""
    modules: list[nn.Module] = [ConvNorm(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 24
    for width, count in ((48, 4), (96, 8), (192, 4)):
        for block in range(count):
            modules.append(ShuffleUnit(inputs, width, 1 if block else 2))
            inputs = width
    return nn.Sequential(*modules, ConvNorm(inputs, 1024), classifier(1024))
