"""From a captured float graph to QDQ form, under a policy's own scales and zero points.

Markers on inputs become `QuantizeLinear -> Clip -> DequantizeLinear`, markers on weights become codes behind
`DequantizeLinear`: every value the graph computes with is one the simulation computes with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from hwmodels import FLOAT, Format, Precision
from search.backends.base import channel_scale
from search.backends.onnx_capture import DOMAIN, INPUT, WEIGHT, layers_in, markers
from search.errors import UnsupportedError
from search.quantize.affine import Range, weight_codes
from search.quantize.simulate import QuantizedModel

INT32_HIGHEST = 2**31 - 1


def input_storage(format: Format) -> Format:
    """Returns the format of 8 or 16 bits that holds an input format's codes."""
    return Format(8 if format.bits <= 8 else 16, signed=format.signed)


def weight_storage(format: Format) -> Format:
    """Returns the format of 4, 8 or 16 bits that holds a weight format's codes: 4 for 4 bits alone.

    Float for formats without symmetric integer codes: their values are stored.
    """
    if not format.is_symmetric_integer:
        return FLOAT
    return Format(4) if format.bits == 4 else input_storage(format)


def quantized(captured: Any, simulated: QuantizedModel, policy: Mapping[str, Precision]) -> Any:
    """Returns a copy of a captured graph whose layers have the precisions of `policy`; layers it lacks stay float."""
    model = captured.clone()
    graph, seen = model.graph, {}
    for marker in markers(graph, INPUT):
        layer, x = marker.attributes["layer"].as_string(), marker.inputs[0]
        format = policy.get(layer, Precision()).input
        if not format.is_float:
            _check_input(layer, format)
            key = (x, simulated.input_range(layer, format), format)
            if key not in seen:  # layers that read one tensor in one format share its quantizer
                seen[key] = _quantize_input(graph, marker, *key)
            x = seen[key]
        _replace(graph, marker, x)
    for marker in markers(graph, WEIGHT):
        layer = marker.attributes["layers"].as_strings()[-1]  # which of a shared weight's the simulation applies last
        format = policy.get(layer, Precision()).weight
        if format.is_float:
            _replace(graph, marker, marker.inputs[0])
        elif weight_storage(format).is_float:
            values = simulated.quantized_weight(layer, format).float().cpu().numpy()
            _replace(graph, marker, _constant(graph, f"{marker.inputs[0].name}/values", values))
        else:
            axis = simulated.network[layer].channel_axis
            scale = channel_scale(simulated, layer, format)
            codes = weight_codes(simulated.float_weight(layer), scale, format, axis)
            _quantize_weight(graph, marker, codes, scale, format, axis)
    for node in [node for node in graph if node.op_type == "Gemm"]:
        precisions = [policy.get(layer, Precision()) for layer in layers_in(node.name)]
        if precisions and all(map(_has_integer_kernel, precisions)):
            _quantize_bias(graph, node)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    model.opset_imports.pop(DOMAIN, None)
    return model


def save(model: Any, path: Path) -> None:
    """Writes a graph, and checks that it is valid ONNX.

    Raises:
        UnsupportedError: If it is not, as where the exporter translated an operation wrongly.
    """
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(model)
    for value in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del value.metadata_props[:]  # the exporter's stack traces, longer than the weights of a small network
    try:
        onnx.save(proto, path)
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"the exported graph is not valid ONNX: {reason}") from error


def _quantize_input(graph: Any, before: Any, x: Any, range_: Range, format: Format) -> Any:
    """Inserts the quantizer of a layer's input, and returns the quantized values.

    Codes narrower than their storage are clipped as codes, which leaves `QuantizeLinear` next to the operation that
    computes its input, where runtimes look for it.
    """
    layer, storage = before.attributes["layer"].as_string(), input_storage(format)
    kind = str(storage).upper()
    scale = _constant(graph, f"{layer}/input_scale", np.float32(range_.scale))
    zero = _constant(graph, f"{layer}/input_zero_point", range_.zero_point, kind)
    ends = (format.lowest, format.highest)
    full = Format(storage.bits, storage.signed, span="full" if storage.signed else "")
    clips = (format.lowest, format.highest) != (full.lowest, full.highest)
    if clips and storage.bits == 16:  # onnxruntime clips no codes of 16 bits, so clip the values
        x = _insert(
            graph, before, "Clip", [x, *(_end(graph, layer, (e - range_.zero_point) * range_.scale) for e in ends)]
        )
    codes = _insert(graph, before, "QuantizeLinear", [x, scale, zero])
    if clips and storage.bits == 8:
        codes = _insert(graph, before, "Clip", [codes, *(_end(graph, layer, end, kind) for end in ends)])
    return _insert(graph, before, "DequantizeLinear", [codes, scale, zero])


