"""Finds the layers that a runtime may fuse into one, and that should share a precision for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from hwmodels import Network
from hwmodels.network import Shape


def joined(ties: Iterable[Sequence[str]], network: Network) -> list[list[str]]:
    """Merges ties that have a layer in common, where all name layers of the network; others stay as they are."""
    merged: list[list[str]] = []
    for tie in ties:
        if not all(name in network for name in tie):
            merged.append(list(tie))  # a pattern, which the space resolves and checks
            continue
        meeting = [other for other in merged if set(other) & set(tie)]
        names = {name for other in (*meeting, tie) for name in other}
        merged = [other for other in merged if other not in meeting]
        merged.append([name for name in network.names if name in names])
    return merged


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
