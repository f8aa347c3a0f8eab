"""From a PyTorch model to a float ONNX graph that knows its layers.

The exporter writes the graph with markers where quantizers may go: on the weight and the input of every layer, and on
the tensors that are quantized where they are produced. Operations that multiply with a layer's weight carry the layer
in their name, `<layer>`, by which they are found again in whatever a runtime makes of the graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hwmodels import Network
from search.errors import UnsupportedError
from search.quantize.placement import Placement, Point
from search.quiet import quietly
from search.tasks.task import tensors_in
from search.trace import parameter_of, slow_attention

OPSET = 21  # the first whose DequantizeLinear takes 4-bit and 16-bit codes, and blocks
IR_VERSION = 10
DOMAIN, INPUT, WEIGHT, TENSOR = "bitplan", "Input", "Weight", "Tensor"  # of the markers, which no written file holds
ATTRIBUTE = {INPUT: "layer", TENSOR: "tensor"}
RESHAPING = {"Cast", "Concat", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


def capture(model: nn.Module, network: Network, example_input: Any, points: Iterable[Point] = ()) -> Any:
    """Exports a float model; the batch size stays free.

    Args:
        model: The folded network.
        network: Its layers.
        example_input: A tensor, a tuple of positional inputs, or a mapping of keyword inputs, samples along the first
            axis.
        points: Tensors that may be quantized where they are produced, as a plan with `placement=full` names them.

    Returns:
        The graph with its markers, an `onnx_ir.Model`.

    Raises:
        UnsupportedError: If the exporter fails, drops a layer, or the model fixes its batch size.
    """
    from onnxscript import optimizer

    points = tuple(point for point in points if not point.is_fused)
    captured = _export(model, network, example_input, points)
    graph = captured.graph
    weights: dict[str, list[str]] = {}
    for layer in network:
        weights.setdefault(_weight_name(graph, model, layer.name), []).append(layer.name)
    for name, layers in weights.items():
        _mark_weight(graph, name, layers)
    captured.opset_imports[DOMAIN] = 1
    with quietly("onnxscript", "onnx_ir"):
        optimizer.optimize_ir(captured)  # the markers keep it from folding anything into a weight
    for marker in markers(graph, WEIGHT):
        _label_readers(marker, network)
    _check_nothing_was_dropped(graph, network, points)
    share_constants(graph)
    return captured


def share_constants(graph: Any) -> None:
    """Keeps one of constants that are alike; weights, which have a marker each, stay as they are.

    The exporter unrolls what layers share, such as the angles of rotary embeddings, into a copy for each.
    """
    first: dict[Any, Any] = {}
    for name, value in list(graph.initializers.items()):
        if any(node.domain == DOMAIN for node in value.consumers()) or value.is_graph_output():
            continue
        tensor = value.const_value
        known = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if known is not value:
            value.replace_all_uses_with(known)
            graph.initializers.pop(name)


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and keyword arguments of a call, keywords sorted by name as the graph has them."""
    if isinstance(inputs, Mapping):
        return (), {name: inputs[name] for name in sorted(inputs)}
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


def markers(graph: Any, kind: str) -> list[Any]:
    """Lists the markers of a kind, in execution order."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type == kind]


def marked(marker: Any) -> str:
    """Returns the layer whose input, or the tensor, that a marker stands on."""
    name: str = marker.attributes[ATTRIBUTE[marker.op_type]].as_string()
    return name


def layers_in(node_name: str) -> list[str]:
    """Lists the layers that a node's name carries."""
    return re.findall(r"<([^<>]+)>", node_name)


def _export(model: nn.Module, network: Network, example_input: Any, points: tuple[Point, ...]) -> Any:
    """Exports the model with markers on the inputs of its layers and on its points."""
    args, kwargs = call_arguments(example_input)
    owners = {layer.name: parameter_of(model, layer.name)[0] for layer in network}
    with ExitStack() as marking:
        for layer in network:
            if layer.quantizes_input:
                hook = owners[layer.name].register_forward_pre_hook(_input_marker(layer.name), with_kwargs=True)
                marking.callback(hook.remove)
        if points:
            marks = {point.tensor: _mark(TENSOR, point.tensor) for point in points}
            marking.enter_context(Placement(model, points).treating(marks, owners))
        try:
            with quietly("torch", "torch.onnx", "onnxscript", "onnx_ir"), torch.no_grad(), slow_attention():
                program: Any = torch.onnx.export(
                    model,
                    args,
                    kwargs=kwargs,
                    dynamic_shapes=_free_batch(kwargs or args, len(tensors_in([args, kwargs])[0])),
                    dynamo=True,
                    opset_version=OPSET,
                    optimize=False,
                    verbose=False,
                )
        except torch.onnx.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split("\n\n")[0].split())
            raise UnsupportedError(f"{type(model).__name__} cannot be exported to ONNX: {reason}") from error
    program.model.ir_version = IR_VERSION
    return program.model


