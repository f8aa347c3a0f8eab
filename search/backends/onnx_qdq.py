"""A QDQ graph for runtimes that take ONNX's quantizers at their word: codes in initializers, nothing between.

Markers on inputs become `Clip -> QuantizeLinear -> DequantizeLinear`, markers on weights become `DequantizeLinear`
behind an initializer. What types may hold codes is the runtime's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from hwmodels import Format, Layer, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.backends.onnx_capture import DOMAIN, INPUT, WEIGHT, marked, markers, share_constants
from search.backends.onnx_nodes import cast, constant, insert, replace
from search.backends.onnx_weights import weight_codes
from search.quantize.affine import Range
from search.quantize.formats import encode
from search.quantize.grouping import to_groups
from search.quantize.simulate import QuantizedModel

WeightStorage = Callable[[Layer, Precision], Format]
"""From a layer and its precision to the format that holds its weight's codes; float where values are stored."""

InputStorage = Callable[[Format], Format]
"""From an input's format to the one that holds its codes."""

TYPES = {"fp16": "FLOAT16", "bf16": "BFLOAT16", "fp8_e4m3": "FLOAT8E4M3FN"}


def with_quantizers(
    captured: Any,
    simulated: QuantizedModel,
    policy: Mapping[str, Precision],
    weight_storage: WeightStorage,
    input_storage: InputStorage,
    made: dict[str, str] | None = None,
) -> Any:
    """Returns a copy of a captured graph whose layers have the precisions of `policy`; layers it lacks stay float.

    Args:
        captured: What `search.backends.onnx_capture.capture` returned.
        simulated: Holds the ranges.
        policy: The precisions.
        weight_storage: What holds the codes of weights.
        input_storage: What holds the codes of inputs.
        made: Takes the names of the nodes that return quantized values, by `layer/input` and `layer/weight`.
    """
    made = {} if made is None else made
    model = captured.clone()
    graph = model.graph
    seen: dict[Any, Any] = {}  # layers that read one tensor in one format share its quantizer
    for marker in markers(graph, INPUT):
        layer, x = marked(marker), marker.inputs[0]
        format = policy.get(layer, FLOAT_PRECISION).input
        if not format.is_float:
            range_ = simulated.input_range(layer, format) if format.has_static_range else None
            key = (x, range_, format)
            if key not in seen:
                seen[key] = _quantize_input(graph, marker, layer, x, range_, format, input_storage(format))
            x = seen[key]
            made[f"{layer}/input"] = x.producer().name
        replace(graph, marker, x)
    for marker in markers(graph, WEIGHT):
        name = marker.attributes["layers"].as_strings()[-1]  # which of a shared weight's the simulation applies last
        precision = policy.get(name, FLOAT_PRECISION)
        if precision.weight.is_float:
            replace(graph, marker, marker.inputs[0])
        else:
            storage = weight_storage(simulated.network[name], precision)
            values = _weight(graph, marker, simulated, name, precision.weight, storage)
            if producer := values.producer():
                made |= {f"{layer}/weight": producer.name for layer in marker.attributes["layers"].as_strings()}
            replace(graph, marker, values)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    model.opset_imports.pop(DOMAIN, None)
    return slimmed(model)


def slimmed(model: Any) -> Any:
    """Returns the graph without what its readers do not need: constants held twice, shapes they infer themselves."""
    share_constants(model.graph)
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.type = output.shape = None
    return model


def onnx_type(storage: Format) -> str:
    """Returns ONNX's name of the type that a storage format is."""
    return TYPES.get(str(storage)) or f"{'' if storage.signed else 'U'}INT{storage.bits}"


def _quantize_input(
    graph: Any, before: Any, layer: str, x: Any, range_: Range | None, format: Format, storage: Format
) -> Any:
    """Inserts the quantizer of a layer's input, and returns the quantized values.

    Values are clipped to the format's ends where its storage reaches further. Storage without a zero point holds the
    steps from zero.
    """
    if range_ is None:
        return cast(graph, before, cast(graph, before, x, onnx_type(format)), "FLOAT")
    name, kind = f"{layer}/input", onnx_type(storage)
    scale = constant(graph, f"{name}_scale", np.float32(range_.scale))
    stored_zero = range_.zero_point if storage.has_zero_point else 0
    zero = constant(graph, f"{name}_zero_point", stored_zero, kind)
    if format.grid == "int":
        steps = [end - range_.zero_point for end in (format.lowest, format.highest)]
        reached = _reach(storage)
        if steps != [end - stored_zero for end in reached]:
            ends = [np.float32(step) * np.float32(range_.scale) for step in steps]
            x = insert(graph, before, "Clip", [x, *(constant(graph, f"{name}_end", end) for end in ends)])
    codes = insert(graph, before, "QuantizeLinear", [x, scale, zero])
    values = insert(graph, before, "DequantizeLinear", [codes, scale, zero])
    codes.producer().name, values.producer().name = f"{name}/quantize", f"{name}/dequantize"
    return values


def _reach(storage: Format) -> tuple[int, int]:
    """The ends of an ONNX integer type."""
    return (-(1 << storage.bits - 1), (1 << storage.bits - 1) - 1) if storage.signed else (0, (1 << storage.bits) - 1)


def _weight(graph: Any, marker: Any, simulated: QuantizedModel, layer: str, format: Format, storage: Format) -> Any:
    """Adds a weight in a format, and returns its values: behind `DequantizeLinear`, or stored themselves."""
    name, kind = marker.inputs[0].name, onnx_type(storage)
    if storage.is_float or storage.grid == "cast":
        values = simulated.quantized_weight(layer, format).detach().float().cpu().numpy()
        stored = constant(graph, f"{name}/values", values, kind if storage.grid == "cast" else "FLOAT")
        return cast(graph, marker, stored, "FLOAT") if storage.grid == "cast" else stored
    axis, block = simulated.network[layer].channel_axis, 0
    if storage.grid == "minifloat":
        codes, scale = _small_floats(simulated, layer, format, axis)
        zero_point = np.zeros_like(scale)
    else:
        found = weight_codes(simulated, layer, format)
        if found is None:
            raise ValueError(f"a {format} weight has no integers to be stored as {storage}")
        codes, scale, zero_point, block = found.codes, found.scale, found.zero_point, found.block
    inputs = [constant(graph, f"{name}/codes", codes, kind), constant(graph, f"{name}/scale", scale)]
    if zero_point.any():
        inputs.append(constant(graph, f"{name}/zero_point", zero_point, kind))
    where = {"axis": 1, "block_size": block} if block else {"axis": axis} if scale.ndim else {}
    values = insert(graph, marker, "DequantizeLinear", inputs, **where)
    values.producer().name = f"{layer}/weight/dequantize"
    return values


def _small_floats(simulated: QuantizedModel, layer: str, format: Format, axis: int) -> tuple[Any, Any]:
    """What an fp8_e4m3 weight holds, before its scale, and the scale of every channel or of all."""
    parameters = simulated.weight_parameters(layer, format)
    groups = to_groups(simulated.float_weight(layer), format, axis)
    codes = encode(groups.rows, format, parameters).to(torch.uint8).view(torch.float8_e4m3fn)
    scale = parameters["scale"].float().cpu().numpy()
    shared = format.granularity == "tensor"
    return groups.restore(codes.float()).detach().cpu().numpy(), scale.reshape(()) if shared else scale
