"""MobileNetV2 as published, written down as a network: no torch, no weights.

Shapes are those of Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018, arXiv 1801.04381),
table 2, at width 1 and 224 x 224 pixels, batch norms folded into the convolutions. Layers carry the names they have in
github.com/mit-han-lab/haq, `models/mobilenetv2.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from hwmodels import Layer, Network, Operation, Tensor
from hwmodels.network import Shape

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks, stride of the first block."""

STEM, HEAD, CLASSES, SIDE = 32, 1280, 1000, 224


class Writer:
    """Writes down layers and operations one after the other, with the tensors they pass."""

    def __init__(self, channels: int, side: int) -> None:
        self._layers: list[Layer] = []
        self._operations: list[Operation] = []
        self._tensors = {"input": Tensor("input", (1, channels, side, side), None)}

    def conv(self, name: str, reads: str, channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> str:
        """Adds a convolution with bias and "same" padding; returns the tensor it writes."""
        read = self._tensors[reads].shape
        side = math.ceil(read[2] / stride)
        weight = (channels, read[1] // groups, kernel, kernel)
        macs = math.prod(weight) * side**2
        layer = self._layer("conv2d", name, reads, weight, macs, (1, channels, side, side))
        return self._add(replace(layer, groups=groups, kernel=(kernel, kernel), stride=(stride, stride)))

    def linear(self, name: str, reads: str, features: int) -> str:
        """Adds a linear layer with bias; returns the tensor it writes."""
        weight = (features, self._tensors[reads].shape[1])
        return self._add(self._layer("linear", name, reads, weight, math.prod(weight), (1, features)))

    def operation(self, name: str, kind: str, *reads: str, shape: Shape | None = None) -> str:
        """Adds something without weights, by default shaped as what it reads; returns the tensor it writes."""
        self._operations.append(Operation(name, kind, reads, (name,)))
        return self._write(name, reads, shape or self._tensors[reads[0]].shape)

    def network(self) -> Network:
        """What was written, the last tensor its output."""
        order = tuple(self._tensors)[1:]  # whatever computes writes one tensor of its own name
        return Network(tuple(self._layers), tuple(self._operations), self._tensors, order=order, outputs=(order[-1],))

    def _layer(self, kind: str, name: str, reads: str, weight: Shape, macs: int, output_shape: Shape) -> Layer:
        input_shape = self._tensors[reads].shape
        layer = Layer(name, kind, (reads,), (name,), weight, macs=macs, bias_count=weight[0])
        return replace(layer, input_shape=input_shape, output_shape=output_shape)

    def _add(self, layer: Layer) -> str:
        self._layers.append(layer)
        return self._write(layer.name, layer.reads, layer.output_shape)

    def _write(self, name: str, reads: tuple[str, ...], shape: Shape) -> str:
        for read in reads:
            tensor = self._tensors[read]
            self._tensors[read] = replace(tensor, consumers=(*tensor.consumers, name))
        self._tensors[name] = Tensor(name, shape, name)
        return name


def mobilenetv2() -> Network:
    """Writes MobileNetV2 down: 53 layers, 3,487,816 parameters with batch norms folded, 300,774,272 multiplications."""
    writer = Writer(3, SIDE)
    x = writer.conv("features.0.0", "input", STEM, kernel=3, stride=2)
    x = writer.operation("features.0.2", "hardtanh", x)
    channels, block = STEM, 0
    for expansion, width, blocks, first_stride in STAGES:
        for stride in (first_stride, *[1] * (blocks - 1)):
            block += 1
            x = _inverted_residual(writer, f"features.{block}", x, channels, width, stride, expansion)
            channels = width
    x = writer.conv(f"features.{block + 1}.0", x, HEAD)
    x = writer.operation(f"features.{block + 1}.2", "hardtanh", x)
    x = writer.operation("mean", "mean", x, shape=(1, HEAD))
    writer.linear("classifier", x, CLASSES)
    return writer.network()


def _inverted_residual(
    writer: Writer, name: str, reads: str, channels: int, width: int, stride: int, expansion: int
) -> str:
    """Expand, filter depthwise, project linearly; add what was read where the shapes agree."""
    x, hidden, at = reads, channels * expansion, 0  # `at` counts modules, a batch norm among them after each layer
    if expansion > 1:
        x = writer.conv(f"{name}.conv.0", x, hidden)
        x, at = writer.operation(f"{name}.conv.2", "hardtanh", x), 3
    x = writer.conv(f"{name}.conv.{at}", x, hidden, kernel=3, stride=stride, groups=hidden)
    x = writer.operation(f"{name}.conv.{at + 2}", "hardtanh", x)
    x = writer.conv(f"{name}.conv.{at + 3}", x, width)
    return writer.operation(f"{name}.add", "add", reads, x) if stride == 1 and channels == width else x
