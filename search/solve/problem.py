"""A selection problem: pick one choice for every unit, at the least total score, within limits on total costs.

Scores and costs add up over units. On top of that, pairs of choices may interact in the score, two units may cost
something where their choices meet, and a cost may be the largest of several sums, as peak memory is.
"""

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
class Boundary:
    """What it costs that the choices of two units meet, such as a tensor produced in one format and read in another.

    Attributes:
        units: Indices of the two units.
        labels: For each of them, one integer from 0 per choice: the format on its side of the boundary.
        costs: Cost name to an array of shape `(labels of the first, labels of the second)`.
    """

    units: tuple[int, int]
    labels: tuple[np.ndarray, np.ndarray]
    costs: Mapping[str, np.ndarray]

    def cost(self, name: str, choices: Sequence[int]) -> float:
        """What a selection pays here."""
        if name not in self.costs:
            return 0.0
        first, second = (int(labels[choices[unit]]) for unit, labels in zip(self.units, self.labels, strict=True))
        return float(self.costs[name][first, second])


@dataclass(frozen=True)
class Solution:
    """One choice per unit.

    Attributes:
        choices: Index of the choice each unit takes.
        score: Total score, interactions included.
        costs: Total of each cost.
        bound: A lower bound on the score, or on the cost that was minimised, of every feasible selection; minus
            infinity where none is known.
        optimal: Whether no other feasible selection is better, to the accuracy of floating-point sums.
    """

    choices: Choices
    score: float
    costs: dict[str, float]
    optimal: bool
    bound: float = -math.inf


@dataclass(frozen=True)
class Problem:
    """Scores and costs of every choice of every unit.

    Attributes:
        scores: Per unit an array of shape `(choices of the unit,)`; lower is better, any sign.
        costs: Cost name to arrays of the same shapes, which add up.
        links: Units that must agree.
        interactions: Symmetric matrix over all choices, unit by unit, of shape `(choices, choices)`: half the sum of
            its entries over all ordered pairs of chosen choices, a choice with itself included, is added to the score.
            None where scores only add up.
        boundaries: What costs besides, where choices of two units meet.
        peaks: Cost name to several columns; the cost is the largest of their totals.

    Raises:
        ValueError: If shapes disagree, a number is not finite, or a link does not fit the units.
    """

    scores: Column
    costs: Mapping[str, Column] = field(default_factory=dict)
    links: tuple[Link, ...] = ()
    interactions: np.ndarray | None = None
    boundaries: tuple[Boundary, ...] = ()
    peaks: Mapping[str, tuple[Column, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", _column("scores", self.scores))
        object.__setattr__(
            self, "costs", {name: _column(f"cost {name}", arrays) for name, arrays in self.costs.items()}
        )
        object.__setattr__(self, "links", tuple(self.links))
        object.__setattr__(self, "boundaries", tuple(self.boundaries))
        peaks = {name: tuple(_column(f"peak {name}", cut) for cut in cuts) for name, cuts in self.peaks.items()}
        object.__setattr__(self, "peaks", peaks)
        if self.interactions is not None:
            object.__setattr__(self, "interactions", self._checked(self.interactions))
        sizes = self.sizes
        if not sizes or min(sizes) == 0:
            raise ValueError(f"every unit needs at least one choice, got {sizes}")
        columns = [(f"cost {name}", column) for name, column in self.costs.items()]
        columns += [(f"peak {name}", cut) for name, cuts in self.peaks.items() for cut in cuts]
        for name, arrays in columns:
            given = tuple(map(len, arrays))
            if given != sizes:
                raise ValueError(f"{name} has {given} numbers per unit, but scores has {sizes}")
        for kind, pair in [("link", link) for link in self.links] + [("boundary", edge) for edge in self.boundaries]:
            for unit, count in zip(pair.units, map(len, pair.labels), strict=True):
                if not 0 <= unit < len(sizes):
                    raise ValueError(f"a {kind} names unit {unit}, but there are {len(sizes)} units")
                if count != sizes[unit]:
                    raise ValueError(f"a {kind} has {count} labels for unit {unit}, which has {sizes[unit]} choices")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of choices of every unit."""
        return tuple(map(len, self.scores))

    @property
    def cost_names(self) -> tuple[str, ...]:
        """Names of all costs, peaks included."""
        return (*self.costs, *self.peaks)

    def column(self, name: str) -> Column:
        """The numbers of one cost that adds up.

        Raises:
            ValueError: If there is no such cost.
        """
        if name not in self.costs:
            raise ValueError(f"no cost {name!r}; the problem has {', '.join(self.costs) or 'none'}")
        return self.costs[name]

    def cost(self, name: str, choices: Sequence[int]) -> float:
        """What a selection costs, boundaries included; of a peak, the largest of its totals.

        Raises:
            ValueError: If there is no such cost.
        """
        if name in self.peaks:
            return max(total(cut, choices) for cut in self.peaks[name])
        alone = (float(numbers[choice]) for numbers, choice in zip(self.column(name), choices, strict=True))
        return math.fsum((*alone, *(boundary.cost(name, choices) for boundary in self.boundaries)))

    def score(self, choices: Sequence[int]) -> float:
        """What a selection scores, interactions included."""
        score = total(self.scores, choices)
        if self.interactions is None:
            return score
        at = self.positions(choices)
        return score + math.fsum(self.interactions[np.ix_(at, at)].ravel().tolist()) / 2

    def positions(self, choices: Sequence[int]) -> np.ndarray:
        """Positions of a selection's choices among all choices, unit by unit, shape `(units,)`."""
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        at: np.ndarray = starts + np.asarray(choices)
        return at

    def agrees(self, choices: Sequence[int]) -> bool:
        """Whether a selection honours every link."""
        return all(
            len({int(labels[choices[unit]]) for unit, labels in zip(link.units, link.labels, strict=True)}) == 1
            for link in self.links
        )

    def solution(self, choices: Iterable[int], optimal: bool, bound: float = -math.inf) -> Solution:
        """Adds up what a selection scores and costs."""
        chosen = tuple(int(choice) for choice in choices)
        costs = {name: self.cost(name, chosen) for name in self.cost_names}
        return Solution(chosen, self.score(chosen), costs, optimal, bound)

    def _checked(self, interactions: np.ndarray) -> np.ndarray:
        """The interactions as a read-only float array."""
        matrix, count = np.array(interactions, dtype=np.float64), sum(self.sizes)
        if matrix.shape != (count, count):
            raise ValueError(f"interactions have shape {matrix.shape}, but there are {count} choices")
        if not np.isfinite(matrix).all() or np.abs(matrix - matrix.T).max() > 1e-9 * np.abs(matrix).max():
            raise ValueError("interactions must be finite and symmetric")
        matrix.flags.writeable = False
        return matrix


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
