"""Exact selection with scores that interact: branch and bound, unit by unit, over all open selections at once.

A level holds many partial selections as rows of arrays. Each unit in turn multiplies them by its choices; tangents of
the convex score, with the prices of the limits, bound what the rest can add, and those that cannot better the incumbent
go. A level that grows too large is halved, and the half of lower bounds goes first.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np

from search.solve.bound import Convex
from search.solve.problem import Solution

CELLS = 2**20  # numbers in the largest array of a level, of which there are about eight: 8 MB each
WORK = 2.0**25  # numbers computed before giving up: unlike a limit in seconds, met alike by every run
TANGENTS = 3  # tangents tried per partial selection
NOISE = 1e-12  # share of the score that counts as no improvement
SLACK_NOISE = 1e-9  # share of a limit's range left to rounding; what is found is checked without error


@dataclass(frozen=True)
class Level:
    """Partial selections, in which the same units have moved or stayed.

    Attributes:
        rest: The moves of all later units, ascending.
        chosen: The move of each unit so far, -1 where it stays, shape `(selections, units so far)`.
        score: With all later units staying, shape `(selections,)`.
        slopes: Of the score in the moves `rest`, shape `(selections, rest)`.
        slack: Of every limit, with all later units staying, shape `(selections, limits)`.
        tied: Sums of the ties' rows so far, shape `(selections, ties)`.
        bound: On the score of all that they lead to, shape `(selections,)`.
    """

    rest: np.ndarray
    chosen: np.ndarray
    score: np.ndarray
    slopes: np.ndarray
    slack: np.ndarray
    tied: np.ndarray
    bound: np.ndarray

    def only(self, keep: np.ndarray) -> Level:
        """The selections of a mask."""
        kept = (part[keep] for part in (self.chosen, self.score, self.slopes, self.slack, self.tied, self.bound))
        return Level(self.rest, *kept)


def branch(convex: Convex, work: float = WORK, deadline: float = math.inf) -> tuple[Solution, float]:
    """Searches the selections of a relaxation for one better than its origin.

    Args:
        convex: All selections that may be better.
        work: Numbers computed, beyond which it gives up.
        deadline: Value of `time.monotonic` at which it gives up.

    Returns:
        The best selection, which is the origin where none is better, and the bound that is proved: its score where the
        search came to its end.
    """
    best, units = convex.origin, convex.units
    spread = convex.mix * (1 - convex.mix) * np.diagonal(convex.matrix)
    weights = np.bincount(units, spread, len(convex.problem.sizes))
    order = sorted(np.unique(units).tolist(), key=lambda unit: (-weights[unit], unit))
    root = Level(
        rest=np.arange(len(units)),
        chosen=np.zeros((1, 0), dtype=np.int64),
        score=np.array([best.score]),
        slopes=convex.linear[np.newaxis],
        slack=convex.slack[np.newaxis],
        tied=np.zeros((1, len(convex.ties))),
        bound=np.array([convex.bound]),
    )
    open_ = [root]
    while open_:
        level = open_.pop()
        level = level.only(level.bound < best.score - NOISE * abs(best.score))
        if not len(level.score):
            continue
        depth = level.chosen.shape[1]
        if depth == len(order):
            best = _best(convex, level, best)
            continue
        size = len(level.score) * level.slopes.shape[1] * (1 + int((units == order[depth]).sum()))
        if size > CELLS and len(level.score) > 1:
            ranks = np.argsort(np.argsort(level.bound, kind="stable"))
            half = len(level.score) // 2
            open_ += [level.only(ranks >= half), level.only(ranks < half)]
            continue
        work -= size
        if work < 0 or time.monotonic() >= deadline:
            return best, min(best.score, *(float(each.bound.min()) for each in (level, *open_)))
        open_.append(_bounded(convex, _possible(convex, _extended(convex, level, order[depth]))))
    return best, best.score


def _extended(convex: Convex, level: Level, unit: int) -> Level:
    """Multiplies partial selections by the moves of a unit, to stay where it is being the first."""
    here = convex.units[level.rest] == unit
    moves, rest = level.rest[here], level.rest[~here]
    parents = np.repeat(np.arange(len(level.score)), len(moves) + 1)
    options = np.tile(np.arange(len(moves) + 1), len(level.score))

    def with_stay(rows: np.ndarray) -> np.ndarray:
        """Rows of what each move adds, below a row of zeros."""
        return np.concatenate([np.zeros((1, rows.shape[1])), rows])[options]

    stay = np.zeros((len(level.score), 1))
    own = np.concatenate([stay, level.slopes[:, here] + np.diagonal(convex.matrix)[moves] / 2], axis=1)
    return Level(
        rest=rest,
        chosen=np.column_stack([level.chosen[parents], np.append(-1, moves)[options]]),
        score=level.score[parents] + own.ravel(),
        slopes=level.slopes[:, ~here][parents] + with_stay(convex.matrix[np.ix_(moves, rest)]),
        slack=level.slack[parents] - with_stay(convex.costs[:, moves].T),
        tied=level.tied[parents] + with_stay(convex.ties[:, moves].T),
        bound=level.bound[parents],
    )


def _possible(convex: Convex, level: Level) -> Level:
    """Leaves out what no moves of later units can bring within limits and links."""
    starts = _starts(convex, level)
    costs, ties = convex.costs[:, level.rest], convex.ties[:, level.rest]
    noise = SLACK_NOISE * (np.abs(convex.costs).max(axis=1, initial=0.0) + np.abs(convex.slack))
    keep = (level.slack - _least(costs, starts).sum(axis=1) >= -noise).all(axis=1)
    keep &= (level.tied + _least(ties, starts).sum(axis=1) <= 0.5).all(axis=1)
    keep &= (level.tied - _least(-ties, starts).sum(axis=1) >= -0.5).all(axis=1)
    return level.only(keep)


def _bounded(convex: Convex, level: Level) -> Level:
    """Raises the bounds of partial selections.

    The prices are those of the whole relaxation; tangents are taken where it has its mix, and at points nearer to each
    partial selection's own minimum (steps of Frank and Wolfe).
    """
    limits = len(convex.costs)
    prices, tie_prices = convex.prices[:limits], convex.prices[limits:]
    fixed = level.score - np.maximum(level.slack, 0.0) @ prices + level.tied @ tie_prices
    starts, rest = _starts(convex, level), level.rest
    if not len(rest):
        return replace(level, bound=level.score)
    matrix = convex.matrix[np.ix_(rest, rest)]
    linear = level.slopes + (prices @ convex.costs[:, rest] + tie_prices @ convex.ties[:, rest])
    mix = np.repeat(convex.mix[np.newaxis, rest], len(linear), axis=0)
    bent = mix @ matrix
    units = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(rest))))
    found = np.full(len(linear), -math.inf)
    for number in range(TANGENTS):
        slopes = linear + bent
        least = _least(slopes, starts)
        found = np.maximum(found, least.sum(axis=1) - (mix * bent).sum(axis=1) / 2)
        if number + 1 < TANGENTS:
            corner = ((slopes == least[:, units]) & (slopes < 0)).astype(np.float64)
            way = corner - mix
            bent_way = way @ matrix
            curved = np.maximum((way * bent_way).sum(axis=1), 1e-300)
            length = np.clip(-(slopes * way).sum(axis=1) / curved, 0.0, 1.0)[:, np.newaxis]
            mix += length * way
            bent += length * bent_way
    return replace(level, bound=np.maximum(level.bound, fixed + found))


def _best(convex: Convex, level: Level, best: Solution) -> Solution:
    """The best of complete selections that keeps all limits, added up without error, if it is better than `best`."""
    problem = convex.problem
    starts = np.cumsum(problem.sizes) - problem.sizes
    for number in np.argsort(level.score, kind="stable"):
        choices = np.array(convex.origin.choices)
        moved = level.chosen[number][level.chosen[number] >= 0]
        choices[convex.units[moved]] = convex.positions[moved] - starts[convex.units[moved]]
        found = problem.solution(choices, optimal=False)
        within = all(found.costs[name] <= most for name, most in convex.limits.items())
        if within and problem.agrees(found.choices):
            return found if found.score < best.score else best
    return best


def _starts(convex: Convex, level: Level) -> np.ndarray:
    """Where each later unit begins among the moves that are left."""
    return np.flatnonzero(np.diff(convex.units[level.rest], prepend=-1))


def _least(rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Per row and unit the least number of its moves or, where it stays, zero: shape `(rows, units)`."""
    if not len(starts):
        return np.zeros((len(rows), 0))
    least: np.ndarray = np.minimum(np.minimum.reduceat(rows, starts, axis=1), 0.0)
    return least
