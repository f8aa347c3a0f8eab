"""ResNets and their relatives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .blocks import ConvNorm, ConvNorm3d, Residual, Squeeze, classifier


def resnet18() -> nn.Module:
    """He et al., 2016 (arXiv 1512.03385): two 3 x 3 convolutions per block."""
    stages: list[nn.Module] = []
    inputs = 64
    for number, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if number and not block else 1
            body = nn.Sequential(ConvNorm(inputs, width, 3, stride), ConvNorm(width, width, 3, activation=None))
            stages.append(Residual(body, _shortcut(inputs, width, stride), nn.ReLU()))
            inputs = width
    return nn.Sequential(_stem(), *stages, classifier(512))


def bottlenecks(
    blocks: Sequence[int], base: int = 64, groups: int = 1, strides: Sequence[int] = (1, 2, 2, 2), dilate: bool = False
) -> nn.Sequential:
    """Stem and stages of 1 x 1, 3 x 3, 1 x 1 blocks, the 3 x 3 with the stride (torchvision's v1.5).

    Args:
        blocks: Blocks of each stage.
        base: Channels of a group in the first stage.
        groups: Groups of the 3 x 3 convolutions.
        strides: Stride of each stage's first block.
        dilate: Whether the last two stages keep their size and dilate instead.
    """
    stages: list[nn.Module] = []
    inputs, dilation = 64, 1
    for number, (count, first) in enumerate(zip(blocks, strides, strict=True)):
        width, outputs = base * groups * 2**number, 256 * 2**number
        if dilate and number >= 2:
            first, wider = 1, 2 * dilation
        else:
            wider = dilation
        for block in range(count):
            stride = 1 if block else first
            body = nn.Sequential(
                ConvNorm(inputs, width),
                ConvNorm(width, width, 3, stride, groups, dilation=wider if block else dilation),
                ConvNorm(width, outputs, activation=None),
            )
            stages.append(Residual(body, _shortcut(inputs, outputs, stride), nn.ReLU()))
            inputs = outputs
        dilation = wider
    return nn.Sequential(_stem(), *stages)


def bottleneck_classifier(blocks: Sequence[int], base: int = 64, groups: int = 1) -> nn.Module:
    """ResNet-50 and 101, ResNeXt (Xie et al., 2017), Wide ResNet (Zagoruyko and Komodakis, 2016)."""
    return nn.Sequential(bottlenecks(blocks, base, groups), classifier(2048))


def fcn_resnet50() -> nn.Module:
    """Long et al., 2015 (arXiv 1411.4038), as torchvision has it: dilated ResNet-50, two convolutions, resized."""
    head = nn.Sequential(ConvNorm(2048, 512, 3), nn.Dropout(0.1), nn.Conv2d(512, 21, 1))
    return nn.Sequential(bottlenecks((3, 4, 6, 3), dilate=True), head, nn.Upsample(scale_factor=8, mode="bilinear"))


def regnet_y_800mf() -> nn.Module:
    """Radosavovic et al., 2020 (arXiv 2003.13678): grouped bottlenecks of ratio 1, with squeeze and excitation."""
    stages: list[nn.Module] = []
    inputs = 32
    for width, count in ((64, 1), (144, 3), (320, 8), (784, 2)):
        for block in range(count):
            stride = 1 if block else 2
            body = nn.Sequential(
                ConvNorm(inputs, width),
                ConvNorm(width, width, 3, stride, width // 16),
                Squeeze(width, round(inputs / 4), nn.ReLU, nn.Sigmoid),
                ConvNorm(width, width, activation=None),
            )
            stages.append(Residual(body, _shortcut(inputs, width, stride), nn.ReLU()))
            inputs = width
    return nn.Sequential(ConvNorm(3, 32, 3, 2), *stages, classifier(784))


def resnet_3d() -> nn.Module:
    """R3D-18 (Tran et al., 2018, arXiv 1711.11248): ResNet-18 with 3 x 3 x 3 convolutions, for clips of video."""
    conv = partial(ConvNorm3d, kernel=(3, 3, 3))
    stages: list[nn.Module] = [ConvNorm3d(3, 64, (3, 7, 7), (1, 2, 2))]
    inputs = 64
    for number, width in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = (2, 2, 2) if number and not block else (1, 1, 1)
            body = nn.Sequential(
                conv(inputs, width, stride=stride), conv(width, width, stride=(1, 1, 1), activation=None)
            )
            shortcut = None if inputs == width else ConvNorm3d(inputs, width, (1, 1, 1), stride, activation=None)
            stages.append(Residual(body, shortcut, nn.ReLU()))
            inputs = width
    return nn.Sequential(*stages, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(512, 400))


class DenseLayer(nn.Module):
    """Adds 32 channels to what it reads; its first norm follows no convolution and stays."""

    def __init__(self, inputs: int, growth: int = 32) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(inputs), nn.ReLU()
        self.narrow = ConvNorm(inputs, 4 * growth)
        self.grow = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.grow(self.narrow(self.relu(self.norm(x))))], 1)


def densenet121() -> nn.Module:
    """Huang et al., 2017 (arXiv 1608.06993)."""
    modules: list[nn.Module] = [_stem()]
    width = 64
    for number, count in enumerate((6, 12, 24, 16)):
        if number:
            halve = nn.Conv2d(width, width // 2, 1, bias=False)
            modules += [nn.BatchNorm2d(width), nn.ReLU(), halve, nn.AvgPool2d(2)]
            width //= 2
        for _ in range(count):
            modules.append(DenseLayer(width))
            width += 32
    return nn.Sequential(*modules, nn.BatchNorm2d(width), nn.ReLU(), classifier(width))


def _stem() -> nn.Sequential:
    return nn.Sequential(ConvNorm(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if inputs == outputs and stride == 1:
        return None
    return ConvNorm(inputs, outputs, 1, stride, activation=None)
