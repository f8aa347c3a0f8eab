"""Descent: betters the reading of a selection by moves and pairs of moves within limits, until none is better."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from search.solve.moves import Moves
from search.solve.predictor import Predictor
from search.solve.problem import Choices, Problem
from search.solve.totals import Totals

MOST_PAIRS = 2048  # pairs of moves that are read per step; small problems have fewer
MOST_PARTNERS = 640  # moves that pairs are formed of
REMEMBERED = 4  # best selections of what is read at once
NOISE = 1e-6  # share of a loss that rounding to float32 may account for
AT_ONCE = 16  # a repair moves one unit in so many before it looks again


class Ground:
    """What a search moves on: selections, their limits and their losses."""

    def __init__(
        self, problem: Problem, limits: Mapping[str, float], predictor: Predictor, deadline: float = np.inf
    ) -> None:
        """Prepares a search.

        Args:
            problem: What may be selected.
            limits: Cost name to the most its total may be.
            predictor: Reads selections.
            deadline: Value of `time.monotonic` at which searching stops.

        Raises:
            ValueError: If the predictor has other choices than the problem, or a limit names no cost.
        """
        if predictor.choices != sum(problem.sizes):
            raise ValueError(
                f"the problem has {sum(problem.sizes)} choices, but there are changes of {predictor.choices}"
            )
        self.problem = problem
        self.predictor = predictor
        self.moves = Moves(problem)
        self.totals = Totals(problem, limits)
        self.deadline = deadline
        self.starts = np.concatenate([[0], np.cumsum(problem.sizes)[:-1]])
        self._scores = np.concatenate(problem.scores)

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self.deadline

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Adds up the scores of selections `(selections, units)`, interactions left out."""
        summed: np.ndarray = self._scores[rows + self.starts].sum(-1)
        return summed


