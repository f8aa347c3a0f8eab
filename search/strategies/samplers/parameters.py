"""What a sampler decides about: one whole number for every open decision, or for every block of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Literal

import numpy as np

from search.space import Decision, SearchSpace

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Tie = Literal["auto", "none", "block"]
TIES: tuple[Tie, ...] = ("auto", "none", "block")
MANY = 50
"""Open decisions above which `auto` ties them by block: a hundred trials say little about more numbers than that."""


@dataclass(frozen=True)
class Parameter:
    """One number that a sampler chooses: the level of decisions that share their side and their formats.

    Attributes:
        name: What the sampler calls it: `weight conv1`, `input relu`, or `weight layer1.0.*` for a whole block.
        decisions: Indices of the decisions in a point.
        levels: How many formats there are, ordered from few bits to many.
    """

    name: str
    decisions: tuple[int, ...]
    levels: int


@dataclass(frozen=True)
class Parameters:
    """A sampler's view of a space: points are mappings from a parameter's name to the index of its format.

    Attributes:
        space: The space.
        parameters: Its parameters; decisions that are not open belong to none.
    """

    space: SearchSpace
    parameters: tuple[Parameter, ...]

    @classmethod
    def of(cls, space: SearchSpace, tie: Tie = "none") -> Parameters:
        """Makes a parameter of every open decision, or of every block's decisions with the same side and formats.

        Args:
            space: The space.
            tie: `none`, `block`, or `auto`: by block where more than `MANY` decisions are open.
        """
        is_tied = tie == "block" or (tie == "auto" and len(space.free) > MANY)
        if not is_tied:
            return cls(space, tuple(_alone(space, index) for index in space.free))
        blocks = block_of([layer for unit in space.units for layer in unit.layers])
        groups: dict[object, list[int]] = {}
        for index in space.free:
            decision = space.decisions[index]
            block = blocks[decision.layers[0]]
            key = (decision.side, block, decision.formats) if block else index
            groups.setdefault(key, []).append(index)
        named = Counter(_block_name(space.decisions[group[0]], blocks) for group in groups.values() if len(group) > 1)
        return cls(
            space,
            tuple(
                _alone(space, group[0]) if len(group) == 1 else _together(space, group, blocks, named)
                for group in groups.values()
            ),
        )

    @property
    def size(self) -> int:
        """How many points a sampler can choose from."""
        return prod(parameter.levels for parameter in self.parameters)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """What Optuna draws from: whole numbers, so that samplers know the formats' order."""
        from optuna.distributions import IntDistribution

        return {parameter.name: IntDistribution(0, parameter.levels - 1) for parameter in self.parameters}

    def point(self, chosen: Mapping[str, int]) -> tuple[int, ...]:
        """Turns what a sampler chose into a point of the space."""
        point = [0] * len(self.space.decisions)
        for parameter in self.parameters:
            for index in parameter.decisions:
                point[index] = chosen[parameter.name]
        return tuple(point)

    def nearest(self, point: Sequence[int]) -> dict[str, int]:
        """What a sampler would choose to come nearest to a point: in every block the median level, the lower of two."""
        levels = {item.name: sorted(point[index] for index in item.decisions) for item in self.parameters}
        return {name: values[(len(values) - 1) // 2] for name, values in levels.items()}

    def neighbours(self, point: Sequence[int], rng: np.random.Generator) -> Iterator[dict[str, int]]:
        """Yields what differs by one step of one parameter from what stands for a point, in random order."""
        chosen = self.nearest(point)
        steps = [(parameter, step) for parameter in self.parameters for step in (-1, 1)]
        for number in rng.permutation(len(steps)):
            parameter, step = steps[number]
            if 0 <= chosen[parameter.name] + step < parameter.levels:
                yield chosen | {parameter.name: chosen[parameter.name] + step}

    def uniform(self) -> Iterator[dict[str, int]]:
        """Yields the uniform policies, from many bits to few; where a list of formats is short, its last or first."""
        deepest = max((parameter.levels for parameter in self.parameters), default=1)
        for level in reversed(range(deepest)):
            yield {parameter.name: min(level, parameter.levels - 1) for parameter in self.parameters}


def block_of(layers: Sequence[str]) -> dict[str, str]:
    """Maps each layer to its block: the smallest module around it that holds another layer, too.

    `layer1.0.conv1` and `layer1.0.conv2` are of the block `layer1.0`, a transformer's projections of `h.3.attn`, and
    the lone convolution in `features.3.conv.0` of `features.3.conv`. The network itself is no block: layers that share
    nothing smaller map to an empty name and stay alone.
    """
    around = {layer: list(accumulate(layer.split(".")[:-1], lambda outer, name: f"{outer}.{name}")) for layer in layers}
    held = Counter(module for modules in around.values() for module in modules)
    return {
        layer: next((module for module in reversed(modules) if held[module] > 1), "")
        for layer, modules in around.items()
    }


def _alone(space: SearchSpace, index: int) -> Parameter:
    decision = space.decisions[index]
    return Parameter(f"{decision.side} {decision.name}", (index,), len(decision.formats))


def _together(space: SearchSpace, group: Sequence[int], blocks: Mapping[str, str], named: Counter[str]) -> Parameter:
    decision = space.decisions[group[0]]
    name = _block_name(decision, blocks)
    if named[name] > 1:  # several lists of formats in one block
        name = f"{name} ({', '.join(map(str, decision.formats))})"
    return Parameter(name, tuple(group), len(decision.formats))


def _block_name(decision: Decision, blocks: Mapping[str, str]) -> str:
    return f"{decision.side} {blocks[decision.layers[0]]}.*"
