"""What is timed or priced: the kind and shape of one call of an operation, and the matrix product its kernels run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from hwmodels.cost import Workload
from hwmodels.network import Layer, Shape


class Gemm(NamedTuple):
    """`groups` matrix products of m x k by k x n."""

    m: int
    n: int
    k: int
    groups: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.m * self.n * self.k * self.groups


@dataclass(frozen=True)
class Site:
    """Kind and shape of one call of an operation: all that its time depends on besides precision and threads.

    Attributes:
        kind: As `Layer.kind`: `linear`, `conv2d`, ...
        batch: Samples of a convolution; rows of a linear layer (samples times tokens).
        in_channels: Input channels, or features.
        out_channels: Output channels, or features.
        kernel: Kernel size of a convolution; empty otherwise.
        stride: Stride of a convolution; empty otherwise.
        groups: Groups of a convolution.
        in_size: Spatial size of a convolution's input; empty otherwise.
        out_size: Spatial size of its output; empty otherwise.
    """

    kind: str
    batch: int
    in_channels: int
    out_channels: int
    kernel: Shape = ()
    stride: Shape = ()
    groups: int = 1
    in_size: Shape = ()
    out_size: Shape = ()

    @classmethod
    def of(cls, layer: Layer, workload: Workload) -> Site:
        """The site of the first call of a layer; see `mean_size` for layers whose calls differ in size.

        A weight whose parts are applied to sequences of different lengths, as that of cross attention, counts the rows
        that the whole of it would be applied to for as many multiply-accumulates, rounded.
        """
        if layer.kind.startswith("conv"):
            return cls(
                layer.kind,
                workload.batch,
                layer.input_shape[1],
                layer.output_shape[1],
                layer.kernel,
                layer.stride,
                layer.groups,
                tuple(layer.input_shape[2:]),
                tuple(layer.output_shape[2:]),
            )
        if layer.kind == "embedding":  # a look-up: one index in, one row out
            return cls(layer.kind, math.prod(layer.output_shape[1:-1]) * workload.batch, 1, layer.output_shape[-1])
        features = layer.weight_count // max(layer.channels, 1)
        rows = round(layer.macs / layer.calls / max(layer.weight_count, 1)) if layer.macs else 1
        return cls(layer.kind, rows * workload.batch, features, layer.channels)

    @property
    def is_depthwise(self) -> bool:
        """True for a convolution of which every group reads one input channel, as `Layer.is_depthwise`."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def gemm(self) -> Gemm:
        """The matrix products that kernels run: a row per output position, of transposed convolutions per input's."""
        if self.kind == "embedding":  # nothing is multiplied
            return Gemm(0, 0, 0)
        size = self.in_size if self.kind.startswith("conv_transpose") else self.out_size
        m, n, k = self.batch * math.prod(size), self.out_channels, self.in_channels * math.prod(self.kernel)
        if self.kind.startswith("conv_transpose"):
            n, k = n * math.prod(self.kernel), self.in_channels
        return Gemm(m, n // self.groups, k // self.groups, self.groups)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        return self.gemm.macs

    @property
    def weight_values(self) -> int:
        """Weights of the layer; of an embedding those of one row, which is what a look-up reads."""
        return math.prod(self.kernel) * self.in_channels * self.out_channels // self.groups

    @property
    def input_values(self) -> int:
        """Values read."""
        return self.batch * self.in_channels * math.prod(self.in_size)

    @property
    def output_values(self) -> int:
        """Values written."""
        return self.batch * self.out_channels * math.prod(self.out_size)


def mean_size(layer: Layer, site: Site, workload: Workload) -> float:
    """Multiply-accumulates of a layer's calls on average, in those of its site: 1 where all calls have one shape."""
    counted = site.macs * layer.calls
    return layer.macs * workload.batch / counted if counted and layer.macs else 1.0
