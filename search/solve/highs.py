"""One integer program given to HiGHS, guarded against its absolute tolerances of about 1e-6.

Every limit is measured by the room that it leaves above the cheapest choices, and the objective is stretched until
the tolerance is negligible. What comes back is added up again: what overshoots a limit is forbidden and the program
solved again.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp

from search.solve.problem import Choices
from search.solve.program import Ban, Limit, Program

STRETCH = 1e6  # largest objective coefficient; HiGHS stops at an absolute gap of 1e-6
ROOM = 1e3  # the room of a limit; HiGHS lets pass 1e-6 above it
NEGLIGIBLE = 1e-6  # coefficients below this count as nothing, since they mislead HiGHS
MARGIN = 1e-6  # by which limits are widened, so that rounding keeps no selection out; overshoots are caught
TOLERANCE = 2e-6  # share of the room, twice what HiGHS lets pass once its presolve has divided a row by its numbers
MAX_OVERSHOOTS = 30  # overshoots forbidden one by one before the limits themselves are tightened
MAX_NODES = 200_000  # branch-and-bound nodes: unlike a limit in seconds, met alike by every run
FIRST_SHARE = 0.7  # of the seconds left, for a solve after which tightened limits may have to be solved again
PROVED, STOPPED, INFEASIBLE = 0, 1, 2  # statuses of scipy's milp and linprog


@dataclass(frozen=True)
class Found:
    """What the solver knows about a program.

    Attributes:
        choices: The best selection found; None where none was.
        bound: No selection that the program admits has a smaller total; infinity where there is none at all.
        proved: Whether nothing better exists than `choices`, to the gap that was asked for.
    """

    choices: Choices | None
    bound: float
    proved: bool


@dataclass(frozen=True)
class Matrices:
    """A program in matrices: minimise `cost @ x` with `upper @ x <= most` and `equal @ x == target`, x between 0 and 1.

    There is one binary variable per open position, and where a peak is minimised a continuous one above all its totals.
    What is minimised is `offset + scale * cost @ x`.
    """

    cost: np.ndarray
    upper: sparse.csr_array
    most: np.ndarray
    equal: sparse.csr_array
    target: np.ndarray
    integrality: np.ndarray
    offset: float
    scale: float


def select(program: Program, is_open: np.ndarray, gap: float = 0.0, until: float = math.inf) -> Found:
    """Solves a program over its open choices, again and again until nothing overshoots a limit.

    Args:
        program: What to solve.
        is_open: Whether each position may be taken.
        gap: Relative distance of total and bound at which to stop.
        until: When to stop, on the clock of `time.monotonic`.

    Raises:
        RuntimeError: If HiGHS fails.
    """
    bound, overshoots, tighten = -math.inf, 0, False
    while True:
        matrices = write(program, is_open, raw=gap > 0, tighten=tighten)
        share = 1.0 if tighten else FIRST_SHARE
        answer = minimise(matrices, gap, share * (until - time.monotonic()))
        if answer.status == INFEASIBLE:
            return Found(None, bound if tighten else math.inf, not tighten)
        if not tighten and answer.mip_dual_bound is not None:
            bound = max(bound, matrices.offset + matrices.scale * answer.mip_dual_bound)
        stopped = answer.status == STOPPED
        if answer.x is None:
            if tighten or not stopped or time.monotonic() > until:
                return Found(None, bound, False)
            tighten = True
            continue
        found = picked(program, is_open, answer.x)
        if not program.admits(found):
            raise RuntimeError(f"HiGHS returned a selection that is ruled out: {found}; {answer.message}")
        overshot = program.overshot(found)
        if not overshot:
            return Found(found, min(bound, program.value(found)), not (stopped or tighten))
        if tighten:
            raise RuntimeError(f"HiGHS overshoots a limit beyond its tolerance: {found}; {answer.message}")
        overshoots += 1
        tighten = stopped or overshoots > MAX_OVERSHOOTS
        program = replace(program, bans=(*program.bans, *(cover(program, limit, found) for limit in overshot)))


def minimise(matrices: Matrices, gap: float, seconds: float) -> OptimizeResult:
    """Gives a program to HiGHS.

    Raises:
        RuntimeError: If HiGHS fails.
    """
    options: dict[str, Any] = {"mip_rel_gap": gap, "node_limit": MAX_NODES}
    if seconds < math.inf:
        options["time_limit"] = max(seconds, 0.0)
    constraints = [LinearConstraint(matrices.equal, matrices.target, matrices.target)]
    if len(matrices.most):
        constraints.append(LinearConstraint(matrices.upper, ub=matrices.most))
    with _quiet():
        answer = milp(
            matrices.cost,
            constraints=constraints,
            integrality=matrices.integrality,
            bounds=Bounds(0, 1),
            options=options,
        )
    if "limit reached" in answer.message:  # scipy does not know the status in which HiGHS ends at a limit on nodes
        answer.status = STOPPED
    if answer.status not in (PROVED, STOPPED, INFEASIBLE) or "error" in answer.message:
        raise RuntimeError(f"HiGHS did not solve the integer program: {answer.message}")
    return answer


def picked(program: Program, is_open: np.ndarray, values: np.ndarray) -> Choices:
    """Reads a selection from the variables of the open positions."""
    taken = np.full(len(is_open), -1.0)
    taken[is_open] = values[: is_open.sum()]
    return tuple(int(part.argmax()) for part in np.split(taken, program.starts[1:]))


def cover(program: Program, limit: Limit, choices: Choices) -> Ban:
    """Forbids an overshoot of a limit, and with it whatever costs as much or more in every unit."""
    everywhere = np.ones(len(limit.numbers), dtype=bool)
    above = program.above_least(limit.numbers, everywhere)
    taken = above[program.at(choices)]
    in_cover = np.repeat(taken > 0, program.sizes)
    heavier = in_cover & (above >= np.repeat(taken, program.sizes))
    return Ban(np.flatnonzero(heavier), int((taken > 0).sum()) - 1)


def write(program: Program, is_open: np.ndarray, raw: bool = False, tighten: bool = False) -> Matrices:
    """Writes a program down, every limit on the scale of `ROOM`, the objective on that of `STRETCH`.

    Args:
        program: What to write down.
        is_open: Whether each position gets a variable.
        raw: For solving to a gap. Keeps the objective's numbers as they are, so that a relative gap refers to its
            total, not to what the total exceeds the least by; and does not widen limits, which invites overshoots.
        tighten: Narrows the limits by more than HiGHS may overshoot them, at the price of losing selections near them.
    """
    rows, most = [], []
    for limit in program.limits:
        room, noise = program.room(limit, is_open)
        unit = max(room, noise) / ROOM or 1.0
        share = np.minimum(program.above_least(limit.numbers, is_open) / unit, 2 * ROOM)  # beyond it all are impossible
        whole = (max(room, 0.0) + noise) / unit
        if np.maximum.reduceat(share, program.starts).sum() <= whole:
            continue  # whatever is picked keeps this limit
        kept = np.where(share < NEGLIGIBLE, 0.0, share)
        dropped = float(np.maximum.reduceat(share - kept, program.starts).sum())
        rows.append(sparse.csr_array(kept[None]))
        most.append(whole - TOLERANCE * ROOM - dropped if tighten else whole + (0.0 if raw else MARGIN))
    for ban in program.bans:
        rows.append(_ones(np.zeros(len(ban.at)), ban.at, (1, len(is_open))))
        most.append(float(ban.most))

    units, positions = len(program.sizes), len(is_open)
    equal = [_ones(np.repeat(np.arange(units), program.sizes), np.arange(positions), (units, positions))]
    for link in program.links:
        first, *others = (
            _has_label(labels, link.common, program.starts[unit], positions)
            for unit, labels in zip(link.units, link.labels, strict=True)
        )
        equal.extend(first - other for other in others)
    stacked = sparse.vstack(equal, format="csr")[:, is_open]
    target = (np.arange(stacked.shape[0]) < units).astype(np.float64)
    upper = sparse.vstack(rows, format="csr")[:, is_open] if rows else sparse.csr_array((0, stacked.shape[1]))
    if len(program.objective) > 1:
        return _below_peak(program, is_open, raw, upper, most, stacked, target)

    (objective,) = program.objective
    cost = (objective if raw else program.above_least(objective, is_open))[is_open]
    offset = 0.0 if raw else math.fsum(program.least(objective, is_open).tolist())
    scale = float(np.abs(cost).max()) / STRETCH or 1.0
    return Matrices(
        cost / scale,
        upper,
        np.array(most),
        stacked,
        target,
        program.is_decided[is_open].astype(np.float64),
        offset,
        scale,
    )


def _below_peak(
    program: Program,
    is_open: np.ndarray,
    raw: bool,
    upper: sparse.csr_array,
    most: list[float],
    equal: sparse.csr_array,
    target: np.ndarray,
) -> Matrices:
    """Adds the variable that is at least as large as the total of each of the objective's columns, and minimised."""
    least = np.array([program.least(column, is_open).sum() for column in program.objective])
    largest = np.array([program.ranges(column, is_open).sum() for column in program.objective]) + least
    base = 0.0 if raw else float(least.max())
    unit = float(largest.max()) - base or 1.0
    counts = largest > least.max()  # the others are never the largest
    columns = [
        program.above_least(column, is_open)[is_open] * ROOM / unit for column in np.array(program.objective)[counts]
    ]
    above = sparse.csr_array(np.array(columns).reshape(len(columns), equal.shape[1]))
    variables = equal.shape[1] + 1
    return Matrices(
        np.append(np.zeros(variables - 1), STRETCH),
        sparse.block_array([[upper, None], [above, np.full((len(columns), 1), -ROOM)]], format="csr"),
        np.concatenate([most, (base - least[counts]) * ROOM / unit]),
        sparse.hstack([equal, sparse.csr_array((equal.shape[0], 1))], format="csr"),
        target,
        np.append(program.is_decided[is_open], False).astype(np.float64),
        base - TOLERANCE * unit,
        unit / STRETCH,
    )


def relax(matrices: Matrices, seconds: float) -> OptimizeResult:
    """Solves the linear relaxation; its status says whether that worked."""
    limited = {"A_ub": matrices.upper, "b_ub": matrices.most} if len(matrices.most) else {}
    options = {"time_limit": max(seconds, 0.0)} if seconds < math.inf else {}
    with _quiet():
        return linprog(
            matrices.cost, A_eq=matrices.equal, b_eq=matrices.target, bounds=(0, 1), options=options, **limited
        )


def _ones(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """A matrix with ones at the given places."""
    return sparse.csr_array((np.ones(len(columns)), (rows, columns)), shape=shape)


def _has_label(labels: np.ndarray, common: tuple[int, ...], start: int, positions: int) -> sparse.csr_array:
    """One row per label that a link's units have in common, with ones where a unit's choices have it."""
    having = np.flatnonzero(np.isin(labels, common))
    return _ones(np.searchsorted(common, labels[having]), start + having, (len(common), positions))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discards what HiGHS 1.12 prints to the C standard output, past its log settings, when it repairs a solution."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 1)
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
