"""From a PyTorch model to an ONNX graph in QDQ form, under a policy's own scales and zero points.

The exporter writes the float model with markers on the weight and the input of every layer. The markers then become codes
behind `DequantizeLinear` and `QuantizeLinear -> Clip -> DequantizeLinear`: every value the graph computes with is one the
simulation computes with. Operations that multiply with a layer's weight carry the layer in their name, `<layer>`, by which
they are found again in whatever a runtime makes of the graph.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hwmodels import Format, Network, Precision
from search.errors import UnsupportedError
from search.quantize.affine import Range, weight_codes
from search.quantize.simulate import QuantizedModel
from search.trace import parameter_of, slow_attention

OPSET = 21  # the first whose DequantizeLinear takes 4-bit and 16-bit codes
IR_VERSION = 10
DOMAIN, INPUT, WEIGHT = "bitplan", "Input", "Weight"  # of the markers, which no written file holds
RESHAPING = {"Cast", "Concat", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
INT32_HIGHEST = 2**31 - 1
PLAN_KEY = "bitplan.plan"


def capture(model: nn.Module, network: Network, example_input: Any) -> Any:
    """Exports a float model, with a marker in front of every layer that quantizes its input; the batch size stays free.

    Args:
        model: The folded network.
        network: Its layers.
        example_input: A tensor, a tuple of positional inputs, or a mapping of keyword inputs; samples along the first axis.

    Returns:
        The graph, an `onnx_ir.Model`.

    Raises:
        UnsupportedError: If the exporter fails, or the model fixes its batch size.
    """
    from onnxscript import optimizer

    args, kwargs = call_arguments(example_input)
    hooks = [
        parameter_of(model, layer.name)[0].register_forward_pre_hook(_input_marker(layer.name), with_kwargs=True)
        for layer in network
        if layer.quantizes_input
    ]
    try:
        with _quietly(), torch.no_grad(), slow_attention():
            program = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamic_shapes=_free_batch(kwargs or args),
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UnsupportedError(f"{type(model).__name__} cannot be exported to ONNX: {reason}") from error
    finally:
        for hook in hooks:
            hook.remove()
    assert program is not None
    captured = program.model
    captured.ir_version = IR_VERSION
    batch = captured.graph.inputs[0].shape[0]
    if isinstance(batch, int):
        raise UnsupportedError(
            f"{type(model).__name__} runs only on batches of {batch}, the size of its example input; "
            "let its code take the batch size from the input's shape"
        )
    weights: dict[str, list[str]] = {}
    for layer in network:
        weights.setdefault(_weight_name(captured.graph, model, layer.name), []).append(layer.name)
    for name, layers in weights.items():
        _mark_weight(captured, name, layers)
    optimizer.optimize_ir(captured)  # the markers keep it from folding anything into a weight
    for marker in _markers(captured.graph, WEIGHT):
        _label(marker, network)
    return captured


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and keyword arguments of a call, keywords sorted by name as the graph has them."""
    if isinstance(inputs, Mapping):
        return (), {name: inputs[name] for name in sorted(inputs)}
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


def quantized(captured: Any, simulated: QuantizedModel, policy: Mapping[str, Precision]) -> Any:
    """Returns a copy of a captured graph whose layers have the precisions of `policy`; layers it lacks stay float."""
    model = captured.clone()
    graph, inputs = model.graph, {}
    for marker in _markers(graph, INPUT):
        layer, value = marker.attributes["layer"].as_string(), marker.inputs[0]
        format = policy.get(layer, Precision()).input
        if not format.is_float:
            key = (value, simulated.input_range(layer, format), format)
            if key not in inputs:  # layers that read one tensor in one format share its quantizer
                inputs[key] = _quantize_input(graph, marker, *key)
            value = inputs[key]
        _replace(graph, marker, value)
    for marker in _markers(graph, WEIGHT):
        layer = marker.attributes["layers"].as_strings()[-1]  # the simulation, too, gives a shared weight the last one's format
        format = policy.get(layer, Precision()).weight
        if format.is_float:
            _replace(graph, marker, marker.inputs[0])
        else:
            scale, axis = simulated.weight_scale(layer, format), simulated.network[layer].channel_axis
            codes = weight_codes(simulated.float_weight(layer), scale, format, axis)
            _quantize_weight(graph, marker, codes, scale, format, axis)
    for node in [node for node in graph if node.op_type == "Gemm"]:
        precisions = [policy.get(layer, Precision()) for layer in layers_in(node.name)]
        if precisions and all(part.bits <= 8 for precision in precisions for part in (precision.weight, precision.input)):
            _quantize_bias(graph, node)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    model.opset_imports.pop(DOMAIN, None)
    return model


