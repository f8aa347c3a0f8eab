"""How many bytes of activations are alive at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from hwmodels.network import Network, Tensor
from hwmodels.precision import FLOAT_BITS, Precision


def input_readers(network: Network, tensor: Tensor) -> tuple[str, ...]:
    """The layers whose input formats say how wide a tensor is stored; none where it stays in float.

    A tensor stays in float where something reads it that quantizes no input, or nothing does.
    """
    quantize = all(name in network and network[name].quantizes_input for name in tensor.consumers)
    return tensor.consumers if quantize else ()


def stored_bits(network: Network, policy: Mapping[str, Precision]) -> dict[str, int]:
    """Bits per value of every tensor: the widest its readers take, float where one is no quantized layer."""
    return {
        name: max(
            (policy[layer].input.bits if layer in policy else FLOAT_BITS for layer in input_readers(network, tensor)),
            default=FLOAT_BITS,
        )
        for name, tensor in network.tensors.items()
    }


def liveness_cuts(network: Network) -> tuple[tuple[str, ...], ...]:
    """Lists the tensors alive at once, step by step, over a forward pass in `network.order`.

    A tensor lives from its producer (network inputs: from the start) to its last consumer (network outputs: to the
    end); operations do not run in place. Steps whose tensors are all alive at another step as well are left out:
    whatever the tensors' sizes, the peak is at one of the others.
    """
    first = {name: step for step, name in reversed(list(enumerate(network.order)))}  # shared layers run several times
    last = {name: step for step, name in enumerate(network.order)}
    last_step = max(len(network.order) - 1, 0)
    born: dict[int, list[str]] = defaultdict(list)
    dying: dict[int, list[str]] = defaultdict(list)
    for name, tensor in network.tensors.items():
        start = first.get(tensor.producer or "", 0)
        end = max((last[consumer] for consumer in tensor.consumers if consumer in last), default=start)
        born[start].append(name)
        dying[last_step if name in network.outputs else max(end, start)].append(name)

    cuts: list[tuple[str, ...]] = []
    alive: dict[str, None] = {}
    has_grown = False  # since the last cut
    for step in range(last_step + 1):
        alive |= dict.fromkeys(born[step])
        has_grown = has_grown or bool(born[step])
        if has_grown and dying[step]:
            cuts.append(tuple(alive))
            has_grown = False
        for name in dying[step]:
            del alive[name]
    return tuple(cuts)


def peak_activation_bytes(network: Network, policy: Mapping[str, Precision]) -> float:
    """Peak bytes of live tensors over one forward pass of one sample: the largest of the liveness cuts."""
    bits = stored_bits(network, policy)
    size = {name: tensor.values * bits[name] / 8 for name, tensor in network.tensors.items()}
    return max((math.fsum(size[name] for name in cut) for cut in liveness_cuts(network)), default=0.0)
