"""In which order layers are repaired: after all they depend on, and together with what they do not depend on."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from hwmodels import Format, Network, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.quantize.simulate import QuantizedModel

MATRIX_KINDS = ("linear", "conv")  # the kinds of layers that `search.recover.unfold` knows, by how they begin
LARGEST_BITS = 8
NETWORK_INPUT = re.compile(r"input(\.\d+)?")  # names of the tensors that a network is given


def quantized_layers(simulated: QuantizedModel, policy: Mapping[str, Precision]) -> list[str]:
    """Returns the linear layers and convolutions whose weight the policy quantizes, in execution order."""
    return [
        layer.name
        for layer in simulated.network
        if layer.kind.startswith(MATRIX_KINDS) and not weight_format(policy, layer.name).is_float
    ]


def weight_format(policy: Mapping[str, Precision], layer: str) -> Format:
    """Returns the format of a layer's weight; a layer that the policy does not name is in float."""
    return policy.get(layer, FLOAT_PRECISION).weight


def float_biases(simulated: QuantizedModel, layers: Iterable[str]) -> dict[str, Tensor]:
    """Returns the biases that layers add in float, by layer; a layer without one is left out."""
    model = simulated.apply({})
    names = {layer: simulated.bias_name(layer) for layer in layers}
    return {layer: model.get_parameter(name).detach() for layer, name in names.items() if name}


def rounded_layers(simulated: QuantizedModel, policy: Mapping[str, Precision]) -> list[str]:
    """Returns the quantized layers whose weights may be rounded otherwise than to the nearest value.

    Not formats of more than 8 bits, where it makes no difference, nor those that round at random, nor a weight that
    several layers hold: rounded for one's inputs, it would suit no other.
    """
    holders = Counter(simulated.weight_name(layer) for layer in simulated.network.names)
    formats = {layer: weight_format(policy, layer) for layer in quantized_layers(simulated, policy)}
    return [
        layer
        for layer, format in formats.items()
        if format.bits <= LARGEST_BITS and not format.is_stochastic and holders[simulated.weight_name(layer)] == 1
    ]


def stages(network: Network, names: Iterable[str]) -> list[list[str]]:
    """Groups layers or operations so that one pass over the data can serve a group: none depends on another of it.

    A group depends on those before it only. A layer that reads what could not be followed counts as dependent on all
    that ran before it; one that is called again is placed by its first call.

    Args:
        network: Its data flow says what depends on what.
        names: Of layers or operations; those that the network does not have are left out.

    Returns:
        The groups, from the network's input on; names within a group in execution order.
    """
    parts = {part.name: part for part in (*network.operations, *network.layers)}
    chosen = set(names)
    before: dict[str, int] = {name: 0 for name in network.tensors if NETWORK_INPUT.fullmatch(name)}
    found: defaultdict[int, dict[str, None]] = defaultdict(dict)
    placed: set[str] = set()
    deepest = 0
    for name in network.order:
        part = parts[name]
        written_later = {tensor for tensor in part.reads if network.tensors[tensor].producer and tensor not in before}
        depth = max((before.get(tensor, deepest) for tensor in part.reads if tensor not in written_later), default=0)
        if name in chosen:
            if name not in placed:
                found[depth][name] = None
                placed.add(name)
            depth += 1
        deepest = max(deepest, depth)
        before |= {tensor: max(depth, before.get(tensor, 0)) for tensor in part.writes}
    return [list(found[depth]) for depth in sorted(found)]


def dependent_on(network: Network, names: Iterable[str]) -> set[str]:
    """Returns the layers and operations among whose sources is one of `names`, those themselves included."""
    parts = {part.name: part for part in (*network.operations, *network.layers)}
    found, moved = set(names), set[str]()
    has_begun = False
    for name in network.order:
        has_begun = has_begun or name in found
        unfollowed = has_begun and any(_is_unfollowed(network, tensor) for tensor in parts[name].reads)
        if name in found or unfollowed or moved.intersection(parts[name].reads):
            found.add(name)
            moved.update(parts[name].writes)
    return found


def _is_unfollowed(network: Network, tensor: str) -> bool:
    """True for what a layer reads from code that could not be followed: neither produced nor given to the network."""
    return network.tensors[tensor].producer is None and not NETWORK_INPUT.fullmatch(tensor)


def last_of(network: Network, stage: Sequence[str]) -> str | None:
    """Returns the layer after which a pass that serves a stage may end; None if it must run to its end.

    An operation has run when the next layer has; what is called again may run until the end.
    """
    again = {name for name, calls in Counter(network.order).items() if calls > 1}
    again |= {operation.name.removesuffix(".1") for operation in network.operations if operation.name.endswith(".1")}
    last = max(stage, key=network.order.index)
    after = network.order[network.order.index(last) :]
    return None if again & set(stage) else next((name for name in after if name in network and name not in again), None)
