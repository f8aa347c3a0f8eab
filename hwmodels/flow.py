"""Which layers hand tensors to which, and which layer says how wide a tensor is that operations read or write."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from hwmodels.network import Network


@dataclass(frozen=True)
class Handover:
    """A tensor that one layer reads in a format of its own.

    Attributes:
        tensor: The tensor.
        consumer: The first layer that reads it; the others find it converted.
        producer: The layer that leaves it, and can leave it in integers; None where it comes in floats.
        through_operations: Whether operations lie between producer and tensor.
    """

    tensor: str
    consumer: str
    producer: str | None
    through_operations: bool = False


class Owner(NamedTuple):
    """The layer whose precision says how wide a tensor is.

    Attributes:
        layer: The layer.
        reads: Whether it reads the tensor; else the tensor is made of what it leaves, and no layer reads it.
    """

    layer: str
    reads: bool


@dataclass(frozen=True)
class Flow:
    """How tensors pass between the layers of a network that take precisions.

    Attributes:
        handovers: The tensors that these layers read.
        handing_on: The layers that leave integers where they can.
        owners: Tensor to owner, where operations read and write integers; tensors that are not among them are floats.
        values_left: Layer to the values per sample that it leaves for operations alone, in a width of its own.
    """

    handovers: tuple[Handover, ...]
    handing_on: frozenset[str]
    owners: Mapping[str, Owner] = field(default_factory=dict)
    values_left: Mapping[str, int] = field(default_factory=dict)


def float_flow(network: Network, layers: Collection[str]) -> Flow:
    """How tensors pass where operations read and write floats: integers only from layer straight to layer."""
    found = []
    for tensor, consumer in _first_readers(network, layers).items():
        source = network.source_layer(tensor) if tensor in network.tensors else None
        alone = source is not None and all(name in layers for name in network.tensors[tensor].consumers)
        found.append(Handover(tensor, consumer, source.name if alone and source and source.name in layers else None))
    return Flow(tuple(found), frozenset(one.producer for one in found if one.producer is not None))


def integer_flow(network: Network, layers: Collection[str]) -> Flow:
    """How tensors pass where operations read and write the integers around them.

    A tensor is as wide as the layers that read it take it, which share its format; one that only operations read, or
    nothing does, as the input of the layer that it was made of. What a layer reads that takes no input format, and what
    was made of the network's input alone, stays in floats.
    """
    sources = _sources(network)
    owners = {}
    for name, one in network.tensors.items():
        readers = [reader for reader in one.consumers if reader in network]
        owner = readers[0] if readers else sources.get(name)
        takes_formats = all(reader in layers and network[reader].quantizes_input for reader in readers)
        if owner is not None and owner in layers and takes_formats:
            owners[name] = Owner(owner, bool(readers))
    fused = {one.reads[0]: one.writes[0] for one in network.operations if network.is_fused(one)}
    left = {name: [fused.get(tensor, tensor) for tensor in network[name].writes] for name in layers}
    handing_on = frozenset(name for name, tensors in left.items() if set(tensors) <= owners.keys())
    values_left = {
        name: sum(
            network.tensors[tensor].values for tensor in tensors if owners.get(tensor) == Owner(name, reads=False)
        )
        for name, tensors in left.items()
    }
    found = []
    for tensor, consumer in _first_readers(network, layers).items():
        source = sources.get(tensor) if tensor in owners else None
        through = source is not None and network.source_layer(tensor) is None
        found.append(Handover(tensor, consumer, source if source in handing_on else None, through))
    return Flow(tuple(found), handing_on, owners, values_left)


def _first_readers(network: Network, layers: Collection[str]) -> dict[str, str]:
    """The tensors whose format is that of a layer's input, each with the first layer that reads it."""
    first: dict[str, str] = {}
    for layer in network:
        tensor = network.input_tensor(layer)
        if tensor is not None and layer.name in layers:
            first.setdefault(tensor, layer.name)
    return first


def _sources(network: Network) -> dict[str, str]:
    """Tensor to the layer it was made of, through any operations: of several the one that ran last."""
    operations = {operation.name: operation for operation in network.operations}
    ran: dict[str, tuple[int, str]] = {}
    for step, name in enumerate(network.order):
        if name in network:
            ran |= dict.fromkeys(network[name].writes, (step, name))
            continue
        made_of = [ran[tensor] for tensor in operations[name].reads if tensor in ran]
        if made_of:
            ran |= dict.fromkeys(operations[name].writes, max(made_of))
    return {tensor: layer for tensor, (_, layer) in ran.items()}
