"""Moves: what changes when one unit takes another choice, and the units linked to it follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from search.solve.problem import Choices, Problem


class Moves:
    """The moves of a problem; from a selection that honours the links they lead to others that do.

    A unit that must follow keeps what it can: the labels of its other links, and its rank among the choices of equal
    labels. Where units are linked by their input format, that rank is the weight format.

    Attributes:
        group: Units of one group are connected by links, those of different groups are not; shape `(units,)`.
    """

    def __init__(self, problem: Problem) -> None:
        """Looks up which units follow which."""
        count = len(problem.sizes)
        self._sizes = problem.sizes
        self._links = problem.links
        self._links_of: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(count)]  # (link, label of every choice)
        bound = sparse.lil_array((count, count), dtype=bool)
        for number, link in enumerate(problem.links):
            for unit, labels in zip(link.units, link.labels, strict=True):
                self._links_of[unit].append((number, labels))
                bound[link.units[0], unit] = True
        self.group: np.ndarray = connected_components(bound, directed=False)[1]
        self._is_linked = np.array([bool(links) for links in self._links_of])
        self._alternatives = np.array([(u, c) for u, size in enumerate(problem.sizes) for c in range(size)]).T
        self._followed: dict[tuple[int, int, tuple[tuple[int, int], ...]], int | None] = {}

    def made(self, choices: Sequence[int], unit: int, choice: int) -> Choices | None:
        """Gives a unit another choice and lets others follow; None where some unit cannot."""
        result = list(choices)
        result[unit] = choice
        labels: dict[int, int] = {}
        settled, waiting = {unit}, [unit]
        while waiting:
            moved = waiting.pop()
            for number, of_choice in self._links_of[moved]:
                label = int(of_choice[result[moved]])
                if labels.setdefault(number, label) != label:
                    return None
                for other in self._links[number].units:
                    if other in settled:
                        continue
                    settled.add(other)
                    needed = tuple((n, labels[n]) for n, _ in self._links_of[other] if n in labels)
                    follows = self._follow(other, result[other], needed)
                    if follows is None:
                        return None
                    if follows != result[other]:
                        result[other] = follows
                        waiting.append(other)
        return tuple(result)

    def all(self, choices: Sequence[int]) -> np.ndarray:
        """Lists the selections one move away, shape `(moves, units)`."""
        unit, choice = self._alternatives[:, self._alternatives[1] != np.asarray(choices)[self._alternatives[0]]]
        rows = np.repeat(np.asarray(choices, dtype=np.intp)[None], len(unit), axis=0)
        rows[np.arange(len(unit)), unit] = choice
        if not self._links:
            return rows
        possible = np.ones(len(unit), dtype=bool)
        for number in np.flatnonzero(self._is_linked[unit]).tolist():
            made = self.made(choices, int(unit[number]), int(choice[number]))
            if made is None:
                possible[number] = False
            else:
                rows[number] = made
        return rows[possible]

    def shuffled(self, choices: Sequence[int], share: float, rng: np.random.Generator) -> Choices:
        """Gives a share of the units, at least one, random choices."""
        found = tuple(choices)
        free = np.flatnonzero(np.array(self._sizes) > 1)
        moved = rng.permutation(free)[: max(1, round(share * len(free)))]
        for unit in moved.tolist():
            found = self.made(found, unit, int(rng.integers(self._sizes[unit]))) or found
        return found

    def crossed(self, first: Sequence[int], second: Sequence[int], rng: np.random.Generator) -> Choices:
        """Takes every group from one of two selections, drawn by lot."""
        from_first = rng.random(self.group.max() + 1)[self.group] < 0.5
        return tuple(np.where(from_first, first, second).tolist())

    def _follow(self, unit: int, choice: int, needed: tuple[tuple[int, int], ...]) -> int | None:
        """The choice of a unit with the needed (link, label) pairs that is nearest to its present one."""
        key = (unit, choice, needed)
        if key not in self._followed:
            labels = np.stack([of_choice for _, of_choice in self._links_of[unit]], axis=1)  # (choices, links)
            wanted = dict(needed)
            present = labels[choice]
            fits = np.ones(len(labels), dtype=bool)
            for column, (number, _) in enumerate(self._links_of[unit]):
                fits &= labels[:, column] == wanted.get(number, labels[:, column])
            if fits[choice]:
                self._followed[key] = choice
            elif not fits.any():
                self._followed[key] = None
            else:
                kept = (labels == present).sum(1)
                target = labels[np.flatnonzero(fits)[kept[fits].argmax()]]
                rank = int(np.flatnonzero((labels == present).all(1)).searchsorted(choice))
                alike = np.flatnonzero((labels == target).all(1))
                self._followed[key] = int(alike[min(rank, len(alike) - 1)])
        return self._followed[key]
