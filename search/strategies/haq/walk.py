"""The walk of an episode: in which order decisions are taken, and what the agent sees when it takes one.

Layer after layer, first the weight's format, then the input's. The agent sees ten numbers, as HAQ has them (Wang et
al., 2019, arXiv 1811.08886, section 3.1): whether the layer is a depthwise convolution, input channels, output
channels, stride, kernel size, number of weights, size of the feature map it reads, its place among the layers, the
action before, and whether a weight's format or an input's is to be decided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hwmodels import Layer, Network
from search.space import SearchSpace

NUMBERS = 10  # of a state
BEFORE_THE_FIRST = 1.0  # the action before the first one, as if it had been the largest format


@dataclass(frozen=True)
class Walk:
    """The open decisions of a space in the order of an episode.

    Attributes:
        decisions: The decision that each step takes.
        sizes: Between how many formats each step decides.
        layers: What each step's layer is like, every column scaled to [0, 1] over the network, shape `(steps, 8)`.
        weights: Whether each step is about a weight.
        length: Number of decisions of the space, the fixed ones included.
    """

    decisions: tuple[int, ...]
    sizes: tuple[int, ...]
    layers: np.ndarray
    weights: tuple[bool, ...]
    length: int

    @classmethod
    def through(cls, network: Network, space: SearchSpace) -> Walk:
        """Returns the walk through a network.

        Decisions with a single format are left out. An input that several layers read is decided at the first of them.
        A tie is one layer on the walk, and looks like the first of its layers.
        """
        described = scaled(np.array([describe(network[unit.name], i) for i, unit in enumerate(space.units)]))
        seen: dict[int, int] = {}  # decision to unit
        for number, unit in enumerate(space.units):
            for decision in (unit.weight, unit.input):
                if space.decisions[decision].is_free:
                    seen.setdefault(decision, number)
        return cls(
            decisions=tuple(seen),
            sizes=tuple(len(space.decisions[decision].formats) for decision in seen),
            layers=described[list(seen.values())],
            weights=tuple(space.decisions[decision].side == "weight" for decision in seen),
            length=len(space.decisions),
        )

    def __len__(self) -> int:
        return len(self.decisions)

    def state(self, step: int, levels: Sequence[int]) -> np.ndarray:
        """The ten numbers seen at a step, each in [0, 1].

        The action before is the share of its formats that are no larger, which is bits over the most bits where they
        are 1, 2, 3 and so on.

        Args:
            step: Which step.
            levels: The formats taken before, as indices.
        """
        before = (levels[step - 1] + 1) / self.sizes[step - 1] if step else BEFORE_THE_FIRST
        return np.array([*self.layers[step], before, self.weights[step]], dtype=np.float32)

    def level(self, step: int, action: float) -> int:
        """The index of the format that an action in [-1, 1] stands for; each has a stretch of the same length."""
        size = self.sizes[step]
        return min(max(math.floor((action + 1) / 2 * size), 0), size - 1)

    def actions(self, point: Sequence[int]) -> np.ndarray:
        """The actions, each in the middle of its stretch, that lead to a point; shape `(steps,)`."""
        levels, sizes = np.array(point)[list(self.decisions)], np.array(self.sizes)
        return np.asarray((2 * levels + 1) / sizes - 1)

    def point(self, levels: Sequence[int]) -> tuple[int, ...]:
        """The point of the space that the formats taken at all steps make."""
        point = [0] * self.length
        for decision, level in zip(self.decisions, levels, strict=True):
            point[decision] = level
        return tuple(point)


def describe(layer: Layer, number: int) -> tuple[float, ...]:
    """What a layer is like: the first eight numbers of a state, not scaled.

    Stride and kernel are those along the first axis; layers without have stride 0 and kernel 1, as HAQ's linear layers.
    The feature map counts the positions that a convolution reads; of other layers, it is the length of the input's
    second axis: the features of a vector, the tokens of a sequence.

    Args:
        layer: The layer.
        number: Its place among the layers.
    """
    shape, is_conv = layer.weight_shape, layer.kind.startswith("conv")
    if layer.kind.startswith("conv_transpose"):  # stored as (in, out / groups, ...)
        channels = shape[0], shape[1] * layer.groups
    elif is_conv:  # stored as (out, in / groups, ...)
        channels = shape[1] * layer.groups, shape[0]
    elif layer.kind == "embedding":  # reads one of its rows
        channels = shape[0], shape[1]
    else:
        channels = layer.weight_count // layer.channels, layer.channels
    is_depthwise = is_conv and layer.groups > 1 and layer.groups == channels[0]
    positions = math.prod(layer.input_shape[2:] if is_conv else layer.input_shape[1:2])
    stride, kernel = (*layer.stride, 0)[0], (*layer.kernel, 1)[0]
    return float(is_depthwise), *channels, stride, kernel, layer.weight_count, positions, number


def scaled(columns: np.ndarray) -> np.ndarray:
    """Moves the least of every column to 0 and the largest to 1; a column of equal numbers becomes 0."""
    low, high = columns.min(0), columns.max(0)
    return np.asarray((columns - low) / np.where(high > low, high - low, 1), dtype=np.float32)