def _check_input(layer: str, format: Format) -> None:
    if not format.is_static_integer or format.bits == 1:
        raise UnsupportedError(
            f"onnxruntime takes no {format} input of layer {layer}; it takes integers of 2 to 16 bits with one static "
            "range per tensor, or float: search again with such formats in space.input"
        )


def _has_integer_kernel(precision: Precision) -> bool:
    is_stored = precision.weight.is_symmetric_integer and precision.input.is_static_integer
    return is_stored and max(precision.weight.bits, precision.input.bits) <= 8


def _end(graph: Any, layer: str, value: float, kind: str = "FLOAT") -> Any:
    return _constant(graph, f"{layer}/input_end", value, kind)


def _quantize_weight(graph: Any, marker: Any, codes: Tensor, scale: Tensor, format: Format, axis: int) -> None:
    """Replaces a marked weight by its codes behind `DequantizeLinear`, one scale per channel along `axis`.

    Codes narrower than their storage are shifted up as far as it allows and the scales down, which leaves the values as
    they are; but integer kernels round the bias to steps of input scale times weight scale, and so to finer ones. int4
    codes, which fill their storage, pass through a cast to int8, which the runtime does once, when it loads the file:
    its integer kernels take 8 bits. Likewise transposes move from the values to the codes.
    """
    import onnx_ir as ir

    name, storage = marker.inputs[0].name, weight_storage(format)
    kind, shift = str(storage).upper(), 2 ** (storage.bits - format.bits)
    # A channel of zeros is zero under any scale; the largest keeps the bias of integer kernels within 32 bits.
    dead = (codes == 0).movedim(axis, 0).flatten(1).all(1)
    scales = _constant(graph, f"{name}/scale", torch.where(dead, scale.max(), scale).cpu().numpy() / shift)
    stored = _constant(graph, f"{name}/codes", codes.cpu().numpy() * shift, kind)
    if kind == "INT4":
        kind, stored = "INT8", _insert(graph, marker, "Cast", [stored], to=int(ir.DataType.INT8))
    for node, index in list(marker.outputs[0].uses()):
        # Not shared: onnxruntime rewrites the zero points of each reader where it avoids saturation (see the worker).
        zeros = _constant(graph, f"{name}/zero_point", np.zeros(len(scale)), kind)
        if node.op_type == "Transpose":
            order = list(node.attributes["perm"].as_ints())
            turned = _insert(graph, node, "Transpose", [stored], perm=order)
            values = _insert(graph, node, "DequantizeLinear", [turned, scales, zeros], axis=order.index(axis))
            _replace(graph, node, values)
        else:
            values = _insert(graph, node, "DequantizeLinear", [stored, scales, zeros], axis=axis)
            node.replace_input_with(index, values)
    graph.remove(marker, safe=True)


def _quantize_bias(graph: Any, gemm: Any) -> None:
    """Gives a `Gemm` of 8-bit codes the int32 bias that onnxruntime's integer kernel needs.

    It is rounded to steps of input scale times weight scale, and stays where it does not fit into 32 bits.
    (Convolutions need no help: onnxruntime rounds their bias so itself.)
    """
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if bias is None or bias.const_value is None:
        return
    scale, scales = (value.producer().inputs[1].const_value.numpy() for value in gemm.inputs[:2])
    steps = (scales * scale).astype(np.float32)
    codes = np.rint(bias.const_value.numpy() / steps.astype(np.float64))
    if np.abs(codes).max() <= INT32_HIGHEST:
        stored = _constant(graph, f"{bias.name}/codes", codes, "INT32")
        step = _constant(graph, f"{bias.name}/scale", steps)
        gemm.replace_input_with(2, _insert(graph, gemm, "DequantizeLinear", [stored, step], axis=0))


def _constant(graph: Any, name: str, values: ArrayLike, kind: str = "FLOAT") -> Any:
    """Adds an initializer of an ONNX type, under a name of its own."""
    import onnx_ir as ir

    while name in graph.initializers:
        name += "'"
    tensor: Any = ir.tensor(np.asarray(values).astype(ir.DataType[kind].numpy()), name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    graph.register_initializer(value)
    return value


def _insert(graph: Any, before: Any, operation: str, inputs: Sequence[Any], **attributes: Any) -> Any:
    """Inserts a node in front of another, and returns its output."""
    import onnx_ir as ir

    node = ir.node(operation, inputs, attributes)
    graph.insert_before(before, node)
    return node.outputs[0]


def _replace(graph: Any, node: Any, value: Any) -> None:
    """Removes a node, its readers reading `value` instead."""
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
