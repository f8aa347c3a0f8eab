"""The small convolutional networks of the built-in tasks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Returns a bias-free convolution with "same" padding and its batch norm."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out)]


class Residual(nn.Module):
    """The basic block of He et al., 2016 (arXiv 1512.03385): two 3x3 convolutions and a shortcut, added, then ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(c_in, c_out, stride=stride)
        self.conv2, self.bn2 = conv_bn(c_out, c_out)
        project = stride != 1 or c_in != c_out
        self.shortcut = nn.Sequential(*conv_bn(c_in, c_out, 1, stride)) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network for small images: stem, stages of basic blocks, global average pooling, classifier."""

    def __init__(self, widths: tuple[int, ...], blocks: int, channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv, self.bn = conv_bn(channels, widths[0])
        stages, c_in = [], widths[0]
        for stage, width in enumerate(widths):
            first = Residual(c_in, width, stride=1 if stage == 0 else 2)
            stages.append(nn.Sequential(first, *(Residual(width, width) for _ in range(blocks - 1))))
            c_in = width
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class InvertedResidual(nn.Module):
    """Sandler et al., 2018 (arXiv 1801.04381): expand, filter depthwise, project linearly, add where shapes agree."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        expand = [*conv_bn(c_in, hidden, 1), nn.ReLU6()] if expansion != 1 else []
        depthwise = [*conv_bn(hidden, hidden, stride=stride, groups=hidden), nn.ReLU6()]
        self.body = nn.Sequential(*expand, *depthwise, *conv_bn(hidden, c_out, 1))
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.adds else out


class MobileNetV2(nn.Module):
    """MobileNetV2 scaled to 28x28 images: about 230,000 parameters."""

    # expansion, channels, blocks, stride of the first block
    STAGES = ((1, 16, 1, 1), (4, 24, 2, 2), (4, 32, 3, 1), (4, 64, 2, 2), (4, 96, 2, 1))

    def __init__(self, channels: int = 1, classes: int = 10, head: int = 256) -> None:
        super().__init__()
        layers: list[nn.Module] = [*conv_bn(channels, 16), nn.ReLU6()]
        c_in = 16
        for expansion, width, blocks, stride in self.STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(c_in, width, stride if block == 0 else 1, expansion))
                c_in = width
        self.features = nn.Sequential(*layers, *conv_bn(c_in, head, 1), nn.ReLU6())
        self.classifier = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


def digits_net() -> ResNet:
    """Returns the network of the digits task: a ResNet-8 with 8, 16 and 32 channels."""
    return ResNet((8, 16, 32), blocks=1)


def resnet20() -> ResNet:
    """Returns ResNet-20 (16, 32 and 64 channels, three blocks a stage): about 270,000 parameters."""
    return ResNet((16, 32, 64), blocks=3)


def mobilenetv2() -> MobileNetV2:
    """Returns the scaled MobileNetV2."""
    return MobileNetV2()
