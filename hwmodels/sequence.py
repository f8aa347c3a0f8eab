"""Networks that read tokens: their shapes at another length, and the keys and values they keep.

A language model is traced on sequences of some length, but prompts are read at another one, and text is generated a
token at a time against all that was read before.
"""

from __future__ import annotations

import math
from dataclasses import replace

from hwmodels.cost import Workload
from hwmodels.network import Layer, Network, Operation, Shape, Tensor
from hwmodels.precision import Format

ATTENTION = "scaled_dot_product_attention"
"""The operation that reads queries, keys and values, in this order."""


def token_count(network: Network) -> int | None:
    """Tokens per sample that a network was traced with; None where it reads no token ids."""
    for tensor in network.tensors.values():
        if tensor.producer is None and tensor.is_integer and len(tensor.shape) == 2:
            return tensor.shape[1]
    return None


def at_workload(network: Network, workload: Workload) -> Network:
    """The network with the shapes it has at the workload's tokens.

    Every axis between samples and features that is as long as the traced sequence is taken to be tokens; where the
    last axis of four or more is as long, too, it is the tokens attended to, which number `workload.context`.

    Raises:
        ValueError: If tokens or a context are asked for and the network reads no token ids, or tokens cannot be told
            from another axis.
    """
    if workload.tokens is None and workload.context is None:
        return network
    traced = token_count(network)
    if traced is None:
        raise ValueError(
            "workload.tokens and workload.context are for networks that read token ids, of shape (samples, tokens); "
            "this one reads none"
        )
    tokens = workload.tokens or traced
    context = max(workload.context or tokens, tokens)

    def sized(shape: Shape) -> Shape:
        if len(shape) < 2:
            return shape
        if shape[1:-1].count(traced) > 1:
            raise ValueError(
                f"the network was traced on {traced} tokens, and another axis of a tensor of shape {shape} is as long; "
                "give an example input of another length"
            )
        middle = tuple(tokens if size == traced else size for size in shape[1:-1])
        last = shape[-1]
        if len(shape) == 2 and last == traced:
            last = tokens
        elif len(shape) >= 4 and shape[-2:] == (traced, traced):
            last = context
        return (shape[0], *middle, last)

    def sized_layer(layer: Layer) -> Layer:
        read, written = sized(layer.input_shape), sized(layer.output_shape)
        share = math.prod(written) / max(math.prod(layer.output_shape), 1)
        return replace(layer, input_shape=read, output_shape=written, macs=round(layer.macs * share))

    tensors = {name: replace(tensor, shape=sized(tensor.shape)) for name, tensor in network.tensors.items()}
    return replace(network, layers=tuple(map(sized_layer, network.layers)), tensors=tensors)


def kept_values(network: Network, operation: Operation) -> int:
    """Keys and values of one token and sample that an attention keeps for later tokens; 0 for other operations."""
    if operation.kind != ATTENTION or len(operation.reads) < 3:
        return 0
    keys, values = (network.tensors[name] for name in operation.reads[1:3])
    return sum(tensor.values // max(_rows(tensor), 1) for tensor in (keys, values))


def cache_bytes(network: Network, workload: Workload) -> float:
    """Bytes that the keys and values of a whole context take, in `workload.cache_format`.

    Args:
        network: A network at the workload's shapes.
        workload: `context` tokens, or as many as are read at once.
    """
    context = max(workload.context or 0, token_count(network) or 0)
    return sum(context * token_bytes(network, operation, workload) for operation in network.operations)


def earlier_bytes(network: Network, operation: Operation, workload: Workload) -> float:
    """Bytes of keys and values of earlier tokens that one operation reads beside those it is given."""
    earlier = max((workload.context or 0) - (token_count(network) or 0), 0)
    return earlier * token_bytes(network, operation, workload)


def token_bytes(network: Network, operation: Operation, workload: Workload) -> float:
    """Bytes that an operation keeps of one token of every sample, each tensor or group with its scale."""
    values = kept_values(network, operation)
    if not values:
        return 0.0
    format = Format.parse(workload.cache_format)
    groups = 2 * math.ceil(values / 2 / format.group) if format.granularity == "group" else 2
    return workload.batch * format.storage_bits(values, groups) / 8


def _rows(tensor: Tensor) -> int:
    """Tokens of a tensor of keys or values, whose shape ends in (tokens, features)."""
    return tensor.shape[-2] if len(tensor.shape) >= 3 else 1
