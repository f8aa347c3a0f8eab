"""Small edits of an ONNX graph: constants, nodes in front of others, nodes that vanish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def constant(graph: Any, name: str, values: ArrayLike, kind: str = "FLOAT") -> Any:
    """Adds an initializer of an ONNX type, under a name of its own."""
    import onnx_ir as ir

    while name in graph.initializers:
        name += "'"
    tensor: Any = ir.tensor(np.asarray(values).astype(ir.DataType[kind].numpy()), name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    graph.register_initializer(value)
    return value


def insert(graph: Any, before: Any, operation: str, inputs: Sequence[Any], **attributes: Any) -> Any:
    """Inserts a node in front of another, and returns its output."""
    import onnx_ir as ir

    node = ir.node(operation, inputs, attributes)
    graph.insert_before(before, node)
    return node.outputs[0]


def replace(graph: Any, node: Any, value: Any) -> None:
    """Removes a node, its readers reading `value` instead."""
    if node.outputs[0].is_graph_output() and value.type is None:
        value.type, value.shape = node.outputs[0].type, node.outputs[0].shape
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def cast(graph: Any, before: Any, value: Any, kind: str) -> Any:
    """Inserts a cast to an ONNX type."""
    import onnx_ir as ir

    return insert(graph, before, "Cast", [value], to=int(ir.DataType[kind]))