def _mark(kind: str, name: str) -> Callable[[Tensor], Tensor]:
    """Returns the function that puts a marker on a tensor."""

    def mark(x: Tensor) -> Tensor:
        named: dict[str, Any] = {ATTRIBUTE[kind]: name}
        marker: Tensor = torch.onnx.ops.symbolic(f"{DOMAIN}::{kind}", (x,), named, dtype=x.dtype, shape=x.shape)
        return marker

    return mark


def _input_marker(layer: str) -> Any:
    """Returns a hook that puts a marker on the first input of a module."""
    mark = _mark(INPUT, layer)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (mark(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, kwargs | {name: mark(kwargs[name])}

    return hook


def _free_batch(inputs: Any, batch: int) -> Any:
    """Says, nested as the inputs are, that the first axis may vary of every tensor that holds a batch of samples."""
    if isinstance(inputs, Tensor):
        return {0: torch.export.Dim.DYNAMIC} if inputs.dim() and len(inputs) == batch else None
    if isinstance(inputs, Mapping):
        return {name: _free_batch(value, batch) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_free_batch(value, batch) for value in inputs)
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
    raise UnsupportedError(f"the exported graph does not read the weight of layer {layer}; leave it out of the search")


def _mark_weight(graph: Any, name: str, layers: list[str]) -> None:
    """Puts a marker between a weight and all that reads it, naming the layers that share it."""
    import onnx_ir as ir

    weight = graph.initializers[name]
    marker = ir.node(WEIGHT, [weight], {"layers": layers}, domain=DOMAIN, version=1)
    marker.outputs[0].type, marker.outputs[0].shape = weight.type, weight.shape
    for node, index in [use for use in weight.uses() if use[0] is not marker]:
        node.replace_input_with(index, marker.outputs[0])
    graph.insert_before(graph[0], marker)


def _label_readers(marker: Any, network: Network) -> None:
    """Adds `<layer>` to the name of every operation that multiplies with a marked weight.

    Of several layers that share the weight, it is the one whose input the operation reads, or else a weight-only one.
    """
    layers, reading = marker.attributes["layers"].as_strings(), list(marker.outputs[0].consumers())
    while reading:
        node = reading.pop()
        if node.op_type in RESHAPING:
            reading += [consumer for output in node.outputs for consumer in output.consumers()]
            continue
        producers = [value.producer() for value in node.inputs if value is not None]
        fed = [marked(p) for p in producers if p and (p.domain, p.op_type) == (DOMAIN, INPUT)]
        chosen = [name for name in layers if (name in fed if fed else not network[name].quantizes_input)]
        for name in chosen or layers:
            if name not in layers_in(node.name):
                node.name = f"{node.name}<{name}>"


def _check_nothing_was_dropped(graph: Any, network: Network, points: Iterable[Point]) -> None:
    """Raises UnsupportedError, naming it, if a layer or point is not in the graph, or something there is neither."""
    multiplied = {name for node in graph for name in layers_in(node.name)}
    read = {marked(marker) for marker in markers(graph, INPUT)}
    placed = {marked(marker) for marker in markers(graph, TENSOR)}
    for layer in network:
        if layer.name not in multiplied or (layer.quantizes_input and layer.name not in read):
            raise UnsupportedError(
                f"the exporter dropped layer {layer.name}: nothing that the model returns depends on it; leave it out "
                "of the search"
            )
    for tensor in (point.tensor for point in points):
        if tensor not in placed:
            raise UnsupportedError(
                f"the exported graph lacks the tensor {tensor}, which the plan quantizes where it is produced; search "
                "with quantizer.placement=inputs"
            )
    if unknown := multiplied - set(network.names):
        raise UnsupportedError(f"the exported graph multiplies with {min(unknown)}, which is no layer of the plan")
