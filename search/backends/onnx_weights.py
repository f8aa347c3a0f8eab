"""Weights in an ONNX graph: codes behind `DequantizeLinear`, with the plan's own scales and zero points."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hwmodels import Format
from search.backends.onnx_capture import layers_in
from search.backends.onnx_nodes import cast, constant, insert, replace
from search.backends.onnx_storage import onnx_type, weight_storage
from search.quantize.formats import encode
from search.quantize.grouping import to_groups
from search.quantize.simulate import QuantizedModel

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Codes:
    """A weight as integers with what places them.

    Attributes:
        codes: In the weight's shape, zero points included.
        scale: Without a dimension for a tensor, `(channels,)`, or `(channels, blocks)`.
        zero_point: Of the scale's shape.
        storage: What the codes are stored as.
        axis: Of the output channels.
        block: Values under one scale, counted over all axes but the channels'; 0 where a channel has one scale.
        bits: Which the codes need.
    """

    codes: Array
    scale: Array
    zero_point: Array
    storage: Format
    axis: int
    block: int
    bits: int


def weight_codes(simulated: QuantizedModel, layer: str, format: Format, narrowest: int = 4) -> Codes | None:
    """Returns the codes of a layer's weight in a format; None where ONNX has no integers for them."""
    storage = weight_storage(format, narrowest)
    if storage.grid != "int":
        return None
    weight, axis = simulated.float_weight(layer), simulated.network[layer].channel_axis
    parameters = simulated.weight_parameters(layer, format)
    groups = to_groups(weight, format, axis)
    codes = groups.restore(encode(groups.rows, format, parameters))
    scale = parameters["scale"].float()
    zero_point = parameters.get("zero_point", torch.zeros_like(scale))
    blocks, block = len(scale) // max(weight.shape[axis], 1), 0
    if len(scale) == 1 and format.granularity == "tensor":
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    elif blocks > 1:
        scale, zero_point = (values.reshape(-1, blocks) for values in (scale, zero_point))
        block = groups.rows.shape[1]
    elif format.granularity != "group":
        scale = _with_finite_bias(codes, scale, zero_point, axis)
    bits = max(format.bits, 1 + format.signed)  # int1 and binary have the codes -1 and 1
    return Codes(_numpy(codes), _numpy(scale), _numpy(zero_point), storage, axis, block, bits)


