"""Random policies whose average bits spread, and slices of them that share one average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import softmax

from hwmodels import Network
from search.policy import Policy
from search.space import SearchSpace

SPREAD = (2.5, 7.0)
"""Average weight bits that policies spread over."""

SLICES = (3.0, 3.5, 4.0, 5.0)
"""Average weight bits that the policies of a slice share."""

INPUT_BITS = (4.5, 7.5)
"""Average input bits that policies spread over; those of a slice share their middle."""

TOLERANCE = 0.02  # bits, within a slice


@dataclass(frozen=True)
class Drawn:
    """A policy to be measured.

    Attributes:
        policy: The policy.
        group: `spread`, `slice`, or `plan` where a solver proposed it.
        weight_bits: Average weight bits wanted.
    """

    policy: Policy
    group: str
    weight_bits: float


@dataclass(frozen=True)
class Side:
    """The open decisions about weights, or about inputs, and what each counts in the average.

    Attributes:
        decisions: Their indices.
        bits: Of every decision, the bits of its formats.
        shares: Of every decision, its share in the average; they add up to 1.
    """

    decisions: tuple[int, ...]
    bits: tuple[np.ndarray, ...]
    shares: np.ndarray

    def average(self, point: Sequence[int]) -> float:
        """Average bits of a point."""
        chosen = [bits[point[index]] for index, bits in zip(self.decisions, self.bits, strict=True)]
        return float(np.dot(self.shares, chosen))


def sides(space: SearchSpace, network: Network) -> tuple[Side, Side]:
    """The weights, which count by their number, and the inputs, which count alike."""
    return _side(space, network, "weight"), _side(space, network, "input")


def _side(space: SearchSpace, network: Network, name: str) -> Side:
    decisions = tuple(index for index in space.free if space.decisions[index].side == name)
    open_ = [space.decisions[index] for index in decisions]
    counts = [sum(network[layer].weight_count for layer in d.layers) if name == "weight" else 1 for d in open_]
    bits = tuple(np.array([format.bits for format in decision.formats]) for decision in open_)
    return Side(decisions, bits, np.array(counts) / max(sum(counts), 1))


def draw(space: SearchSpace, network: Network, spread: int, in_slice: int, seed: int = 0) -> list[Drawn]:
    """Draws policies over the whole range of bits, and slices at fixed average bits.

    Args:
        space: Where to draw from.
        network: Says how many weights layers have.
        spread: Number of policies that spread.
        in_slice: Number of policies in each of `SLICES`.
        seed: Of all that is random.
    """
    rng = np.random.default_rng(seed)
    wanted = [("spread", rng.uniform(*SPREAD), rng.uniform(*INPUT_BITS)) for _ in range(spread)]
    wanted += [("slice", bits, float(np.mean(INPUT_BITS))) for bits in SLICES for _ in range(in_slice)]
    drawn: dict[Policy, Drawn] = {}
    for group, *targets in wanted:
        policy = _draw_one(space, sides(space, network), targets, rng)
        drawn[policy] = Drawn(policy, group, targets[0])
    return list(drawn.values())


def _draw_one(
    space: SearchSpace, both: tuple[Side, Side], targets: Sequence[float], rng: np.random.Generator
) -> Policy:
    point = [0] * len(space.decisions)
    for side, target in zip(both, targets, strict=True):
        if side.decisions:
            _draw_side(point, side, target, rng)
    return space.decode(point)


def _draw_side(point: list[int], side: Side, target: float, rng: np.random.Generator) -> None:
    """Draws formats with probabilities exponential in their bits, then steps at random to the wanted average."""

    def expected(tilt: float) -> float:
        return float(
            sum(share * softmax(tilt * bits) @ bits for share, bits in zip(side.shares, side.bits, strict=True))
        )

    tilt = brentq(lambda tilt: expected(tilt) - target, -20, 20)
    for index, bits in zip(side.decisions, side.bits, strict=True):
        point[index] = int(rng.choice(len(bits), p=softmax(tilt * bits)))
    missing = target - side.average(point)
    while abs(missing) > TOLERANCE:
        steps = [
            (index, step)
            for index, bits, share in zip(side.decisions, side.bits, side.shares, strict=True)
            for step in (-1, 1)
            if 0 <= point[index] + step < len(bits)
            and abs(missing - share * (bits[point[index] + step] - bits[point[index]])) < abs(missing)
        ]
        if not steps:
            return
        index, step = steps[rng.integers(len(steps))]
        point[index] += step
        missing = target - side.average(point)


def mean_bits(space: SearchSpace, network: Network, policy: Policy) -> tuple[float, float]:
    """Average weight bits and average input bits of a policy, over what is open."""
    point = space.encode(policy)
    weights, inputs = (side.average(point) for side in sides(space, network))
    return weights, inputs
