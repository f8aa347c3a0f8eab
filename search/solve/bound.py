"""Lower bounds on quadratic scores: a convex relaxation that is made as high as possible, round by round.

With z the 0/1 vector of moves away from a selection, a score is `score + linear @ z + z @ pairs @ z / 2`. Since z_i^2 =
z_i and no unit makes two moves, every block on the diagonal of `pairs` can be replaced by any other whose diagonal goes
back out of `linear`, with the same score of every selection. As long as the matrix is positive semidefinite, the least
over fractional z bounds the score from below, and the smaller the blocks, the higher the bound: this is quadratic
convex reformulation (Billionnet, Elloumi, Plateau, Discrete Applied Mathematics 157, 2009). The best blocks solve a
semidefinite program; here they come from mirror ascent with a log-determinant barrier, whose step moves the blocks of
the matrix's inverse towards the multipliers that the fractional solution calls for.

Every tangent of the convex score is a bound too, and with the multipliers of the limits it says which choices no better
selection can contain. They are dropped, and what is left is bounded more tightly.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from search.solve.forms import layout_of, least_meeting, score_form
from search.solve.problem import Link, Problem, Solution, total

ROUNDS = 30  # changes of the blocks; each costs an inverse
STEP = 0.1  # share of the way that the blocks of the inverse go in a round
BARRIER = 0.5  # weight of the log-determinant, as the share of the gap that it may keep open
CORRECTIONS = 6  # linear programs per round
LIFT = 1e-2  # share of its diagonal by which the first matrix is made definite
FLOOR = 1e-9  # least eigenvalue of the matrix, scaled by its first diagonal
ROUNDING = 1e-11  # share of the scores that rounding may falsify a bound by
SOLVED = 0  # status of scipy's linprog


@dataclass(frozen=True)
class Convex:
    """A convex form of the score of all selections that may be better than one, over moves away from it.

    Attributes:
        problem: The problem.
        limits: Cost name to the most its total may be.
        origin: The selection that the moves start from, feasible.
        positions: Where the moves lead, as positions of the problem, shape `(moves,)`.
        units: The unit of every move, shape `(moves,)`.
        linear: Shape `(moves,)`.
        matrix: Positive definite, shape `(moves, moves)`.
        costs: At least what every move adds to every limited total, shape `(limits, moves)`.
        slack: At most what the origin leaves of every limit, shape `(limits,)`.
        ties: Rows that are zero at every selection that honours the links, shape `(ties, moves)`.
        bound: No selection within the limits scores less, unless it scores at least the origin.
        mix: The fractional moves at which the bound was found, shape `(moves,)`.
        prices: Multipliers of limits and ties there, shape `(limits + ties,)`.
    """

    problem: Problem
    limits: Mapping[str, float]
    origin: Solution
    positions: np.ndarray
    units: np.ndarray
    linear: np.ndarray
    matrix: np.ndarray
    costs: np.ndarray
    slack: np.ndarray
    ties: np.ndarray
    bound: float
    mix: np.ndarray
    prices: np.ndarray

    def slopes(self) -> np.ndarray:
        """The gradient at the mix, shape `(moves,)`."""
        gradient: np.ndarray = self.linear + self.matrix @ self.mix
        return gradient

    def tangent(self) -> tuple[float, np.ndarray]:
        """A constant and scores over the problem's positions that add up to no more than the score of any selection.

        Holds for every selection only while no move has been dropped.
        """
        scores = np.zeros(sum(self.problem.sizes))
        scores[self.positions] = self.slopes()
        return self.origin.score - float(self.mix @ self.matrix @ self.mix) / 2, scores

    def restricted(self, keep: np.ndarray) -> Convex:
        """The relaxation over some of the moves, given by a mask."""
        return replace(
            self,
            positions=self.positions[keep],
            units=self.units[keep],
            linear=self.linear[keep],
            matrix=self.matrix[np.ix_(keep, keep)],
            costs=self.costs[:, keep],
            ties=self.ties[:, keep],
            mix=self.mix[keep],
        )


def relax(
    problem: Problem,
    limits: Mapping[str, float],
    origin: Solution,
    rounds: int = ROUNDS,
    gap: float = 0.0,
    deadline: float = math.inf,
    drop: bool = True,
) -> Convex:
    """Bounds the score of every selection from below.

    Args:
        problem: What may be selected; its interactions are positive semidefinite.
        limits: Cost name to the most its total may be.
        origin: A selection within the limits, the better the tighter the bound.
        rounds: Changes of the matrix.
        gap: Relative gap between origin and bound that is small enough to stop.
        deadline: Value of `time.monotonic` at which to stop.
        drop: Whether to drop the moves that no selection better than the origin contains.

    Raises:
        ValueError: If the interactions are not positive semidefinite.
    """
    convex = _written(problem, limits, origin)
    scale = np.sqrt(np.diagonal(convex.matrix))
    noise = ROUNDING * (abs(origin.score) + float(np.abs(np.concatenate(problem.scores)).max()))
    corners = np.zeros((1, len(convex.positions)))
    for number in range(rounds + 1):
        convex, corners, reached = _minimised(convex, corners, CORRECTIONS if number else 5 * CORRECTIONS)
        open_ = origin.score - convex.bound
        if drop:
            keep = reached <= origin.score + noise
            convex, corners, scale = convex.restricted(keep), corners[:, keep], scale[keep]
        if not len(convex.positions):
            return replace(convex, bound=origin.score)
        if open_ <= gap * abs(origin.score) + noise or number == rounds or time.monotonic() >= deadline:
            break
        convex = _raised(convex, scale, BARRIER * open_ / len(convex.positions))
    return convex


def _written(problem: Problem, limits: Mapping[str, float], origin: Solution) -> Convex:
    """The relaxation with the blocks that the interactions have, lifted to be definite."""
    assert problem.interactions is not None
    layout = layout_of(problem)
    at = problem.positions(origin.choices)
    chosen = at[layout.unit_of]
    moves = np.flatnonzero(np.arange(len(chosen)) != chosen)

    slopes = score_form(problem).slopes(at)
    matrix = problem.interactions[moves] - problem.interactions[chosen[moves]]
    matrix = matrix[:, moves] - matrix[:, chosen[moves]]
    least = 1e-9 * np.abs(np.diagonal(matrix)).max(initial=0.0) or 1.0
    matrix = (matrix + matrix.T) / 2 + LIFT * np.diag(np.maximum(np.diagonal(matrix), least))
    scale = np.sqrt(np.maximum(np.diagonal(matrix), LIFT * least))
    if not _is_definite(matrix, scale):
        raise ValueError("interactions must be positive semidefinite, as a Gram matrix is; a bound needs that")

    rows, slack = [], []
    for name, most in limits.items():
        for column in problem.peaks[name] if name in problem.peaks else (least_meeting(problem, name),):
            flat = np.concatenate(column)
            rows.append(flat[moves] - flat[chosen[moves]])
            slack.append(most - total(column, origin.choices))
    finite = np.isfinite(slack)
    ties = [row for link in problem.links for row in _ties(problem, link, at)]
    return Convex(
        problem,
        limits,
        origin,
        moves,
        layout.unit_of[moves],
        (slopes - slopes[chosen])[moves] - np.diagonal(matrix) / 2,
        matrix,
        np.array(rows).reshape(len(rows), len(moves))[finite],
        np.array(slack)[finite],
        np.array(ties).reshape(len(ties), len(chosen))[:, moves],
        -math.inf,
        np.zeros(len(moves)),
        np.zeros(int(finite.sum()) + len(ties)),
    )


def _ties(problem: Problem, link: Link, at: np.ndarray) -> list[np.ndarray]:
    """Rows over positions, zero where every two neighbours in a link move to the same label, or do not move."""
    layout = layout_of(problem)
    has_label = []
    for unit, labels in zip(link.units, link.labels, strict=True):
        start = layout.starts[unit]
        one_hot = np.equal.outer(np.array(link.common), labels).astype(np.float64)
        rows = np.zeros((len(link.common), len(layout.unit_of)))
        rows[:, start : start + len(labels)] = one_hot - one_hot[:, [at[unit] - start]]
        has_label.append(rows)
    return [row for first, second in itertools.pairwise(has_label) for row in first - second]


def _minimised(convex: Convex, corners: np.ndarray, corrections: int) -> tuple[Convex, np.ndarray, np.ndarray]:
    """Minimises the convex score over mixes of corners, adding the corner that the tangent points to each time.

    Returns:
        The relaxation with the best bound found and its mix; the corners; and per move what every selection scores at
        least that contains it.
    """
    score, linear, matrix = convex.origin.score, convex.linear, convex.matrix
    best, reached, bound = convex, np.full(len(linear), -math.inf), -math.inf
    weights = np.eye(1, len(corners))[0]
    curved, sloped = corners @ matrix @ corners.T, corners @ linear
    for _ in range(corrections):
        weights = _mixed(curved, sloped, weights)
        keep = weights > 0
        keep[0] = True
        corners, weights, curved, sloped = corners[keep], weights[keep], curved[np.ix_(keep, keep)], sloped[keep]
        mix = weights @ corners
        bent = matrix @ mix
        answer = _corner(convex, linear + bent)
        if answer is None:
            break
        corner, prices, least, excess = answer
        value = score + float(linear @ mix + mix @ bent / 2)
        tangent = score - float(mix @ bent) / 2 + least
        if tangent > bound:
            bound, reached = tangent, tangent + excess
            best = replace(convex, bound=max(tangent, convex.bound), mix=mix, prices=prices)
        if value - tangent <= 0.02 * max(score - value, 0.0):
            break
        across = corners @ (matrix @ corner)
        curved = np.block([[curved, across[:, np.newaxis]], [across, corner @ matrix @ corner]])
        sloped, weights = np.append(sloped, linear @ corner), np.append(weights, 0.0)
        corners = np.vstack([corners, corner])
    return best, corners, reached


def _corner(convex: Convex, slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, np.ndarray] | None:
    """Minimises linear scores of moves within limits and ties.

    Returns:
        The fractional moves; the multipliers of limits and ties; the bound that these prove, whatever the accuracy of
        the linear program; and by how much each move raises it. None where HiGHS finds no optimum.
    """
    costs, ties, units = convex.costs, convex.ties, convex.units
    count = len(convex.problem.sizes)
    once = sparse.csr_array((np.ones(len(units)), (units, np.arange(len(units)))), shape=(count, len(units)))
    scales = np.maximum(np.abs(costs).max(axis=1, initial=0.0), 1e-300)
    top = float(np.abs(slopes).max()) or 1.0
    answer = linprog(
        slopes / top,
        A_ub=sparse.vstack([once, sparse.csr_array(costs / scales[:, np.newaxis])], format="csr"),
        b_ub=np.concatenate([np.ones(count), np.maximum(convex.slack, 0.0) / scales]),
        A_eq=sparse.csr_array(ties) if len(ties) else None,
        b_eq=np.zeros(len(ties)) if len(ties) else None,
        bounds=(0, 1),
    )
    if answer.status != SOLVED:
        return None
    limit_prices = np.maximum(-answer.ineqlin.marginals[count:], 0.0) * top / scales
    tie_prices = -answer.eqlin.marginals * top if len(ties) else np.zeros(0)
    reduced = slopes + limit_prices @ costs + tie_prices @ ties
    least = np.zeros(count)
    np.minimum.at(least, units, reduced)
    bound = float(least.sum() - limit_prices @ np.maximum(convex.slack, 0.0))
    return answer.x, np.concatenate([limit_prices, tie_prices]), bound, reduced - least[units]


def _mixed(curved: np.ndarray, sloped: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Minimises `sloped @ w + w @ curved @ w / 2` over weights that add up to one, by an active set from a start."""
    weights = weights.copy()
    jitter = 1e-12 * (np.trace(curved) or 1.0) * np.eye(len(weights))
    for _ in range(4 * len(weights)):
        active = np.flatnonzero(weights > 0)
        size = len(active)
        system = np.ones((size + 1, size + 1))
        system[:size, :size] = (curved + jitter)[np.ix_(active, active)]
        system[size, size] = 0.0
        wanted = np.linalg.lstsq(system, np.append(-sloped[active], 1.0), rcond=None)[0]
        target, level = wanted[:size], -wanted[size]
        step = 1.0
        if (target < 0).any():
            falling = np.flatnonzero(target < 0)
            lengths = weights[active[falling]] / (weights[active[falling]] - target[falling])
            step = float(lengths.min())
        moved = weights[active] + step * (target - weights[active])
        weights[active] = np.where(moved > 1e-12, moved, 0.0)
        if step < 1.0:
            weights[active[falling[lengths.argmin()]]] = 0.0
            continue
        gradient = sloped + curved @ weights
        lowest = int(gradient.argmin())
        if weights[lowest] > 0 or gradient[lowest] >= level - 1e-10 * abs(level):
            break
        weights[lowest] = 1e-9
    weights /= weights.sum()
    return weights


