"""From a captured float graph to QDQ form, under a policy's own scales and zero points.

Markers on inputs and on placed tensors become `QuantizeLinear -> Clip -> DequantizeLinear`, markers on weights become
codes behind `DequantizeLinear`: every value the graph computes with is one the simulation computes with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwmodels import Format, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.backends.onnx_capture import DOMAIN, INPUT, TENSOR, WEIGHT, layers_in, marked, markers
from search.backends.onnx_nodes import cast, constant, insert, replace
from search.backends.onnx_storage import has_integer_kernel, input_storage, onnx_type, takes_input, weight_storage
from search.backends.onnx_weights import Codes, place_codes, place_values, weight_codes
from search.errors import UnsupportedError
from search.quantize.affine import Range
from search.quantize.placement import formats_of
from search.quantize.simulate import QuantizedModel

__all__ = ["input_storage", "quantized", "save", "weight_storage"]

INT32_HIGHEST = 2**31 - 1
OPSET_OF_2_BITS, IR_VERSION_OF_2_BITS = 25, 13
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")

Quantizer = tuple[Range | None, Format]


def quantized(captured: Any, simulated: QuantizedModel, policy: Mapping[str, Precision], narrowest: int = 4) -> Any:
    """Returns a copy of a captured graph whose layers have the precisions of `policy`; layers it lacks stay float.

    Tensors are quantized where they are produced if the graph was captured with points, the simulation's.

    Args:
        captured: What `capture` returned.
        simulated: Holds the ranges.
        policy: The precisions.
        narrowest: Fewest bits of the integers that weights are stored in: 4, or 2, which takes opset 25.

    Raises:
        UnsupportedError: If an input's format has no place in a graph, or a layer or tensor none in this one.
    """
    model = captured.clone()
    graph = model.graph
    made: dict[str, list[Any]] = defaultdict(list)  # what is quantized -> the values that its quantizers return
    weights = _weights(graph, simulated, policy, narrowest)
    placed = _placed(graph, simulated, policy)
    held = _quantize_tensors(graph, simulated, placed, made)
    integer = {
        name
        for name, precision in policy.items()
        if has_integer_kernel(precision, simulated.network[name].kind)
        and _bias_fits(graph, simulated, name, precision, weights)
    }
    _quantize_inputs(graph, simulated, policy, held, integer, made)
    _quantize_weights(graph, simulated, policy, weights, integer, made, rounds_bias=bool(placed))
    for name, precision in policy.items():
        if placed and (bias := _bias(graph, simulated, name)) is not None:
            _set(bias, simulated.integer_bias(name, precision, torch.from_numpy(bias.const_value.numpy())))
    for node in [node for node in graph if node.op_type == "Gemm"]:
        if (names := layers_in(node.name)) and integer.issuperset(names):
            _quantize_bias(graph, node, made[f"{names[0]} bias"])
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    model.opset_imports.pop(DOMAIN, None)
    if any(weight is not None and weight.storage.bits == 2 for weight in weights.values()):
        model.opset_imports[""], model.ir_version = OPSET_OF_2_BITS, IR_VERSION_OF_2_BITS
    _check_quantizers(graph, policy, placed, made)
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


def _weights(
    graph: Any, simulated: QuantizedModel, policy: Mapping[str, Precision], narrowest: int
) -> dict[str, Codes | None]:
    """The codes of every quantized weight by its layers; None where it has no codes."""
    found: dict[str, Codes | None] = {}
    for marker in markers(graph, WEIGHT):
        layers = marker.attributes["layers"].as_strings()
        format = policy.get(layers[-1], FLOAT_PRECISION).weight  # the simulation applies a shared weight's last one
        if not format.is_float:
            found |= dict.fromkeys(layers, weight_codes(simulated, layers[-1], format, narrowest))
    return found


def _placed(graph: Any, simulated: QuantizedModel, policy: Mapping[str, Precision]) -> dict[str, Format]:
    """The format of every tensor that is quantized where it is produced; none in a graph captured without points."""
    if not markers(graph, TENSOR):
        return {}
    operation_format = Format.parse(simulated.settings.operation_format)
    placed = formats_of(simulated.points, simulated.network, policy, operation_format)
    for tensor, format in placed.items():
        _check_takes(format, f"of tensor {tensor}", "quantizer.operation_format")
    return placed


def _quantize_tensors(
    graph: Any, simulated: QuantizedModel, placed: Mapping[str, Format], made: dict[str, list[Any]]
) -> dict[Any, Quantizer]:
    """Quantizes tensors where they are produced; returns what each quantized value went through."""
    readers = {point.tensor: point.readers for point in simulated.points}
    held: dict[Any, Quantizer] = {}
    for marker in markers(graph, TENSOR):
        tensor, x = marked(marker), marker.inputs[0]
        if format := placed.get(tensor):
            reader = next(iter(readers[tensor]), None)
            range_ = None
            if format.has_static_range:
                range_ = simulated.input_range(reader, format) if reader else simulated.tensor_range(tensor, format)
            x = _quantize(graph, marker, f"{tensor}/tensor", x, range_, format)
            held[x] = (range_, format)
            made[f"{tensor} tensor"].append(x)
        replace(graph, marker, x)
    return held


def _quantize_inputs(
    graph: Any,
    simulated: QuantizedModel,
    policy: Mapping[str, Precision],
    held: dict[Any, Quantizer],
    integer: set[str],
    made: dict[str, list[Any]],
) -> None:
    """Quantizes the inputs of layers; those that read one tensor in one format share its quantizer."""
    seen: dict[tuple[Any, Quantizer], Any] = {}
    for marker in markers(graph, INPUT):
        layer, x = marked(marker), marker.inputs[0]
        format = policy.get(layer, FLOAT_PRECISION).input
        if not format.is_float:
            _check_takes(format, f"input of layer {layer}", "space.input")
            range_ = simulated.input_range(layer, format) if format.has_static_range else None
            key = (x, (range_, format))
            if held.get(x) != (range_, format):
                if key not in seen:
                    seen[key] = _quantize(graph, marker, f"{layer}/input", x, range_, format)
                x = seen[key]
            made[f"{layer} input"].append(x)
            if range_ and layer not in integer:
                x = _clip(graph, marker, f"{layer}/input", x, range_, format)
        replace(graph, marker, x)


def _quantize(graph: Any, before: Any, name: str, x: Any, range_: Range | None, format: Format) -> Any:
    """Inserts the quantizer of a tensor, and returns the quantized values.

    Codes narrower than their storage are clipped as codes, which leaves `QuantizeLinear` next to the operation that
    computes the tensor, where runtimes look for it.
    """
    if range_ is None:
        return cast(graph, before, cast(graph, before, x, onnx_type(format)), "FLOAT")
    storage = input_storage(format)
    kind = onnx_type(storage)
    scale = constant(graph, f"{name}_scale", np.float32(range_.scale))
    zero = constant(graph, f"{name}_zero_point", range_.zero_point, kind)
    ends = (format.lowest, format.highest)
    full = Format(storage.bits, storage.signed, span="full" if storage.signed else "")
    clips = ends != (full.lowest, full.highest)
    if clips and storage.bits == 16:  # onnxruntime clips no codes of 16 bits, so clip the values
        x = _clip(graph, before, name, x, range_, format)
    codes = insert(graph, before, "QuantizeLinear", [x, scale, zero])
    if clips and storage.bits == 8:
        codes = insert(graph, before, "Clip", [codes, *(constant(graph, f"{name}_end", end, kind) for end in ends)])
    return insert(graph, before, "DequantizeLinear", [codes, scale, zero])


def _clip(graph: Any, before: Any, name: str, x: Any, range_: Range, format: Format) -> Any:
    """Clips values to the ends of their range.

    Behind a quantizer it changes none. But it keeps onnxruntime from taking what follows for a layer of 8 bits, whose
    float weight it would round to int8, and whose bias to int32 without looking whether it fits.
    """
    steps = (np.float32(end - range_.zero_point) for end in (format.lowest, format.highest))
    return insert(
        graph, before, "Clip", [x, *(constant(graph, f"{name}_end", s * np.float32(range_.scale)) for s in steps)]
    )


def _check_takes(format: Format, what: str, key: str) -> None:
    if not takes_input(format):
        raise UnsupportedError(
            f"onnxruntime takes no {format} {what}; it takes integers with one static range per tensor, fp16, bf16 or "
            f"float: search again with such formats in {key}"
        )


def _quantize_weights(
    graph: Any,
    simulated: QuantizedModel,
    policy: Mapping[str, Precision],
    weights: Mapping[str, Codes | None],
    integer: set[str],
    made: dict[str, list[Any]],
    rounds_bias: bool,
) -> None:
    for marker in markers(graph, WEIGHT):
        layers = marker.attributes["layers"].as_strings()
        if layers[-1] not in weights:
            replace(graph, marker, marker.inputs[0])
        elif (weight := weights[layers[-1]]) is not None:
            values = place_codes(graph, marker, weight, integer, rounds_bias)
            for layer in layers:
                made[f"{layer} weight"] += values
        else:
            place_values(graph, marker, simulated, layers[-1], policy[layers[-1]].weight)


def _bias(graph: Any, simulated: QuantizedModel, layer: str) -> Any | None:
    """The bias of a layer in the graph; None where it has none there."""
    value = graph.initializers.get(simulated.bias_name(layer) or "")
    return value if value is not None and value.const_value is not None else None


def _set(value: Any, tensor: torch.Tensor) -> None:
    import onnx_ir as ir

    value.const_value = ir.tensor(tensor.cpu().numpy(), name=value.name)


def _bias_fits(
    graph: Any,
    simulated: QuantizedModel,
    layer: str,
    precision: Precision,
    weights: Mapping[str, Codes | None],
) -> bool:
    """Whether the bias fits into 32 bits in steps of input scale times weight scale, as integer kernels add it."""
    bias, weight = _bias(graph, simulated, layer), weights.get(layer)
    if bias is None or weight is None:
        return True
    steps = weight.scale.astype(np.float64) * simulated.input_range(layer, precision.input).scale
    values = bias.const_value.numpy().astype(np.float64)
    return bool((np.abs(values.reshape(-1, max(1, steps.size)) / steps) <= INT32_HIGHEST).all())


def _quantize_bias(graph: Any, gemm: Any, made: list[Any]) -> None:
    """Gives a `Gemm` of 8-bit codes the int32 bias that onnxruntime's integer kernel needs.

    It is rounded to steps of input scale times weight scale. (Convolutions need no help: onnxruntime rounds their bias
    so itself.)
    """
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if bias is None or bias.const_value is None:
        return
    scale, scales = (value.producer().inputs[1].const_value.numpy() for value in gemm.inputs[:2])
    steps = (scales * scale).astype(np.float32)
    codes = np.rint(bias.const_value.numpy() / steps.astype(np.float64))
    stored = constant(graph, f"{bias.name}/codes", codes, "INT32")
    step = constant(graph, f"{bias.name}/scale", steps)
    axes = {"axis": 0} if steps.ndim else {}
    made.append(insert(graph, gemm, "DequantizeLinear", [stored, step], **axes))
    gemm.replace_input_with(2, made[-1])


def _check_quantizers(
    graph: Any, policy: Mapping[str, Precision], placed: Mapping[str, Format], made: Mapping[str, list[Any]]
) -> None:
    """Checks both ways that the quantizers of the graph are those of the plan.

    Raises:
        UnsupportedError: If a layer or tensor lacks its quantizer, or a quantizer belongs to neither.
    """
    nodes = set(graph)
    standing = {key for key, values in made.items() if values and all(value.producer() in nodes for value in values)}
    wanted = {f"{tensor} tensor" for tensor in placed}
    for name, precision in policy.items():
        wanted |= {f"{name} input"} if not precision.input.is_float else set()
        wanted |= {f"{name} weight"} if weight_storage(precision.weight).grid == "int" else set()
    if missing := sorted(wanted - standing):
        raise UnsupportedError(f"the exported graph has no place for the quantizer of the {_in_words(missing[0])}")
    known = {value.producer() for values in made.values() for value in values}
    ours = known | {value.producer() for node in known for value in node.inputs[:1]}
    ours |= {value.producer() for node in ours if node is not None for value in node.inputs[:1]}
    for node in graph:
        if node.op_type in QUANTIZERS and node not in ours:
            raise UnsupportedError(
                f"the model quantizes by itself: {node.op_type} {node.name} belongs to no layer of the plan; give the "
                "float model"
            )


def _in_words(key: str) -> str:
    name, _, side = key.rpartition(" ")
    return f"tensor {name}" if side == "tensor" else f"{side} of layer {name}"
