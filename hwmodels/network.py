"""What a trained network consists of, as a cost model sees it: layers, other operations, the tensors between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from hwmodels.precision import Format

Shape = tuple[int, ...]

FUSED = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "leaky_relu"})
"""Activations that runtimes compute in the epilogue of the layer before them."""


@dataclass(frozen=True)
class Tensor:
    """A value that flows between operations.

    Shapes are those of the example input; `values` counts one sample of it, so that costs scale with the workload's
    batch. Views, reshapes and flattened copies are the same tensor: they hold the same values.

    Attributes:
        name: Unique name: the producer's, or `input`, `input.1`, ... for what the network is given.
        shape: Shape on the example input, samples first.
        producer: Layer or operation that writes it; None for network inputs.
        consumers: Layers and operations that read it, in execution order.
        is_integer: True for token ids, masks and the like.
    """

    name: str
    shape: Shape
    producer: str | None
    consumers: tuple[str, ...] = ()
    is_integer: bool = False

    @property
    def values(self) -> int:
        """Values per sample."""
        return math.prod(self.shape[1:])


@dataclass(frozen=True)
class Operation:
    """Something the network does besides its quantizable layers, such as `add`, `relu` or `cat`."""

    name: str
    kind: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer(Operation):
    """A module or parameter whose weight can be quantized; `macs` and activations are per sample.

    Attributes:
        name: Fully qualified module name, or the parameter's where a module holds several weights (LSTM, attention).
        kind: `conv1d`, `conv2d`, `conv3d`, `conv_transpose1d..3d`, `linear`, `embedding`, `lstm`, `gru`, `attention`.
        weight_shape: Shape of the weight as the module stores it.
        channel_axis: Axis of `weight_shape` that holds the output channels, each with a scale of its own.
        macs: Multiply-accumulates per sample, over all calls.
        bias_count: Number of bias values, stored in float.
        input_shape: Shape of the tensor the layer reads, samples first.
        output_shape: Shape of the tensor it writes.
        groups: Groups of a convolution; equal to the input channels for a depthwise one.
        kernel: Kernel size of a convolution.
        stride: Stride of a convolution.
        calls: How often one forward pass runs it.
        quantizes_input: False for weight-only layers, whose input stays in float.
    """

    weight_shape: Shape = ()
    channel_axis: int = 0
    macs: int = 0
    bias_count: int = 0
    input_shape: Shape = ()
    output_shape: Shape = ()
    groups: int = 1
    kernel: Shape = ()
    stride: Shape = ()
    calls: int = 1
    quantizes_input: bool = True

    @cached_property
    def weight_count(self) -> int:
        """Number of weight values."""
        return math.prod(self.weight_shape)

    @property
    def channels(self) -> int:
        """Number of output channels, each with a weight scale of its own."""
        return self.weight_shape[self.channel_axis]

    def weight_bits(self, format: Format) -> int:
        """Bits the weight takes in a format, with scales, zero points and codebooks."""
        return format.storage_bits(self.weight_count, format.groups(self.weight_shape, self.channel_axis))

    @property
    def is_depthwise(self) -> bool:
        """True for a convolution of which every group reads one input channel, whatever it makes of it."""
        if self.groups == 1:
            return False
        is_transposed = self.kind.startswith("conv_transpose")  # whose weights are stored as (in, out / groups, ...)
        in_channels = self.weight_shape[0] if is_transposed else self.weight_shape[1] * self.groups
        return self.groups == in_channels


@dataclass(frozen=True)
class Network:
    """Layers and operations in execution order, and the tensors they pass.

    Attributes:
        layers: Quantizable layers, in the order they first run.
        operations: Everything else that computes.
        tensors: Every tensor by name.
        other_parameters: Number of parameters and buffers outside the layers' weights and biases, stored in float.
        order: Names of layers and operations in execution order.
        outputs: Names of the tensors the network returns.
    """

    layers: tuple[Layer, ...]
    operations: tuple[Operation, ...] = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)
    other_parameters: int = 0
    order: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> Layer:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names."""
        return tuple(layer.name for layer in self.layers)

    @cached_property
    def weight_count(self) -> int:
        """Weights of all layers."""
        return sum(layer.weight_count for layer in self.layers)

    def is_fused(self, operation: Operation) -> bool:
        """Whether an operation is computed in the epilogue of the layer whose output it alone reads."""
        tensors = [self.tensors[name] for name in operation.reads]
        return (
            operation.kind in FUSED
            and len(tensors) == 1
            and tensors[0].consumers == (operation.name,)
            and tensors[0].producer in self._by_name
        )

    def source_layer(self, tensor: str) -> Layer | None:
        """The layer that leaves a tensor, through an activation fused with it; None where it is none."""
        producer = self.tensors[tensor].producer
        if producer in self._by_name:
            return self._by_name[producer]
        operation = self._operations.get(producer or "")
        if operation is None or not self.is_fused(operation):
            return None
        return self.source_layer(operation.reads[0])

    @cached_property
    def _operations(self) -> dict[str, Operation]:
        return {operation.name: operation for operation in self.operations}

    def input_tensor(self, layer: Layer) -> str | None:
        """Name of the tensor whose values the layer's input format applies to; None for weight-only layers."""
        return layer.reads[0] if layer.quantizes_input and layer.reads else None

    def to_rows(self) -> list[dict[str, Any]]:
        """The layers as plain records, for `layers.json`."""
        return [asdict(layer) | {"weight_count": layer.weight_count} for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """The network as plain values, for `network.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Network:
        """Reads what `to_dict` wrote, also when it went through JSON."""
        return cls(
            layers=tuple(Layer(**_tuples(layer)) for layer in values["layers"]),
            operations=tuple(Operation(**_tuples(operation)) for operation in values["operations"]),
            tensors={name: Tensor(**_tuples(tensor)) for name, tensor in values["tensors"].items()},
            other_parameters=values["other_parameters"],
            order=tuple(values["order"]),
            outputs=tuple(values["outputs"]),
        )


def _tuples(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's fields, with the lists that JSON makes of tuples turned back."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in record.items()}