def _raised(convex: Convex, scale: np.ndarray, barrier: float) -> Convex:
    """Moves the blocks of the matrix to where the bound is higher, if the mix stays as it is."""
    matrix, mix = convex.matrix, convex.mix
    inverse = np.linalg.inv(matrix)
    change = np.zeros_like(matrix)
    for unit in np.unique(convex.units):
        block = np.flatnonzero(convex.units == unit)
        at = np.ix_(block, block)
        wanted = (np.diag(mix[block]) - np.outer(mix[block], mix[block])) / (2 * barrier)
        change[at] = np.linalg.inv((1 - STEP) * inverse[at] + STEP * wanted) - np.linalg.inv(inverse[at])
    change = (change + change.T) / 2
    length = 1.0
    while length > 1e-3 and not _is_definite(matrix + length * change, scale):
        length /= 2
    if length <= 1e-3:
        return convex
    return replace(
        convex,
        matrix=matrix + length * change,
        linear=convex.linear - length * np.diagonal(change) / 2,
    )


def _is_definite(matrix: np.ndarray, scale: np.ndarray) -> bool:
    """Whether a matrix, scaled, has no eigenvalue below `FLOOR`."""
    try:
        np.linalg.cholesky(matrix / np.outer(scale, scale) - FLOOR * np.eye(len(matrix)))
    except np.linalg.LinAlgError:
        return False
    return True
