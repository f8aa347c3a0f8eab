"""The cost of handing tensors from layer to layer, by what the first leaves and the second needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from hwmodels.conversion import FLOATS, INTEGERS, READ_DYNAMIC, READ_FLOAT, READ_TURNED, conversion_traffic
from hwmodels.cost import BoundaryCost, Cost
from hwmodels.flow import Handover
from hwmodels.operations import Passes
from hwmodels.runs import Runs

Pair = tuple[str, str]
"""What is left and what is read, as `hwmodels.conversion` calls them."""


def conversion_costs(
    passes: Passes, pairs: Iterable[Pair], values: int, through_operations: bool = False
) -> dict[Pair, Cost]:
    """What converting so many values costs, by what they are left and what they are read as."""
    costs = {}
    for left, read in dict.fromkeys(pairs):
        number, traffic = conversion_traffic(left, read, values, passes.device.float_bits, through_operations)
        costs[left, read] = passes.cost(values, traffic, number)
    return costs


def boundary_cost(passes: Passes, handover: Handover, left: Runs, read: Runs, values: int) -> BoundaryCost:
    """What converting so many values between two layers takes."""
    leavings, readings = dict.fromkeys((*left.left, FLOATS)), dict.fromkeys(read.read)
    pairs = [(one, other) for one in leavings for other in readings]
    costs = conversion_costs(passes, pairs, values, handover.through_operations)
    path = passes.device.float_compute
    producer = handover.producer or ""
    return BoundaryCost(handover.tensor, producer, handover.consumer, left.left_of, read.read_of, costs, path)


def with_detours(boundary: BoundaryCost, left: Runs, detours: Sequence[Cost]) -> BoundaryCost:
    """A boundary after a layer with kernels that exist only where they requantize.

    Only the layer's own seconds change where another kernel runs: that it might want another input then is left out.

    Args:
        boundary: What converting takes, from floats as well.
        left: How the layer runs where it requantizes.
        detours: What it takes more where its output has to be floats, by precision.
    """
    labels, costs = {}, dict(boundary.costs)
    numbers: dict[Cost, int] = {}
    for precision, plain, way, detour in zip(left.precisions, left.left, left.way.tolist(), detours, strict=True):
        labels[precision] = plain
        if not left.ways[way].needs_integer_output:
            continue
        labels[precision] = label = f"{plain} of {numbers.setdefault(detour, len(numbers))}"
        for reading in dict.fromkeys(boundary.read.values()):
            is_wanted = reading not in (READ_FLOAT, READ_DYNAMIC, READ_TURNED)
            kept = boundary.costs[INTEGERS, reading]
            costs[label, reading] = kept if is_wanted else boundary.costs[FLOATS, reading] + detour
    return replace(boundary, produced=labels, costs=costs)
