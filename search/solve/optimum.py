"""The optimum of a program, beyond the accuracy of a single call of HiGHS."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from search.solve.highs import MAX_OVERSHOOTS, Found, select
from search.solve.program import Limit, Program, reachable
from search.solve.relaxation import Relaxation, relaxation

RESOLUTION = 1e-9  # ratio of objective ranges that one program can weigh against each other


CORE = 60  # choices, besides half as many as there are units, that the first program may take against the relaxation
WIDER = 4  # how many times more it may take where that does not do


def optimum(program: Program, gap: float = 0.0, until: float = math.inf) -> Found:
    """Solves a program: exactly, or until total and bound are within a relative gap, or until time is up.

    Args:
        program: What to solve.
        gap: Relative distance of total and bound at which to stop; 0 asks for the optimum.
        until: When to stop, on the clock of `time.monotonic`.
    """
    is_open = reachable(program)
    if is_open is None:
        return Found(None, math.inf, True)
    if len(program.objective) > 1:
        found = _lowest_peak(program, is_open, gap, until)
    elif gap > 0:
        found = _in_core(program, is_open, relaxation(program, is_open, until), gap, until)
    else:
        return _least(program, is_open, until)
    return found if found.choices is None else replace(found, proved=found.bound >= program.value(found.choices))


def _least(program: Program, is_open: np.ndarray, until: float) -> Found:
    """Solves on ever finer scales, until nothing is left that a finer one could tell apart.

    After each solution the choices that a bound shows to be worse are dropped, so that the objective can be stretched
    further. Where ranges remain that are too small to be weighed against the largest, the units of the large ones keep
    their choices.
    """
    (objective,) = program.objective
    best, value, bound, proved = None, math.inf, -math.inf, True
    while best is None or time.monotonic() < until:
        relaxed = relaxation(program, is_open, until)
        found = _in_core(program, is_open, relaxed, 0.0, until)
        proved = proved and found.proved
        if found.choices is not None and program.value(found.choices) < value:
            best, value = found.choices, program.value(found.choices)
        if best is None:
            return found
        bound = max(bound, min(found.bound, value))  # what was dropped is no better than the best
        before = program.ranges(objective, is_open)
        is_best = np.isin(np.arange(program.positions), program.at(best))
        if relaxed is not None:
            is_open = is_open & (relaxed.excess <= relaxed.above_bound(best)) | is_best
        left = program.ranges(objective, is_open)
        if left.max() > before.max() / 10:
            if not (left[left > 0] < RESOLUTION * left.max()).any():
                break
            keeps = np.repeat(left > 1e-4 * left.max(), program.sizes)
            is_open = is_open & (is_best | ~keeps)
        if not left.any():
            break
    else:
        proved = False
    return Found(best, value if proved else bound, proved)


def _in_core(program: Program, is_open: np.ndarray, relaxed: Relaxation | None, gap: float, until: float) -> Found:
    """Solves over the few choices that the relaxation says good selections are made of, more where they do not do.

    A selection that takes a position of some excess is at least that far above the relaxation's bound. So the optimum
    over all positions of less excess is the optimum over all, if it is no farther above the bound than that.
    """
    if relaxed is None:
        return select(program, is_open, gap, until)
    against = np.sort(relaxed.excess[is_open & (relaxed.excess > 0)])
    count = len(program.sizes) // 2 + CORE
    best = Found(None, relaxed.total(0.0), False)
    while count < len(against) and time.monotonic() < until:
        outside = float(against[count])
        core = reachable(program, is_open & (relaxed.excess < outside))
        found = select(program, core, gap, until) if core is not None else best
        if found.choices is None:
            count *= WIDER
            continue
        above, value = relaxed.above_bound(found.choices), program.value(found.choices)
        bound = max(best.bound, min(found.bound, relaxed.total(outside)))
        best = Found(found.choices, bound, found.proved and above <= outside)
        if above <= outside or value - bound <= gap * abs(value):
            return best
        count = min(count * WIDER, int(np.searchsorted(against, above, side="right")))
    found = select(program, is_open, gap, until)
    if best.choices is None or (found.choices and program.value(found.choices) <= program.value(best.choices)):
        return replace(found, bound=max(best.bound, found.bound))
    return replace(best, bound=min(max(best.bound, found.bound), program.value(best.choices)))


def _lowest_peak(program: Program, is_open: np.ndarray, gap: float, until: float) -> Found:
    """Asks for less than the lowest peak found, until there is nothing less, or nothing but the gap."""
    best = select(program, is_open, gap, until)
    for _ in range(MAX_OVERSHOOTS):
        value = math.inf if best.choices is None else program.value(best.choices)
        if value - best.bound <= gap * abs(value) or time.monotonic() > until:
            break
        less = tuple(Limit(column, math.nextafter(value, -math.inf)) for column in program.objective)
        below = replace(program, limits=(*program.limits, *less))
        still_open = reachable(below)
        found = Found(None, math.inf, True) if still_open is None else select(below, still_open, gap, until)
        best = Found(found.choices or best.choices, max(best.bound, min(found.bound, value)), False)
        if found.choices is None:
            break
    return best
