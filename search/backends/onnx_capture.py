"""From a PyTorch model to a float ONNX graph that knows its layers.

The exporter writes the graph with markers on the weight and the input of every layer, where quantizers may go; and
operations that multiply with a layer's weight carry the layer in their name, `<layer>`, by which they are found again
in whatever a runtime makes of the graph.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hwmodels import Network
from search.errors import UnsupportedError
from search.quiet import quietly
from search.tasks.task import tensors_in
from search.trace import parameter_of, slow_attention

OPSET = 21  # the first whose DequantizeLinear takes 4-bit and 16-bit codes
IR_VERSION = 10
DOMAIN, INPUT, WEIGHT = "bitplan", "Input", "Weight"  # of the markers, which no written file holds
RESHAPING = {"Cast", "Concat", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}


def capture(model: nn.Module, network: Network, example_input: Any) -> Any:
    """Exports a float model; the batch size stays free.

    Args:
        model: The folded network.
        network: Its layers.
        example_input: A tensor, a tuple of positional inputs, or a mapping of keyword inputs, samples along the first
            axis.

    Returns:
        The graph with its markers, an `onnx_ir.Model`.

    Raises:
        UnsupportedError: If the exporter fails, or the model fixes its batch size.
    """
    from onnxscript import optimizer

    captured = _export(model, network, example_input)
    graph = captured.graph
    weights: dict[str, list[str]] = {}
    for layer in network:
        weights.setdefault(_weight_name(graph, model, layer.name), []).append(layer.name)
    for name, layers in weights.items():
        _mark_weight(graph, name, layers)
    captured.opset_imports[DOMAIN] = 1
    optimizer.optimize_ir(captured)  # the markers keep it from folding anything into a weight
    for marker in markers(graph, WEIGHT):
        _label_readers(marker, network)
    return captured


def call_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and keyword arguments of a call, keywords sorted by name as the graph has them."""
    if isinstance(inputs, Mapping):
        return (), {name: inputs[name] for name in sorted(inputs)}
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}


def markers(graph: Any, kind: str) -> list[Any]:
    """Lists the markers of a kind, in execution order."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type == kind]


def layers_in(node_name: str) -> list[str]:
    """Lists the layers that a node's name carries."""
    return re.findall(r"<([^<>]+)>", node_name)


def _export(model: nn.Module, network: Network, example_input: Any) -> Any:
    """Exports the model with markers on the inputs of its layers."""
    args, kwargs = call_arguments(example_input)
    hooks = [
        parameter_of(model, layer.name)[0].register_forward_pre_hook(_input_marker(layer.name), with_kwargs=True)
        for layer in network
        if layer.quantizes_input
    ]
    try:
        with quietly("torch", "torch.onnx"), torch.no_grad(), slow_attention():
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
    finally:
        for hook in hooks:
            hook.remove()
    program.model.ir_version = IR_VERSION
    return program.model


def _input_marker(layer: str) -> Any:
    """Returns a hook that puts a marker on the first input of a module."""

    def mark(x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(f"{DOMAIN}::{INPUT}", (x,), {"layer": layer}, dtype=x.dtype, shape=x.shape)

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
        fed = [p.attributes["layer"].as_string() for p in producers if p and (p.domain, p.op_type) == (DOMAIN, INPUT)]
        chosen = [name for name in layers if (name in fed if fed else not network[name].quantizes_input)]
        for name in chosen or layers:
            if name not in layers_in(node.name):
                node.name = f"{node.name}<{name}>"