@dataclass
class Descent:
    """A selection on its way to a local optimum.

    Attributes:
        ground: What it moves on.
        at: Where it is.
        loss: The loss there; infinite as long as it is not within the limits.
        seen: Selections within the limits that it came across, and their losses: the best of every step.
        read: How many selections it read, each from all of its outputs.
    """

    ground: Ground
    at: Choices
    loss: float = np.inf
    seen: dict[Choices, float] = field(default_factory=dict)
    read: int = 0

    @property
    def optimum(self) -> Choices | None:
        """Where it ended; None where it found no way into the limits."""
        return self.at if self.loss < np.inf else None

    def finished(self) -> Descent:
        """Repairs, then runs, and returns itself."""
        if self.repair():
            self.run()
        return self

    def repair(self) -> bool:
        """Moves units that exceed limits, the least harm for what they free first; False where that leads nowhere."""
        totals = self.ground.totals
        while True:
            here = np.array(self.at)
            excess = float(totals.excess(totals.of(here[None]))[0])
            if excess == 0:
                return True
            rows = self.ground.moves.all(self.at)
            freed = excess - totals.excess(totals.of(rows))
            rows, freed = rows[freed > 0], freed[freed > 0]
            if self.ground.is_late:
                return False
            if not len(rows):
                if not self._repair_by_pair(excess):
                    return False
                continue
            harm = self._near(rows) - self._loss_here()
            rows = rows[np.where(harm > 0, harm / freed, harm * freed).argsort(kind="stable")]
            several = self._made_together(rows)
            is_less = totals.excess(totals.of(np.array(several)[None]))[0] < excess
            self.at = several if is_less else tuple(rows[0].tolist())

    def _made_together(self, rows: np.ndarray) -> Choices:
        """Makes the first moves of a list that concern different groups, until limits hold or they are many."""
        totals, here, made, groups = self.ground.totals, np.array(self.at), np.array(self.at), set()
        for row in rows:
            changed = row != here
            group = int(self.ground.moves.group[changed.argmax()])
            if group in groups:
                continue
            groups.add(group)
            made[changed] = row[changed]
            if len(groups) > len(here) // AT_ONCE or not totals.excess(totals.of(made[None]))[0]:
                break
        return tuple(made.tolist())

    def _repair_by_pair(self, excess: float) -> bool:
        """Makes the two moves that together leave the least excess; False where none leave less."""
        totals, rows = self.ground.totals, self.ground.moves.all(self.at)
        rows = rows[totals.excess(totals.of(rows)).argsort(kind="stable")[:MOST_PARTNERS]]
        first, second = self._apart(rows)
        if not len(first):
            return False
        here = np.array(self.at)
        sums = totals.of(rows)
        left = totals.excess(sums[first] + sums[second] - totals.of(here[None]))
        best = int(left.argmin())
        both = np.where(rows[first[best]] != here, rows[first[best]], rows[second[best]])
        if totals.excess(totals.of(both[None]))[0] >= excess:
            return False
        self.at = tuple(both.tolist())
        return True

    def run(self) -> None:
        """Takes steps until none is better, or time is up."""
        self.loss = self.seen[self.at] = self._loss_here()
        while not self.ground.is_late and self._step():
            pass

    def _step(self) -> bool:
        """Makes the best move, or else the best of the promising pairs of moves; False where none is better."""
        totals, rows = self.ground.totals, self.ground.moves.all(self.at)
        losses, sums = self._near(rows), totals.of(rows)
        fits = totals.fit(sums)
        if self._go(rows[fits], losses[fits]):
            return True
        partners = _partners(losses, fits)
        rows = rows[partners]
        first, second = self._pairs(rows, sums[partners], losses[partners])
        if not len(first):
            return False
        here, starts = np.array(self.at), self.ground.starts
        paired = self.ground.predictor.losses_of_pairs(here + starts, rows + starts, first, second)
        self.read += len(paired)
        return self._go(np.where(rows[first] != here, rows[first], rows[second]), paired)

    def _pairs(self, rows: np.ndarray, sums: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of moves within the limits that are best if their effects on the loss add up."""
        totals, here = self.ground.totals, np.array(self.at)
        first, second = self._apart(rows)
        if totals.additive:
            fits = totals.fit(sums[first] + sums[second] - totals.of(here[None]))
            first, second = first[fits], second[fits]
        if len(first) > MOST_PAIRS:
            kept = np.argpartition(losses[first] + losses[second], MOST_PAIRS)[:MOST_PAIRS]
            first, second = first[kept], second[kept]
        if not totals.additive:
            fits = totals.fit(totals.of(np.where(rows[first] != here, rows[first], rows[second])))
            first, second = first[fits], second[fits]
        return first, second

    def _apart(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All pairs of moves that can be made together."""
        changed = rows != np.array(self.at)
        unit, alone = changed.argmax(1), changed.sum(1) == 1
        group = self.ground.moves.group[unit]
        first, second = np.triu_indices(len(rows), 1)
        apart = (group[first] != group[second]) | (alone[first] & alone[second] & (unit[first] != unit[second]))
        return first[apart], second[apart]

    def _go(self, rows: np.ndarray, losses: np.ndarray) -> bool:
        """Remembers the best of some selections and goes to the first that is better; False where none is."""
        if not len(rows):
            return False
        scores, score = self.ground.scores(rows), float(self.ground.scores(np.array(self.at)))
        order = np.lexsort((scores, losses)).tolist()
        for number in order[:REMEMBERED]:
            self.seen[tuple(rows[number].tolist())] = float(losses[number])
        for number in order:
            is_equal = losses[number] == self.loss and scores[number] < score - NOISE * abs(score)
            if not (losses[number] < self.loss - NOISE * abs(self.loss) or is_equal):
                return False
            found = tuple(rows[number].tolist())
            if self.ground.totals.meets(found):
                self.at, self.loss = found, float(losses[number])
                return True
        return False

    def _near(self, rows: np.ndarray) -> np.ndarray:
        self.read += len(rows)
        starts = self.ground.starts
        return self.ground.predictor.losses_near(np.array(self.at) + starts, rows + starts)

    def _loss_here(self) -> float:
        self.read += 1
        return float(self.ground.predictor.losses((np.array(self.at) + self.ground.starts)[None])[0])


def _partners(losses: np.ndarray, fits: np.ndarray) -> np.ndarray:
    """The moves that pairs are formed of: the best of those within the limits and of those that are not."""
    if len(losses) <= MOST_PARTNERS:
        return np.arange(len(losses))
    halves = [at[losses[at].argsort(kind="stable")][: MOST_PARTNERS // 2] for at in map(np.flatnonzero, (fits, ~fits))]
    return np.concatenate(halves)