def _with_finite_bias(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """The scales, the largest of all for channels of zeros.

    Such a channel is zero under any scale, and the largest keeps the bias of integer kernels within 32 bits.
    """
    by_channel = codes.movedim(axis, 0).flatten(1)
    return torch.where((by_channel == zero_point[:, None]).all(1), scale.max(), scale)


def place_codes(
    graph: Any, marker: Any, weight: Codes, integer: Collection[str] = (), rounds_bias: bool = False
) -> list[Any]:
    """Replaces a marked weight by its codes behind `DequantizeLinear`; returns what those compute.

    Integer kernels take 8 bits: for them, codes of fewer pass through a cast, which the runtime does once, when it
    loads the file, and transposes move from the values to the codes. For others transposes stay behind, and each row
    has a block of its own: onnxruntime would move a scale per channel or tensor past the transpose, take the two for
    its MatMulNBits, and round a float input to 8 bits.

    Args:
        graph: Holds the marker.
        marker: Of the weight.
        weight: Its codes.
        integer: Layers that an integer kernel may compute.
        rounds_bias: Whether the bias has been rounded to steps of input scale times weight scale already.
    """
    name, kind = marker.inputs[0].name, onnx_type(weight.storage)
    codes = np.moveaxis(weight.codes, weight.axis, 0) if weight.block else weight.codes
    stored = constant(graph, f"{name}/codes", codes.reshape(len(codes), -1) if weight.block else codes, kind)
    is_multiplied = not weight.block and any(name in integer for name in marker.attributes["layers"].as_strings())
    factor = 1
    if is_multiplied and weight.bits < 8:
        factor = 1 if rounds_bias else 2 ** (8 - weight.bits)
        kind = "INT8" if weight.storage.signed else "UINT8"
        stored = _widened(graph, marker, f"{name}/factor", stored, kind, factor)
    scale = constant(graph, f"{name}/scale", weight.scale / factor)

    def values(before: Any, given: Any, axis: int, by_row: bool = False) -> Any:
        # Not shared: onnxruntime rewrites the zero points of each reader where it avoids saturation (see the worker).
        zeros = weight.zero_point * factor
        if weight.block or not by_row:
            zero = constant(graph, f"{name}/zero_point", zeros, kind)
            how = {"axis": 1, "block_size": weight.block} if weight.block else {"axis": axis} if zeros.ndim else {}
            return insert(graph, before, "DequantizeLinear", [given, scale, zero], **how)
        rows = [np.broadcast_to(value.reshape(-1, 1), (len(codes), 1)) for value in (weight.scale / factor, zeros)]
        placing = [constant(graph, f"{name}/scale", rows[0]), constant(graph, f"{name}/zero_point", rows[1], kind)]
        return insert(graph, before, "DequantizeLinear", [given, *placing], axis=1, block_size=codes.shape[1])

    made = []
    for node, index in list(marker.outputs[0].uses()):
        readers = {layer for reader in node.outputs[0].consumers() for layer in layers_in(reader.name)}
        is_turned = node.op_type == "Transpose" and codes.ndim == 2
        if is_turned and not weight.block and readers <= set(integer):
            order = list(node.attributes["perm"].as_ints())
            turned = insert(graph, node, "Transpose", [stored], perm=order)
            made.append(values(node, turned, order.index(weight.axis)))
            replace(graph, node, made[-1])
        else:
            made.append(values(node, stored, weight.axis, by_row=is_turned and weight.axis == 0))
            found = _unfolded(graph, node, f"{name}/shape", made[-1], codes.shape, weight) if weight.block else made[-1]
            node.replace_input_with(index, found)
    graph.remove(marker, safe=True)
    return made


def _widened(graph: Any, before: Any, name: str, codes: Any, kind: str, factor: int) -> Any:
    """The codes in 8 bits, multiplied by a power of two that the scales are divided by.

    The values stay as they are; but integer kernels round the bias to steps of input scale times weight scale, and so
    to finer ones. The runtime computes this once, when it loads the file.
    """
    if factor > 1:
        codes = cast(graph, before, codes, "INT32")
        codes = insert(graph, before, "Mul", [codes, constant(graph, name, factor, "INT32")])
    return cast(graph, before, codes, kind) if codes.dtype is None or codes.dtype.name != kind else codes


def _unfolded(graph: Any, before: Any, name: str, rows: Any, shape: tuple[int, ...], weight: Codes) -> Any:
    """One row of values per channel, in the weight's own shape: kernels unfolded, channels back at their axis."""
    if len(shape) > 2:
        rows = insert(
            graph, before, "Reshape", [rows, constant(graph, f"{before.inputs[0].name}/shape", shape, "INT64")]
        )
    if weight.axis:
        order = list(range(1, len(shape)))
        order.insert(weight.axis, 0)
        rows = insert(graph, before, "Transpose", [rows], perm=order)
    return rows


def place_values(graph: Any, marker: Any, simulated: QuantizedModel, layer: str, format: Format) -> None:
    """Replaces a marked weight by the values it takes in a format: fp16 and bf16 in their own types, others in float32.

    The cast back to float32 is done once, when the runtime loads the file.
    """
    name, storage = marker.inputs[0].name, weight_storage(format)
    values = constant(graph, f"{name}/values", _numpy(simulated.quantized_weight(layer, format)), onnx_type(storage))
    replace(graph, marker, values if storage.is_float else cast(graph, marker, values, "FLOAT"))


def _numpy(values: Tensor) -> Array:
    found: Array = values.detach().float().cpu().numpy()
    return found
