"""How many bytes of activations are alive at once."""

from __future__ import annotations

from collections.abc import Mapping

from hwmodels.network import Network
from hwmodels.precision import FLOAT_BITS, Precision


def stored_bits(network: Network, policy: Mapping[str, Precision]) -> dict[str, int]:
    """Bits per value of every tensor: the widest its consumers read, float where one is no quantized layer."""
    bits = {}
    for name, tensor in network.tensors.items():
        readers = [
            policy[consumer].input.bits if consumer in policy and network[consumer].quantizes_input else FLOAT_BITS
            for consumer in tensor.consumers
        ]
        bits[name] = max(readers, default=FLOAT_BITS)
    return bits


def peak_activation_bytes(network: Network, policy: Mapping[str, Precision]) -> float:
    """Peak bytes of live tensors over one forward pass of one sample, executed in `network.order`.

    A tensor lives from its producer (network inputs: from the start) to its last consumer (network outputs: to the
    end); operations do not run in place.
    """
    first = {name: step for step, name in reversed(list(enumerate(network.order)))}  # shared layers run several times
    last = {name: step for step, name in enumerate(network.order)}
    bits = stored_bits(network, policy)
    last_step = len(network.order) - 1
    change = [0.0] * (len(network.order) + 1)
    for tensor in network.tensors.values():
        size = tensor.values * bits[tensor.name] / 8
        born = first.get(tensor.producer or "", 0)
        dies = max((last[name] for name in tensor.consumers if name in last), default=born)
        dies = last_step if tensor.name in network.outputs else dies
        change[born] += size
        change[dies + 1] -= size
    peak = live = 0.0
    for step in change:
        live += step
        peak = max(peak, live)
    return peak
