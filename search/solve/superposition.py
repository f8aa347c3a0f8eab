"""Search on predicted outputs: the selections whose summed-up output changes read best, within limits.

A small population of local optima is crossed, shuffled and searched again. The reading may be any function of the
outputs, so there is no bound: what comes back is good, not proved.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from search.solve.descent import Descent, Ground
from search.solve.linear import solve
from search.solve.predictor import Predictor
from search.solve.problem import Choices, Problem, Solution
from search.solve.readings import reading

CHILDREN = 8  # bred at a time
SHUFFLED = 0.1  # share of the units that a child draws anew


def search_superposition(
    problem: Problem,
    base: np.ndarray,
    changes: np.ndarray,
    targets: np.ndarray,
    name: str,
    limits: Mapping[str, float],
    *,
    starts: Sequence[Choices] = (),
    keep: int = 20,
    restarts: int = 7,
    generations: int = 6,
    rng: np.random.Generator,
    seconds: float | None = None,
    threads: int = 1,
) -> list[Solution]:
    """Searches for selections within limits whose predicted outputs read best.

    The outputs of a selection are predicted as the base's plus the changes of its choices.

    Args:
        problem: What may be selected and what it costs. Scores break ties of the reading.
        base: Outputs without any change, shape `(rows, outputs)`.
        changes: By how much each choice of each unit changes them, unit by unit, shape `(choices, rows, outputs)`.
        targets: What the reading compares with: see `search.solve.readings.reading`.
        name: The reading.
        limits: Cost name to the most its total may be.
        starts: Selections to start from; repaired where over a limit. By default the one of least score within limits.
        keep: How many selections to return at most.
        restarts: Random selections to start from besides.
        generations: How often children are bred of the local optima found.
        rng: Source of everything random. Without `seconds`, the same seed gives the same answer.
        seconds: Time after which searching stops.
        threads: Descents that run at a time; the answer does not depend on it.

    Returns:
        Distinct selections within all limits that honour the links, best reading first. Empty where none was
        found; only without `starts` that means that there is none.

    Raises:
        ValueError: If the arrays do not fit the problem or each other, or a limit names no cost.
    """
    for start in starts:
        if len(start) != len(problem.sizes) or not problem.agrees(start):
            raise ValueError(f"a start must choose for all {len(problem.sizes)} units and honour links, got {start}")
    deadline = np.inf if seconds is None else time.monotonic() + seconds
    ground = Ground(problem, limits, Predictor(reading(name, targets), base, changes), deadline)
    if not starts:
        least = solve(problem, limits)
        if least is None:
            return []
        starts = [least.choices]
    evolution = Evolution(ground, keep, threads)
    evolution.search(starts, restarts, generations, rng)
    return evolution.best()


class Evolution:
    """A population of local optima, and the best selections that were read on the way.

    Attributes:
        seen: Selections and their losses, the best ones.
        read: How many selections were read so far, each from all of its outputs.
    """

    def __init__(self, ground: Ground, keep: int, threads: int = 1) -> None:
        """Starts with nothing seen.

        Args:
            ground: What is searched.
            keep: How many of the best selections are wanted.
            threads: Descents that run at a time.
        """
        self.seen: dict[Choices, float] = {}
        self.read = 0
        self._ground = ground
        self._keep = keep
        self._threads = threads
        self._population: dict[Choices, float] = {}

    def search(self, starts: Sequence[Choices], restarts: int, generations: int, rng: np.random.Generator) -> None:
        """Descends from starts, from random selections, and then from children of the optima found.

        Only as many optima as there were descents at first survive, the best ones.
        """
        moves = self._ground.moves
        self._descend([*starts, *(moves.shuffled(starts[0], 1.0, rng) for _ in range(restarts))])
        size = len(starts) + restarts
        for _ in range(generations):
            if self._ground.is_late or not self._population:
                return
            ranked = sorted(self._population, key=lambda choices: (self._population[choices], choices))[:size]
            self._population = {choices: self._population[choices] for choices in ranked}
            self._descend([self._child(ranked, rng) for _ in range(CHILDREN)])

    def best(self) -> list[Solution]:
        """The best selections, read once more from the base; links and limits are checked without rounding."""
        problem, ground = self._ground.problem, self._ground
        met = [c for c in self.seen if problem.agrees(c) and ground.totals.meets(c)]
        if not met:
            return []
        losses = ground.predictor.losses(np.array(met) + ground.starts)
        solutions = [problem.solution(choices, optimal=False) for choices in met]
        order = sorted(range(len(met)), key=lambda at: (losses[at], solutions[at].score, met[at]))
        return [solutions[at] for at in order[: self._keep]]

    def _child(self, ranked: Sequence[Choices], rng: np.random.Generator) -> Choices:
        """Takes groups of linked units from two parents, the better ones more likely, and draws some units anew."""
        first, second = (ranked[int(rng.integers(len(ranked), size=2).min())] for _ in range(2))
        moves = self._ground.moves
        return moves.shuffled(moves.crossed(first, second, rng), SHUFFLED, rng)

    def _descend(self, starts: Iterable[Choices]) -> None:
        with ThreadPoolExecutor(self._threads) as pool:
            run = pool.map if self._threads > 1 else map
            for descent in run(lambda start: Descent(self._ground, start).finished(), starts):
                self.read += descent.read
                self.seen |= descent.seen
                if descent.optimum is not None:
                    self._population[descent.optimum] = descent.loss
        best = sorted(self.seen, key=lambda choices: (self.seen[choices], choices))[: 2 * self._keep]
        self.seen = {choices: self.seen[choices] for choices in best}
