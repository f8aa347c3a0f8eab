"""What TensorRT 11's parser asks of quantizers in an ONNX file; see `search.backends.tensorrt` for the sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
CODES = ("INT8", "INT4", "FLOAT8E4M3FN")


@dataclass(frozen=True)
class Tensors:
    """The constants of a graph, and what it makes.

    Attributes:
        constants: Name to `onnx.TensorProto`.
        producers: Name of a tensor to the node that makes it.
    """

    constants: dict[str, Any]
    producers: dict[str, Any]

    @classmethod
    def of(cls, graph: Any) -> Tensors:
        """Looks them up in an `onnx.GraphProto`."""
        producers = {name: node for node in graph.node for name in node.output}
        return cls({constant.name: constant for constant in graph.initializer}, producers)


def broken_rule(node: Any, tensors: Tensors) -> str | None:
    """Returns the rule that a quantizer breaks, in words; None if it keeps them all, or is none."""
    if node.op_type not in QUANTIZERS:
        return None
    from onnx import numpy_helper

    scale = tensors.constants.get(node.input[1])
    if scale is None:
        return "its scale must be a constant"
    values = numpy_helper.to_array(scale)
    if not (values > 0).all():
        return "all scales must be positive"
    zero = tensors.constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero is not None and any(numpy_helper.to_array(zero).astype(float).ravel()):
        return "its zero points must be zero"
    codes = tensors.constants.get(node.input[0])
    kind = _type(zero if zero is not None else codes)
    if kind not in CODES:
        return f"its codes are {kind or 'UINT8'}; they must be {', '.join(CODES)}"
    if node.op_type == "QuantizeLinear" or codes is None:
        return _broken_by_input(node, values, kind, tensors)
    return _broken_by_weight(node, values, kind, codes)


def _broken_by_input(node: Any, scale: Any, kind: str, tensors: Tensors) -> str | None:
    producer = tensors.producers.get(node.input[0])
    if scale.size != 1:
        return "the values of an input share one scale"
    if kind == "INT4":
        return "int4 is for weights"
    if node.op_type == "DequantizeLinear" and (producer is None or producer.op_type != "QuantizeLinear"):
        return "it must follow QuantizeLinear, or a constant"
    return None


def _broken_by_weight(node: Any, scale: Any, kind: str, codes: Any) -> str | None:
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    shape = list(codes.dims)
    if scale.ndim > 1:
        blocks = [size / count for size, count in zip(shape, scale.shape, strict=True)]
        blocked = [axis for axis, size in enumerate(blocks) if size != 1]
        if len(blocked) > 1 or any(axis < len(shape) - 2 for axis in blocked):
            return "blocks lie along one of the last two axes"
        if any(size != int(size) for size in blocks):
            return "the block size must divide the axis"
    elif scale.size > 1 and scale.size != shape[attributes.get("axis", 1)]:
        return "a weight has one scale for every channel"
    if kind == "INT4" and scale.ndim < 2:
        return "int4 weights have scales per block"
    if kind == "INT4" and shape[-1] % 2:
        return "the last axis of int4 weights must be even"
    return None


def _type(tensor: Any) -> str:
    """ONNX's name of a tensor's type; empty where there is no tensor."""
    from onnx import TensorProto

    return "" if tensor is None else str(TensorProto.DataType.Name(tensor.data_type))
