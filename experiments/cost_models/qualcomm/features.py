"""What the roofline counts in a network, read off the cost model itself.

At sharpness 1 the time of a network is linear in the device's parameters. So the same cost model prices the network on
devices of which one parameter is 1 and everything else takes no time: what comes out is what that parameter is
multiplied by. Nothing of the formula is written down a second time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pandas as pd

from hwmodels import Device, Network, Precision, Roofline, Workload
from hwmodels.quantity import Quantity

from . import chips
from .networks import NETWORKS, load
from .timings import PRECISIONS

FEATURES = ("passes", "passed_bytes", "calls", "operations", "layer_bytes")
"""Operations and conversions between the layers, the bytes they move; calls of layers, their operations and bytes.

Of integers wider than a byte, what a layer writes beyond the byte counts as moved between the layers."""

ENDLESS = 1e40


def count(network: Network, precision: str) -> dict[str, float]:
    """Counts a network at one precision throughout.

    Args:
        network: The network.
        precision: A key of `PRECISIONS`.
    """
    path = chips.PATHS[precision]
    between = _skeleton().float_compute
    free = dict.fromkeys(_skeleton().calibration, 0.0)
    found = {
        "calls": _seconds(network, precision, overheads=free | {path: 1.0}),
        "passes": _seconds(network, precision, overheads=free | {between: 1.0}),
        "operations": _seconds(network, precision, overheads=free, rate=1.0),
    }
    all_bytes = _seconds(network, precision, overheads=free, bandwidth=1.0)
    halved = _seconds(network, precision, overheads=free, bandwidth=1.0, share_between=0.5)
    found["passed_bytes"] = halved - all_bytes
    found["layer_bytes"] = all_bytes - found["passed_bytes"]
    return {name: round(found[name]) for name in FEATURES}


def count_all() -> pd.DataFrame:
    """Counts every network at every precision, with its parameters and multiply-accumulates."""
    rows = []
    for name in NETWORKS:
        network = load(name)
        rows += [{"model": name, "precision": short, **size(network), **count(network, short)} for short in PRECISIONS]
    return pd.DataFrame(rows)


def size(network: Network) -> dict[str, int]:
    """What predictors that are not the roofline read: sizes that no precision changes."""
    return {"parameters": network.weight_count, "macs": sum(layer.macs for layer in network)}


@cache
def _skeleton() -> Device:
    """A device with Hexagon's capabilities."""
    return chips.device(chips.SHIPPED["8 Gen 3"], chips.UNIT)


def _seconds(
    network: Network,
    precision: str,
    overheads: dict[str, float],
    rate: float = ENDLESS,
    bandwidth: float = ENDLESS,
    share_between: float = 1.0,
) -> float:
    """Seconds that a network takes on a device of these parameters."""
    device = _skeleton()
    calibration = {
        name: replace(
            one,
            overhead=_given(overheads[name], "s"),
            memory=_given(share_between if name == device.float_compute else 1.0),
        )
        for name, one in device.calibration.items()
    }
    compute = {name: replace(one, peak=_given(rate, "op/s")) for name, one in device.compute.items()}
    memory = (replace(device.memory[-1], bandwidth=_given(bandwidth, "byte/s")),)
    probe = replace(device, calibration=calibration, compute=compute, memory=memory, launch=_given(0.0, "s"))
    policy = dict.fromkeys(network.names, Precision.parse(PRECISIONS[precision]))
    return Roofline(probe).network_cost(network, policy, Workload()).total.latency_s


def _given(value: float, unit: str = "1") -> Quantity:
    return Quantity(value, unit, "a probe", "assumed")  # type: ignore[arg-type]
