"""Swap search: betters a selection by moving one or two units at a time, within limits, until no such move is left.

What a move changes follows from the slopes of the forms at the selection, and what two moves change from the pairs
between them besides, so that all pairs of moves are weighed as matrices. A unit in a link keeps to the choices of its
label, or moves together with all units of the link to another label.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np

from search.solve.forms import Form, cost_forms, layout_of, score_form
from search.solve.problem import Choices, Problem, Solution

CELLS = 2**18  # pairs of moves weighed at once: few enough to stay in the cache
NOISE = 1e-13  # share of a form's range below which a change is rounding


class Swaps:
    """A selection on its way to a local optimum.

    A batch of moves is an integer array of shape `(moves, units that move)`: the positions that they move to.

    Attributes:
        at: The chosen positions, shape `(units,)`.
    """

    def __init__(
        self,
        problem: Problem,
        limits: Mapping[str, float],
        minimise: str | None = None,
        max_score: float | None = None,
        deadline: float = math.inf,
    ) -> None:
        """Writes a problem as forms, the objective first.

        Args:
            problem: What may be selected.
            limits: Cost name to the most its total may be.
            minimise: Cost to minimise in place of the score.
            max_score: The most that the score may be where a cost is minimised.
            deadline: Value of `time.monotonic` at which searching stops.
        """
        self.problem, self.minimise, self.max_score, self.deadline = problem, minimise, max_score, deadline
        self.layout = layout_of(problem)
        self.at = self.layout.starts.copy()
        score = score_form(problem)
        self._names = [(name, form) for name in limits for form in cost_forms(problem, name)]
        self.forms: list[Form] = [score if minimise is None else cost_forms(problem, minimise)[0]]
        self.forms += [form for _, form in self._names]
        if max_score is not None:
            self.forms.append(score)
        self.scales = np.array([_range(form, self.layout.starts) for form in self.forms])
        self.noise = NOISE * self.scales[0]
        self._links = [self._spread(link.units, link.labels) for link in problem.links]
        self.limit(limits)

    def limit(self, limits: Mapping[str, float]) -> None:
        """Changes what the limits are, not which costs have one."""
        self.limits = dict(limits)
        most = [limits[name] for name, _ in self._names]
        self.most = np.array(most if self.max_score is None else [*most, self.max_score])
        self._refresh()

    def start(self, choices: Sequence[int]) -> None:
        """Goes to a selection that honours the links, within the limits or not."""
        self.at = self.layout.starts + np.asarray(choices)
        self._refresh()

    @property
    def choices(self) -> Choices:
        """The selection."""
        return tuple((self.at - self.layout.starts).tolist())

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self.deadline

    def solution(self) -> Solution:
        """What the selection scores and costs."""
        return self.problem.solution(self.choices, optimal=False)

    def seconds_left(self) -> float | None:
        """Seconds up to the deadline, a little at least; None where there is none."""
        return None if self.deadline == math.inf else max(self.deadline - time.monotonic(), 0.1)

    def worth(self, solution: Solution) -> float:
        """What is minimised."""
        return solution.score if self.minimise is None else solution.costs[self.minimise]

    def is_within(self) -> bool:
        """Whether the selection keeps every limit, its costs added up without error."""
        choices = self.choices
        if self.max_score is not None and self.problem.score(choices) > self.max_score:
            return False
        return all(self.problem.cost(name, choices) <= most for name, most in self.limits.items())

    def meets(self, solution: Solution) -> bool:
        """Whether a solution keeps every limit."""
        if self.max_score is not None and solution.score > self.max_score:
            return False
        return all(solution.costs[name] <= most for name, most in self.limits.items())

    def descend(self) -> None:
        """Moves one or two units at a time until nothing gets better, or the deadline passes."""
        rows = max(1, CELLS // len(self.layout.unit_of))
        singles = np.arange(len(self.layout.unit_of))
        batches: list[np.ndarray | int] = [singles[first : first + rows] for first in range(0, len(singles), rows)]
        batches += range(len(self._links))
        idle = 0
        while idle < len(batches):
            self._refresh()
            for batch in batches:
                moves = self._together(batch) if isinstance(batch, int) else self._alone(batch)
                idle = 0 if self._better(moves) else idle + 1
                if idle == len(batches) or self.is_late:
                    return

    def repair(self) -> bool:
        """Moves one unit at a time, at the least loss per overshoot removed, until every limit is kept.

        Returns:
            Whether it came to that.
        """
        for _ in range(4 * len(self.at)):
            if self.is_within():
                return True
            over = self._overshoot(np.zeros((len(self.forms), 1)))[0]
            batches = [self._alone(np.arange(len(self.layout.unit_of))), *map(self._together, range(len(self._links)))]
            changes = [self._changes(moves) for moves in batches]
            removed = over - self._overshoot(np.concatenate(changes, axis=1))
            loss = np.concatenate(changes, axis=1)[0]
            useful = np.flatnonzero(removed > NOISE * over)
            if not len(useful):
                return False
            free = useful[loss[useful] <= 0]
            chosen = free[removed[free].argmax()] if len(free) else useful[(loss[useful] / removed[useful]).argmin()]
            self._go([move for moves in batches for move in moves][chosen])
        return False

    def kick(self, rng: np.random.Generator, units: int) -> None:
        """Moves some units at random, together with those that links tie to them."""
        for unit in rng.choice(len(self.at), min(units, len(self.at)), replace=False):
            own = self.layout.starts[unit] + np.arange(self.layout.sizes[unit])
            batches = [self._alone(own)]
            batches += [self._together(n) for n, link in enumerate(self.problem.links) if unit in link.units]
            batches = [moves for moves in batches if len(moves)]
            if batches:
                self._go(rng.choice(batches[rng.integers(len(batches))]))

    def neighbours(self, count: int) -> list[Choices]:
        """Finds the best selections that one or two moves lead to, within the limits: up to `count`, best first."""
        self._refresh()
        rows = max(1, CELLS // len(self.layout.unit_of))
        every = np.arange(len(self.layout.unit_of))
        batches = [self._alone(every[first : first + rows]) for first in range(0, len(every), rows)]
        batches += [self._together(link) for link in range(len(self._links))]
        found: list[tuple[float, Choices]] = []
        for moves in filter(len, batches):
            gains = self._gains(moves)
            gains[:, self.at[1:]] = np.inf  # the same as the column of the first unit: a partner that stays
            most = min(2 * count, gains.size)  # pairs of single moves come twice
            best = np.argpartition(gains, most - 1, axis=None)[:most] if most else np.zeros(0, dtype=np.int64)
            for row, partner in zip(*np.unravel_index(best, gains.shape), strict=True):
                if gains[row, partner] < np.inf:
                    at = self.at.copy()
                    at[self.layout.unit_of[partner]] = partner
                    at[self.layout.unit_of[moves[row]]] = moves[row]
                    found.append((float(gains[row, partner]), tuple((at - self.layout.starts).tolist())))
        ordered = dict.fromkeys(choices for _, choices in sorted(found))
        ordered.pop(self.choices, None)
        return list(ordered)[:count]

    def _refresh(self) -> None:
        """Computes slopes and slack anew, so that rounding does not add up.

        Slack is widened, so that rounding keeps no move out; `is_within` decides.
        """
        self.slopes = np.array([form.slopes(self.at) for form in self.forms])
        values = [form.value(self.at) for form in self.forms[1:]]
        self.slack = self.most - np.array(values) + NOISE * self.scales[1:]

    def _go(self, move: np.ndarray) -> None:
        """Makes a move."""
        changes = self._changes(move[np.newaxis])[1:, 0]
        units = self.layout.unit_of[move]
        for form, slopes in zip(self.forms, self.slopes, strict=True):
            if form.pairs is not None:
                slopes += (form.pairs[move] - form.pairs[self.at[units]]).sum(axis=0)
        self.slack = self.slack - changes
        self.at[units] = move

    def _better(self, moves: np.ndarray) -> bool:
        """Makes those of a batch of moves, each alone or with one of another unit, that better the objective.

        Returns:
            Whether there were any.
        """
        if not len(moves):
            return False
        gains = self._gains(moves)
        partners = gains.argmin(axis=1)
        gains = gains[np.arange(len(moves)), partners]
        moved: set[int] = set()
        for row in np.argsort(gains, kind="stable"):
            if gains[row] >= -self.noise:
                break
            move = moves[row] if partners[row] in self.at else np.append(moves[row], partners[row])
            units = set(self.layout.unit_of[move].tolist())
            if moved & units:
                continue
            changes = self._changes(move[np.newaxis])[:, 0]
            if changes[0] >= -self.noise or (changes[1:] > self.slack).any():
                continue
            before = self.at[self.layout.unit_of[move]]
            self._go(move)
            if self.is_within():
                moved |= units
            else:
                self._go(before)
        return bool(moved)

    def _gains(self, moves: np.ndarray) -> np.ndarray:
        """Change of the objective by every move of a batch with every move of another unit.

        Returns:
            Shape `(moves, positions)`: infinite where a limit or link is broken. The column of a chosen position is the
            move with a unit that stays.
        """
        rises = self._rises()
        alone = self._changes(moves)
        stays = np.zeros(len(self.layout.unit_of), dtype=bool)
        stays[self.at] = True
        moving = (self.layout.unit_of[moves][:, :, np.newaxis] == np.arange(len(self.at))).any(axis=1)
        closed = (moving[:, self.layout.unit_of] | ~self._free()) & ~stays
        gains = self._with_partner(self.forms[0], moves, alone[0], rises[0])
        gains[closed] = np.inf
        for form, each, all_, slack in zip(self.forms[1:], alone[1:], rises[1:], self.slack, strict=True):
            if form.pairs is not None or each.max() + all_.max() > slack:
                gains[self._with_partner(form, moves, each, all_) > slack] = np.inf
        return gains

    def _with_partner(self, form: Form, moves: np.ndarray, alone: np.ndarray, rises: np.ndarray) -> np.ndarray:
        """Change of a form by every move with every other single move, shape `(moves, positions)`."""
        both: np.ndarray = alone[:, np.newaxis] + rises
        if form.pairs is not None:
            crossed = self._crossed(form, moves)
            both += crossed
            both -= crossed[:, self.at][:, self.layout.unit_of]
        return both

    def _crossed(self, form: Form, moves: np.ndarray) -> np.ndarray:
        """By how much moves change the slopes of a form, shape `(moves, positions)`."""
        assert form.pairs is not None
        changed = np.zeros((len(moves), len(self.layout.unit_of)))
        for new in moves.T:
            changed += form.pairs[new]
            changed -= form.pairs[self.at[self.layout.unit_of[new]]]
        return changed

    def _changes(self, moves: np.ndarray) -> np.ndarray:
        """By how much moves change every form, shape `(forms, moves)`."""
        old = self.at[self.layout.unit_of[moves]]
        changes: np.ndarray = self.slopes[:, moves].sum(axis=2) - self.slopes[:, old].sum(axis=2)
        if moves.shape[1] > 1:
            for form, change in zip(self.forms, changes, strict=True):
                if form.pairs is not None:
                    crossed = self._crossed(form, moves)
                    rows = np.arange(len(moves))[:, np.newaxis]
                    change += (crossed[rows, moves] - crossed[rows, old]).sum(axis=1) / 2
        return changes

    def _rises(self) -> np.ndarray:
        """By how much every single move changes every form, shape `(forms, positions)`."""
        rises: np.ndarray = self.slopes - self.slopes[:, self.at][:, self.layout.unit_of]
        return rises

    def _overshoot(self, changes: np.ndarray) -> np.ndarray:
        """By how much limits are missed after changes of shape `(forms, moves)`, as shares of the forms' ranges."""
        missed = np.maximum(changes[1:] - self.slack[:, np.newaxis], 0.0) / self.scales[1:, np.newaxis]
        total: np.ndarray = missed.sum(axis=0)
        return total

    def _spread(self, units: Sequence[int], labels: Sequence[np.ndarray]) -> np.ndarray:
        """The labels of a link over all positions, as indices from 0; -1 where a unit is not in it."""
        known = np.unique(np.concatenate(labels))
        spread = np.full(len(self.layout.unit_of), -1)
        for unit, own in zip(units, labels, strict=True):
            spread[self.layout.starts[unit] + np.arange(len(own))] = np.searchsorted(known, own)
        return spread

    def _free(self, besides: int = -1) -> np.ndarray:
        """Positions that a unit can move to under the links, one of them aside."""
        free = np.ones(len(self.layout.unit_of), dtype=bool)
        for number, labels in enumerate(self._links):
            if number != besides:
                free &= labels == labels[self.at][self.layout.unit_of]
        return free

    def _alone(self, positions: np.ndarray) -> np.ndarray:
        """The moves of single units to those of some positions that are free and not chosen, shape `(moves, 1)`."""
        chosen = self.at[self.layout.unit_of[positions]]
        moves: np.ndarray = positions[self._free()[positions] & (positions != chosen)][:, np.newaxis]
        return moves

    def _together(self, link: int) -> np.ndarray:
        """Moves of all units of a link to other labels, shape `(moves, units of the link)`.

        With every label, each unit takes the choice that is best by the objective, by the limits, or by both at the
        price that the limits have here.
        """
        rises = self._rises()
        burden = (rises[1:] / self.scales[1:, np.newaxis]).sum(axis=0)
        open_ = self._free(besides=link)
        wanted = open_ & (rises[0] < 0) & (burden > 0)
        price = (-rises[0][wanted] / burden[wanted]).max(initial=0.0)
        labels = self._links[link]
        units = self.problem.links[link].units
        moves = []
        for label in np.unique(labels[open_ & (labels >= 0)]):
            if label == labels[self.at[units[0]]]:
                continue
            of_units = [np.flatnonzero(open_ & (labels == label) & (self.layout.unit_of == unit)) for unit in units]
            if all(len(positions) for positions in of_units):
                for key in (rises[0], burden, rises[0] + price * burden):
                    moves.append([int(positions[key[positions].argmin()]) for positions in of_units])
        return np.unique(np.array(moves, dtype=np.int64).reshape(len(moves), len(units)), axis=0)


def _range(form: Form, starts: np.ndarray) -> float:
    """How far apart the values of a form can be, roughly; never zero."""
    linear = float((np.maximum.reduceat(form.linear, starts) - np.minimum.reduceat(form.linear, starts)).sum())
    return linear + (0.0 if form.pairs is None else float(np.abs(form.pairs).max()) * len(starts)) or 1.0