def save(model: Any, path: Path, plan: str = "") -> None:
    """Writes a graph, naming the plan it was made from, and checks that it is valid ONNX.

    Raises:
        UnsupportedError: If it is not, as when the exporter does not translate an operation rightly.
    """
    import onnx
    import onnx_ir as ir

    proto = ir.to_proto(model)
    proto.metadata_props.add(key=PLAN_KEY, value=plan)
    for value in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del value.metadata_props[:]  # stack traces of the exporter: larger than a small network's weights
    try:
        onnx.save(proto, path)
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UnsupportedError(f"the exported graph is not valid ONNX: {str(error).strip().splitlines()[0]}") from error


def layers_in(node_name: str) -> list[str]:
    """The layers that a node's name carries."""
    return re.findall(r"<([^<>]+)>", node_name)


def _input_marker(layer: str) -> Any:
    """Returns a hook that puts a marker on the first input of a module."""

    def mark(x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(f"{DOMAIN}::{INPUT}", (x,), {"layer": layer}, dtype=x.dtype, shape=x.shape)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (mark(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, kwargs | {name: mark(kwargs[name])}

    return hook


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps the exporter's remarks about its own internals from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _free_batch(inputs: Any) -> Any:
    """Marks the first axis of every tensor in nested inputs as one that may vary."""
    if isinstance(inputs, Tensor):
        return {0: torch.export.Dim.AUTO} if inputs.dim() else None
    if isinstance(inputs, Mapping):
        return {name: _free_batch(value) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_free_batch(value) for value in inputs)
    return None


def _weight_name(graph: Any, model: nn.Module, layer: str) -> str:
    """Returns the name that a layer's weight has in the graph.

    Raises:
        UnsupportedError: If nothing there reads it.
    """
    owner, parameter = parameter_of(model, layer)
    weight = owner.get_parameter(parameter)
    for name, value in model.named_parameters(remove_duplicate=False):
        if value is weight and name in graph.initializers and graph.initializers[name].uses():
            return name
    raise UnsupportedError(f"the exported graph does not read the weight of layer {layer}; exclude the layer from the search")


def _mark_weight(model: Any, name: str, layers: list[str]) -> None:
    """Puts a marker between a weight and all that reads it, naming the layers that share it."""
    import onnx_ir as ir

    weight = model.graph.initializers[name]
    marker = ir.node(WEIGHT, [weight], {"layers": layers}, domain=DOMAIN, version=1)
    marker.outputs[0].type, marker.outputs[0].shape = weight.type, weight.shape
    for node, index in [use for use in weight.uses() if use[0] is not marker]:
        node.replace_input_with(index, marker.outputs[0])
    model.graph.insert_before(model.graph[0], marker)
    model.opset_imports[DOMAIN] = 1


def _markers(graph: Any, kind: str) -> list[Any]:
    return [node for node in graph if node.domain == DOMAIN and node.op_type == kind]


def _label(marker: Any, network: Network) -> None:
    """Adds `<layer>` to the name of every operation that multiplies with a marked weight.

    Among layers that share the weight, the operation is the one whose input it reads, or one whose input is not marked.
    """
    layers, reading = marker.attributes["layers"].as_strings(), list(marker.outputs[0].consumers())
    while reading:
        node = reading.pop()
        if node.op_type in RESHAPING:
            reading += [consumer for output in node.outputs for consumer in output.consumers()]
            continue
        producers = [value.producer() for value in node.inputs if value is not None]
        fed = [p.attributes["layer"].as_string() for p in producers if p and (p.domain, p.op_type) == (DOMAIN, INPUT)]
        mine = [layer for layer in layers if layer in fed or not fed and not network[layer].quantizes_input]
        for layer in mine or layers:
            if layer not in layers_in(node.name):
                node.name = f"{node.name}<{layer}>"


def _replace(graph: Any, node: Any, value: Any) -> None:
    """Removes a node, its readers reading `value` instead."""
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _constant(graph: Any, name: str, values: np.ndarray | Tensor, type: str = "") -> Any:
    """Adds an initializer, under a name of its own."""
    import onnx_ir as ir

    array = np.asarray(values)
    if type:
        array = array.astype(ir.DataType[type].numpy())
    while name in graph.initializers:
        name += "'"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape))
    graph.register_initializer(value)
    return value


def _insert(graph: Any, before: Any, operation: str, inputs: Sequence[Any], **attributes: int) -> Any:
    """Inserts a node in front of another, and returns its output."""
    import onnx_ir as ir

    node = ir.node(operation, inputs, attributes)
    graph.insert_before(before, node)
    return node.outputs[0]


def input_storage(format: Format) -> Format:
    """Returns the format of 8 or 16 bits that holds an input format's codes."""
    return Format(8 if format.bits <= 8 else 16, signed=format.signed)


def weight_storage(format: Format) -> Format:
    """Returns the format of 4, 8 or 16 bits that holds a weight format's codes: 4 only for 4 itself."""
    return format if format.bits == 4 else input_storage(format)


def _quantize_input(graph: Any, before: Any, x: Any, range_: Range, format: Format) -> Any:
    """Inserts the quantizer of a layer's input, and returns the quantized values.

    Codes narrower than their storage are clipped as codes, which leaves `QuantizeLinear` next to the operation that
    computes its input, where runtimes look for it.
    """
    layer, storage = before.attributes["layer"].as_string(), input_storage(format)
    kind = str(storage).upper()
    scale = _constant(graph, f"{layer}/input_scale", np.float32(range_.scale))
    zero = _constant(graph, f"{layer}/input_zero_point", np.asarray(range_.zero_point), kind)
    clips = format != storage or format.signed  # a symmetric format lacks the most negative code of its storage
    if clips and storage.bits == 16:  # onnxruntime clips no 16-bit codes, so clip the values
        ends = [(code - range_.zero_point) * np.float32(range_.scale) for code in (format.lowest, format.highest)]
        low, high = (_constant(graph, f"{layer}/input_{end}", np.float32(value)) for end, value in zip(("low", "high"), ends, strict=True))
        x = _insert(graph, before, "Clip", [x, low, high])
    codes = _insert(graph, before, "QuantizeLinear", [x, scale, zero])
    if clips and storage.bits == 8:
        low = _constant(graph, f"{layer}/lowest_code", np.asarray(format.lowest), kind)
        high = _constant(graph, f"{layer}/highest_code", np.asarray(format.highest), kind)
        codes = _insert(graph, before, "Clip", [codes, low, high])
    return _insert(graph, before, "DequantizeLinear", [codes, scale, zero])


def _quantize_weight(graph: Any, marker: Any, codes: Tensor, scale: Tensor, format: Format, axis: int) -> None:
    """Replaces a marked weight by its codes behind `DequantizeLinear`, one scale per channel along `axis`.

    int4 codes pass through a cast to int8, which the runtime does once, when it loads the file: its integer kernels take
    8 bits. Likewise transposes move from the values to the codes.
    """
    import onnx_ir as ir

    name, kind = marker.inputs[0].name, str(weight_storage(format)).upper()
    # A channel of zeros is zero under any scale; the largest keeps the bias of integer kernels within 32 bits.
    dead = (codes == 0).movedim(axis, 0).flatten(1).all(1)
    scales = _constant(graph, f"{name}/scale", torch.where(dead, scale.max(), scale).cpu().numpy())
    stored = _constant(graph, f"{name}/codes", codes.cpu().numpy(), kind)
    if kind == "INT4":
        kind, stored = "INT8", _insert(graph, marker, "Cast", [stored], to=int(ir.DataType.INT8))

    for node, index in list(marker.outputs[0].uses()):
        order = list(node.attributes["perm"].as_ints()) if node.op_type == "Transpose" else list(range(codes.dim()))
        turned = _insert(graph, node, "Transpose", [stored], perm=order) if node.op_type == "Transpose" else stored
        # Not shared: onnxruntime rewrites the zero points of each reader when it avoids saturation (see the worker).
        zeros = _constant(graph, f"{name}/zero_point", np.zeros(len(scale)), kind)
        values = _insert(graph, node, "DequantizeLinear", [turned, scales, zeros], axis=order.index(axis))
        if node.op_type == "Transpose":
            _replace(graph, node, values)
        else:
            node.replace_input_with(index, values)
    graph.remove(marker, safe=True)


def _quantize_bias(graph: Any, gemm: Any) -> None:
    """Gives a `Gemm` of 8-bit codes the int32 bias that onnxruntime's integer kernel needs.

    It is rounded to steps of input scale times weight scale, and stays where it does not fit into 32 bits. (Convolutions
    need no help: onnxruntime rounds their bias so itself.)
    """
    x, weight = gemm.inputs[0].producer(), gemm.inputs[1].producer()
    scale, scales = x.inputs[1].const_value.numpy(), weight.inputs[1].const_value.numpy()
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if bias is None or bias.const_value is None:
        return
    steps = (scales * scale).astype(np.float32)
    codes = np.rint(bias.const_value.numpy() / steps.astype(np.float64))
    if np.abs(codes).max() <= INT32_HIGHEST:
        stored, step = _constant(graph, f"{bias.name}/codes", codes, "INT32"), _constant(graph, f"{bias.name}/scale", steps)
        gemm.replace_input_with(2, _insert(graph, gemm, "DequantizeLinear", [stored, step], axis=0))
