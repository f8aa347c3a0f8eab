"""Finds the layers that a runtime may fuse into one, and that should share a precision for it."""

from __future__ import annotations

from collections import defaultdict

from hwmodels import Network
from hwmodels.network import Shape


def shared_input_ties(network: Network) -> list[list[str]]:
    """Returns the groups of two or more linear layers that read exactly the same tensor, in execution order.

    Such are the query, key and value projections of an attention and the gate and up projections of a gated
    feed-forward block: runtimes lay their weights one below the other and multiply once, which takes one format. The
    tensor must come in the same shape, as its views count as the same tensor. Layers called on several tensors form a
    group if they read all the same. Other kinds are left out: convolutions of one input fuse only where kernel, stride,
    padding and dilation agree.
    """
    readers: defaultdict[tuple[frozenset[str], Shape], list[str]] = defaultdict(list)
    for layer in network:
        if layer.kind == "linear" and layer.reads:
            readers[frozenset(layer.reads), layer.input_shape].append(layer.name)
    return [layers for layers in readers.values() if len(layers) > 1]
