"""A selection problem: pick one choice for every unit, at the least total score, within limits on total costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Column = tuple[np.ndarray, ...]
"""One number for every choice of every unit: per unit an array of shape `(choices of the unit,)`."""


Choices = tuple[int, ...]
"""A selection: the index of the choice each unit takes."""


@dataclass(frozen=True)
class Link:
    """Units that must pick choices of the same label.

    Layers that read one tensor share its input format while their weight formats stay their own: the label of a choice
    is then the index of its input format.

    Attributes:
        units: Indices of the units, at least two.
        labels: For each of `units`, one integer per choice.
    """

    units: tuple[int, ...]
    labels: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", tuple(int(unit) for unit in self.units))
        object.__setattr__(self, "labels", tuple(np.asarray(labels) for labels in self.labels))
        if len(self.units) < 2 or len(set(self.units)) < len(self.units):
            raise ValueError(f"a link needs at least two different units, got {self.units}")
        if len(self.labels) != len(self.units):
            raise ValueError(f"a link of {len(self.units)} units needs labels for each, got {len(self.labels)}")
        if any(labels.ndim != 1 or labels.dtype.kind not in "iu" for labels in self.labels):
            raise ValueError(f"the labels of the link of units {self.units} must be 1-D integer arrays")
        if not self.common:
            raise ValueError(f"no label is open to all of the linked units {self.units}, so that nothing can be picked")

    @property
    def common(self) -> tuple[int, ...]:
        """Labels that every unit has a choice with, ascending."""
        return tuple(sorted(set.intersection(*(set(labels.tolist()) for labels in self.labels))))


@dataclass(frozen=True)
class Solution:
    """One choice per unit.

    Attributes:
        choices: Index of the choice each unit takes.
        score: Total score.
        costs: Total of each cost.
        optimal: Whether no other feasible selection is better, to the accuracy of floating-point sums.
    """

    choices: Choices
    score: float
    costs: dict[str, float]
    optimal: bool


@dataclass(frozen=True)
class Problem:
    """Scores and costs of every choice of every unit; both add up over the units.

    Attributes:
        scores: Per unit an array of shape `(choices of the unit,)`; lower is better, any sign.
        costs: Cost name to arrays of the same shapes.
        links: Units that must agree.

    Raises:
        ValueError: If shapes disagree, a number is not finite, or a link does not fit the units.
    """

    scores: Column
    costs: Mapping[str, Column] = field(default_factory=dict)
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", _column("scores", self.scores))
        object.__setattr__(
            self, "costs", {name: _column(f"cost {name}", arrays) for name, arrays in self.costs.items()}
        )
        object.__setattr__(self, "links", tuple(self.links))
        sizes = self.sizes
        if not sizes or min(sizes) == 0:
            raise ValueError(f"every unit needs at least one choice, got {sizes}")
        for name, arrays in self.costs.items():
            given = tuple(map(len, arrays))
            if given != sizes:
                raise ValueError(f"cost {name} has {given} numbers per unit, but scores has {sizes}")
        for link in self.links:
            for unit, count in zip(link.units, map(len, link.labels), strict=True):
                if not 0 <= unit < len(sizes):
                    raise ValueError(f"a link names unit {unit}, but there are {len(sizes)} units")
                if count != sizes[unit]:
                    raise ValueError(f"a link has {count} labels for unit {unit}, which has {sizes[unit]} choices")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of choices of every unit."""
        return tuple(map(len, self.scores))

    def column(self, name: str) -> Column:
        """The numbers of one cost.

        Raises:
            ValueError: If there is no such cost.
        """
        if name not in self.costs:
            raise ValueError(f"no cost {name!r}; the problem has {', '.join(self.costs) or 'none'}")
        return self.costs[name]

    def agrees(self, choices: Sequence[int]) -> bool:
        """Whether a selection honours every link."""
        return all(
            len({int(labels[choices[unit]]) for unit, labels in zip(link.units, link.labels, strict=True)}) == 1
            for link in self.links
        )

    def solution(self, choices: Iterable[int], optimal: bool) -> Solution:
        """Adds up what a selection scores and costs."""
        chosen = tuple(int(choice) for choice in choices)
        costs = {name: total(arrays, chosen) for name, arrays in self.costs.items()}
        return Solution(chosen, total(self.scores, chosen), costs, optimal)


def total(column: Column, choices: Sequence[int]) -> float:
    """The sum of a selection's numbers, correctly rounded, so that it depends on no order of summation."""
    return math.fsum(float(numbers[choice]) for numbers, choice in zip(column, choices, strict=True))


def _column(name: str, arrays: Iterable[np.ndarray]) -> Column:
    """Copies the numbers to read-only float arrays, refusing what is not 1-D or not finite."""
    column = []
    for unit, numbers in enumerate(arrays):
        array = np.array(numbers, dtype=np.float64)
        if array.ndim != 1:
            raise ValueError(f"{name} of unit {unit} must be 1-D, got shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} of unit {unit} is not finite: {array}; leave out choices that cannot be taken")
        array.flags.writeable = False
        column.append(array)
    return tuple(column)
