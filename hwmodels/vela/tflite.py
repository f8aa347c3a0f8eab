"""Writes a network as the TFLite file that an Ethos-U runs at a policy: shapes and widths as they are, values made up.

Layers read and write tensors of one width, 8 or 16 bits; where the next layer reads another, an operator in between
requantizes. Other operations run in the width of what they read first, that is, of the layer they follow. Activations
that runtimes fuse are fused. What a traced network does not say is taken from the shapes: padding, and the windows of
pooling, which are the smallest that cover their input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hwmodels.network import Layer, Network, Operation, Shape
from hwmodels.vela.flatbuffer import FlatbufferWriter, Value
from hwmodels.vela.held import Held, weight_values

LAYER_KINDS = ("conv1d", "conv2d", "linear")
"""Kinds of layers that are written for the NPU."""

NO_ACTIVATION, RELU, RELU6 = 0, 1, 3  # ActivationFunctionType
SAME, VALID = 0, 1  # Padding
ACTIVATIONS = {"relu": RELU, "clamp_min": RELU, "relu6": RELU6, "hardtanh": RELU6, "clamp": RELU6, "clamp_max": RELU6}
BINARIES = {"add": "ADD", "sub": "SUB", "mul": "MUL"}
TABLES = frozenset(
    {"sigmoid", "tanh", "silu", "gelu", "hardswish", "hardsigmoid", "elu", "leaky_relu", "softplus", "mish"}
)
"""Functions of one value: look-ups in a table on the NPU, which take the same time whatever is in it."""

POOLS = frozenset({"max_pool2d", "avg_pool2d", "adaptive_max_pool2d", "adaptive_avg_pool2d", "mean"})
NOTHING = frozenset({"dropout", "identity", "contiguous", "clone"})
OPERATION_KINDS = (*ACTIVATIONS, *BINARIES, *sorted(TABLES), *sorted(POOLS), "cat", "pad", "softmax", *sorted(NOTHING))
"""Kinds of operations that are written for the NPU."""

SCALES = (0.02, 0.03, 0.05)  # of one tensor after the other: operands of an addition seldom share theirs


@dataclass(frozen=True)
class TfliteFile:
    """A TFLite file, and what in the network its operators belong to.

    Attributes:
        data: The file.
        owners: For each operator the name of the layer or operation it stands for.
        requantized: Operators that requantize: their number to the values they convert and the bits they write.
    """

    data: bytes
    owners: tuple[str, ...]
    requantized: Mapping[int, tuple[int, int]]


def write_tflite(
    network: Network, held: Mapping[str, Held], weights: Mapping[str, np.ndarray] | None = None
) -> TfliteFile:
    """Writes a network for one sample.

    Args:
        network: The network, batch norms folded.
        held: For every layer how its precision is held.
        weights: Layer name to its weight in 8 bits, in the module's shape; other weights are random, always the same.

    Raises:
        ValueError: If a layer or operation is none that the NPU runs, or a layer's calls cannot be told apart.
    """
    return _Translation(network, held, weights or {}).write()


class _Translation:
    """Walks through a network and writes one operator after the other."""

    def __init__(self, network: Network, held: Mapping[str, Held], weights: Mapping[str, np.ndarray]) -> None:
        self._network, self._held, self._weights = network, held, weights
        strangers = [name for name in weights if name not in network]
        if strangers:
            raise ValueError(f"weights has {strangers[0]!r}, which is no layer; layers: {', '.join(network.names)}")
        self._writer = FlatbufferWriter()
        self._operations = {operation.name: operation for operation in network.operations}
        self._values: dict[str, dict[int, Value]] = {}  # tensor to what holds it, by bits
        self._fused: set[str] = set()
        self._owners: list[str] = []
        self._requantized: dict[int, tuple[int, int]] = {}
        self._calls: dict[str, int] = {}

    def write(self) -> TfliteFile:
        inputs = [self._input(name) for name, tensor in self._network.tensors.items() if tensor.producer is None]
        for name in self._network.order:
            if name in self._network:
                self._layer(self._network[name])
            elif name not in self._fused:
                self._operation(self._operations[name])
        outputs = [next(iter(self._values[name].values())) for name in self._network.outputs]
        return TfliteFile(self._writer.finish(inputs, outputs), tuple(self._owners), self._requantized)

    def _input(self, name: str) -> Value:
        """What the network is given comes as wide as the widest reader wants it."""
        tensor = self._network.tensors[name]
        bits = max((self._held[reader].bits for reader in tensor.consumers if reader in self._held), default=8)
        return self._leave(name, self._result(name, channels_last(tensor.shape), bits))

    def _layer(self, layer: Layer) -> None:
        check_kind(layer)
        call = self._calls.get(layer.name, 0)
        self._calls[layer.name] = call + 1
        if not (len(layer.reads) == len(layer.writes) == layer.calls):
            raise ValueError(
                f"layer {layer.name} is called {layer.calls} times on {len(layer.reads)} tensors: what each call reads "
                "is not known; give every call a layer of its own"
            )
        held = self._held[layer.name]
        given = self._weights.get(layer.name)
        if given is not None and given.shape != layer.weight_shape:
            raise ValueError(f"weights[{layer.name!r}] has shape {given.shape}, the layer {layer.weight_shape}")
        weight = weight_values(layer, held.codes, given)
        source = self._read(layer.name, layer.reads[call], held.bits)
        output, activation = self._fuse(layer.writes[call])
        shape = channels_last(self._network.tensors[output].shape)
        if layer.kind == "linear":
            value = self._linear(layer, source, weight, activation)
        else:
            value = self._convolution(layer, source, weight, activation)
        self._leave(output, self._reshape(layer.name, value, shape))

    def _linear(self, layer: Layer, source: Value, weight: np.ndarray, activation: int) -> Value:
        source = self._reshape(layer.name, source, (math.prod(source.shape) // weight.shape[1], weight.shape[1]))
        constants = self._constants(layer.name, weight, source, 0)
        result = self._result(layer.name, (source.shape[0], weight.shape[0]), source.bits)
        self._operator(
            layer.name,
            "FULLY_CONNECTED",
            [source, *constants],
            [result],
            "FullyConnectedOptions",
            FusedActivationFunction=activation,
        )
        return result

    def _convolution(self, layer: Layer, source: Value, weight: np.ndarray, activation: int) -> Value:
        """A convolution, of one dimension as of an image one pixel high."""
        sizes, out_sizes = layer.input_shape[2:], layer.output_shape[2:]
        kernel = layer.weight_shape[2:]
        stride = layer.stride or (1,) * len(kernel)
        if layer.kind == "conv1d":
            sizes, out_sizes, kernel, stride = (1, *sizes), (1, *out_sizes), (1, *kernel), (1, *stride)
        weight = weight.reshape(*weight.shape[:2], *kernel)
        source = self._reshape(layer.name, source, (1, *sizes, layer.input_shape[1]))
        source, padding = self._padded(layer.name, source, out_sizes, kernel, stride)
        is_depthwise = layer.groups > 1 and weight.shape[1] == 1
        weight = weight.transpose(1, 2, 3, 0) if is_depthwise else weight.transpose(0, 2, 3, 1)
        constants = self._constants(layer.name, weight, source, 3 if is_depthwise else 0)
        result = self._result(layer.name, (1, *out_sizes, layer.output_shape[1]), source.bits)
        options = {"DepthMultiplier": layer.output_shape[1] // layer.groups} if is_depthwise else {}
        self._operator(
            layer.name,
            "DEPTHWISE_CONV_2D" if is_depthwise else "CONV_2D",
            [source, *constants],
            [result],
            "DepthwiseConv2DOptions" if is_depthwise else "Conv2DOptions",
            Padding=padding,
            StrideH=stride[0],
            StrideW=stride[1],
            DilationHFactor=1,
            DilationWFactor=1,
            FusedActivationFunction=activation,
            **options,
        )
        return result

    def _constants(self, name: str, weight: np.ndarray, source: Value, axis: int) -> tuple[Value, Value]:
        """A weight and its bias, one scale per output channel."""
        channels = weight.shape[axis]
        scales = 0.01 * (1 + np.arange(channels) % 7 / 7)
        bias = np.zeros(channels, np.int32 if source.bits == 8 else np.int64)
        return (
            self._writer.constant(f"{name}.weight", weight, scales, axis),
            self._writer.constant(f"{name}.bias", bias, scales * source.scale),
        )

    def _operation(self, operation: Operation) -> None:
        name, kind = operation.name, operation.kind
        if kind not in OPERATION_KINDS or not operation.reads or not operation.writes:
            raise ValueError(
                f"operation {name} is {kind or 'of no kind'}, which cannot be written for an Ethos-U; "
                f"allowed: {', '.join(OPERATION_KINDS)}"
            )
        bits = next(iter(self._values[operation.reads[0]]))  # as it was left
        values = [self._read(name, read, bits) for read in operation.reads]
        output, activation = (
            (operation.writes[0], NO_ACTIVATION) if kind in ACTIVATIONS else self._fuse(operation.writes[0])
        )
        shape = channels_last(self._network.tensors[output].shape)
        if kind in NOTHING:
            value = values[0]
        elif kind in ACTIVATIONS:
            value = self._unary(name, "RELU" if ACTIVATIONS[kind] == RELU else "RELU6", values[0])
        elif kind in TABLES:
            value = self._unary(name, "LOGISTIC", values[0])
        elif kind == "softmax":
            value = self._unary(name, "SOFTMAX", values[0], "SoftmaxOptions", Beta=1.0)
        elif kind in BINARIES:
            value = self._binary(name, BINARIES[kind], values, shape, activation)
        elif kind == "cat":
            value = self._concatenate(name, values, shape)
        elif kind == "pad":
            value = self._pad(name, values[0], shape)
        else:
            value = self._pool(name, kind, values[0], shape, activation)
        self._leave(output, self._reshape(name, value, shape))

    def _unary(self, name: str, code: str, source: Value, options: str = "", **fields: float) -> Value:
        result = self._result(name, source.shape, source.bits)
        self._operator(name, code, [source], [result], options, **fields)
        return result

    def _binary(self, name: str, code: str, values: Sequence[Value], shape: Shape, activation: int) -> Value:
        """A sum or product, the second operand a constant where only one is known."""
        operands = list(values[:2])
        if len(operands) == 1:
            kind = np.int8 if values[0].bits == 8 else np.int16
            operands.append(
                self._writer.constant(f"{name}.constant", np.ones((1,) * len(shape), kind), np.array([0.5]))
            )
        result = self._result(name, shape, values[0].bits)
        options = f"{code.capitalize()}Options"
        self._operator(name, code, operands, [result], options, FusedActivationFunction=activation)
        return result

    def _concatenate(self, name: str, values: Sequence[Value], shape: Shape) -> Value:
        axis = next((i for i, size in enumerate(shape) if size != values[0].shape[i]), len(shape) - 1)
        result = self._result(name, shape, values[0].bits, values[0].scale)
        self._operator(name, "CONCATENATION", values, [result], "ConcatenationOptions", Axis=axis)
        return result

    def _pad(self, name: str, source: Value, shape: Shape) -> Value:
        widths = [(size - have) // 2 for size, have in zip(shape, source.shape, strict=True)]
        pads = [(low, size - have - low) for low, size, have in zip(widths, shape, source.shape, strict=True)]
        if min(min(pair) for pair in pads) < 0:
            raise ValueError(f"operation {name} crops, which cannot be written for an Ethos-U")
        result = self._result(name, shape, source.bits, source.scale)
        constant = self._writer.constant(f"{name}.pads", np.array(pads, np.int32))
        self._operator(name, "PAD", [source, constant], [result], "PadOptions")
        return result

    def _pool(self, name: str, kind: str, source: Value, shape: Shape, activation: int) -> Value:
        sizes = shape[1:3] if len(shape) == 4 else (1, 1)
        channels = source.shape[-1]
        if len(source.shape) != 4 or shape[-1] != channels or (len(shape) != 4 and math.prod(shape) != channels):
            raise ValueError(
                f"operation {name} ({kind}) turns {source.shape} into {shape}, channels last; on an Ethos-U, images "
                "are pooled over height and width"
            )
        if sizes == (1, 1) and "max" not in kind:
            result = self._result(name, (1, 1, 1, channels), source.bits)
            axes = self._writer.constant(f"{name}.axes", np.array([1, 2], np.int32))
            self._operator(name, "MEAN", [source, axes], [result], "ReducerOptions", KeepDims=True)
            return result
        stride = tuple(max(have // size, 1) for have, size in zip(source.shape[1:3], sizes, strict=True))
        window = [have - (size - 1) * step for have, size, step in zip(source.shape[1:3], sizes, stride, strict=True)]
        if min(window) < 1:
            raise ValueError(f"operation {name} ({kind}) makes {sizes} of {source.shape[1:3]}; pooling makes less")
        result = self._result(name, (1, *sizes, channels), source.bits, source.scale)
        self._operator(
            name,
            "MAX_POOL_2D" if "max" in kind else "AVERAGE_POOL_2D",
            [source],
            [result],
            "Pool2DOptions",
            Padding=VALID,
            StrideH=stride[0],
            StrideW=stride[1],
            FilterHeight=window[0],
            FilterWidth=window[1],
            FusedActivationFunction=activation,
        )
        return result

    def _padded(
        self, name: str, source: Value, sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int]
    ) -> tuple[Value, int]:
        """What a convolution reads, and its padding; an operator of its own where neither kind makes these sizes."""
        have = source.shape[1:3]
        if all(math.ceil(size / step) == out for size, step, out in zip(have, stride, sizes, strict=True)):
            return source, SAME
        wanted = [(out - 1) * step + window for out, step, window in zip(sizes, stride, kernel, strict=True)]
        if all(want <= size < want + step for want, size, step in zip(wanted, have, stride, strict=True)):
            return source, VALID
        missing = [max(want, size) for want, size in zip(wanted, have, strict=True)]
        return self._pad(name, source, (1, *missing, source.shape[3])), VALID

    def _fuse(self, output: str) -> tuple[str, int]:
        """The tensor that is left and the activation, of a fused activation if one alone reads `output`."""
        consumers = self._network.tensors[output].consumers
        follower = self._operations.get(consumers[0]) if len(consumers) == 1 else None
        if follower is None or follower.kind not in ACTIVATIONS or output in self._network.outputs:
            return output, NO_ACTIVATION
        self._fused.add(follower.name)
        return follower.writes[0], ACTIVATIONS[follower.kind]

    def _read(self, reader: str, name: str, bits: int) -> Value:
        """A tensor at so many bits, requantized where it comes at others."""
        found = self._values[name]
        if bits not in found:
            source = next(iter(found.values()))
            result = self._result(f"{name}.int{bits}", source.shape, bits, source.scale * 2.0 ** (source.bits - bits))
            self._requantized[len(self._owners)] = math.prod(source.shape), bits
            self._operator(reader, "QUANTIZE", [source], [result], "QuantizeOptions")
            found[bits] = result
        return found[bits]

    def _reshape(self, name: str, source: Value, shape: Shape) -> Value:
        if source.shape == tuple(shape):
            return source
        result = self._result(f"{name}.reshape", shape, source.bits, source.scale)
        constant = self._writer.constant(f"{name}.shape", np.array(shape, np.int32))
        self._operator(name, "RESHAPE", [source, constant], [result], "ReshapeOptions")
        return result

    def _result(self, name: str, shape: Shape, bits: int, scale: float = 0.0) -> Value:
        return self._writer.activation(name, shape, bits, scale or step_of(len(self._owners), bits))

    def _operator(
        self, owner: str, code: str, inputs: Sequence[Value], outputs: Sequence[Value], options: str, **fields: float
    ) -> None:
        self._owners.append(owner)
        self._writer.operator(code, inputs, outputs, options, **fields)

    def _leave(self, name: str, value: Value) -> Value:
        self._values[name] = {value.bits: value}
        return value


def check_kind(layer: Layer) -> None:
    """Raises ValueError unless the layer is one that is written for the NPU."""
    if layer.kind not in LAYER_KINDS:
        raise ValueError(
            f"layer {layer.name} is {layer.kind}, which Vela would leave to the CPU; on an Ethos-U run: "
            f"{', '.join(LAYER_KINDS)}"
        )


def step_of(number: int, bits: int) -> float:
    """The step between two codes of a made-up tensor: 256 times finer in 16 bits, as calibration would have it.

    Vela 5.2.0 crashes on Ethos-U85 where a tensor is requantized from 8 to 16 bits at the same step.
    """
    return SCALES[number % len(SCALES)] * 2.0 ** (8 - bits)


def channels_last(shape: Shape) -> Shape:
    """The shape of one sample of a tensor, images with their channels last."""
    return (1, *shape[2:], shape[1]) if len(shape) == 4 else (1, *shape[1:])
