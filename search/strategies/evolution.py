"""Evolution on the true metric: level switches, raced on growing parts of the selection split.

After EvoPress (Sieberling et al., "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", ICML 2025):
an offspring raises a few decisions by one format and lowers others until the budget is kept again, and many offspring
are compared on few samples, the best of them on more. Errors of layers need not add up for it to work, nor be known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from search.assignment import assignment_problem
from search.errors import ConfigError
from search.objective import Objective
from search.space import SearchSpace
from search.strategies.asked import Asked, Point
from search.strategies.base import Strategy, checks_types
from search.strategies.baselines import uniform_points
from search.strategies.bounds import Bounds
from search.strategies.neighbourhood import stacked
from search.strategies.projection import Projection
from search.trials import Trial

RAISES = 3  # most decisions that an offspring raises at once; the lower of two draws, as in EvoPress
TRIES = 32  # steps tried, one after the other, to bring an offspring within the limits
FILLS = 2  # plain steps up tried where slack is left
DRAWN = 32  # offspring drawn for each one wanted: some repeat, some cannot keep the limits
FEWEST = 64  # offspring drawn at least
SHRINKS = (0.0, 0.01, 0.03, 0.1)  # shares by which offspring are to be cheaper, where cost is minimised
UNFAIR = 1.5  # a part of the split may hold so many times the samples it is paid for; batches cannot be cut


class Evolution(Strategy):
    """A (parents + offspring) evolution of policies on their measured quality.

    The first parents are the policies to start from, else uniform precisions brought within the budget. Where the
    budget limits costs, offspring exchange formats at about equal cost, and step up where slack is left. Where it
    limits the drop of quality, they are to be cheaper than the cheapest policy that is allowed, by up to a tenth.

    A generation is raced: all offspring on the first of `fidelities`, and on each larger share so many of the best that
    every stage costs about the same (successive halving; Jamieson and Talwalkar, AISTATS 2016), the last in full. What
    a race left behind is measured in full once nothing new can be bred. Where the task gives no score per sample, or
    batches are too large for such shares, every offspring is measured in full and may be a parent at once.
    """

    name = "evolution"

    @checks_types
    def __init__(
        self,
        evaluations: int = 100,
        seconds: float | None = None,
        start_from: str | None = None,
        parents: int = 2,
        offspring: int = 16,
        fidelities: Sequence[float] = (1 / 16, 1 / 4),
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.
            parents: Best policies so far that have offspring.
            offspring: Policies bred for one race.
            fidelities: Shares of the selection split that races look at before the whole, rising; none measures every
                offspring in full.

        Raises:
            ConfigError: If a setting is out of range.
        """
        super().__init__(evaluations, seconds, start_from)
        for key, value in (("parents", parents), ("offspring", offspring)):
            if value < 1:
                raise ConfigError(f"strategy.{key}={value} must be at least 1")
        shares = list(fidelities)
        if any(not 0 < share < 1 for share in shares) or sorted(set(shares)) != shares:
            raise ConfigError(f"strategy.fidelities={shares} must be rising shares between 0 and 1, such as [0.1, 0.3]")
        self.parents = parents
        self.offspring = offspring
        self.fidelities = tuple(shares)

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        population = Population(objective, rng)
        population.asked.begin()
        if not population.asked.trials:
            population.settle(self.parents)
        shares = population.fair_shares(self.fidelities)
        count = self.offspring if shares else 1
        while objective.remaining >= 1 and not objective.is_out_of_time:
            bred = population.breed(self.parents, count)
            if not len(bred) and not population.behind:
                return
            if len(bred):
                population.race(bred, shares)
            else:
                population.catch_up()


class Population:
    """The policies of one search, measured in full or left behind in a race.

    Attributes:
        asked: Those measured in full.
        behind: The last part trial of those that a race left behind.
    """

    def __init__(self, objective: Objective, rng: np.random.Generator) -> None:
        self.asked = Asked(objective)
        self.behind: dict[Point, Trial] = {}
        self._objective = objective
        self._rng = rng
        self._problem = assignment_problem(objective.pricing)

    def settle(self, count: int) -> None:
        """Measures the first parents: uniform precisions, the nearest policy within the limits for those over them.

        Of those, the `count` with least expected noise; where the drop of quality is limited, bisection finds the
        precisions on both sides of what is allowed.
        """
        objective = self._objective
        projection = Projection(objective.pricing, objective.limits)
        points = list(dict.fromkeys(map(projection.nearest, uniform_points(objective.space))))
        if objective.quality_drop is None:
            self.asked.measure_each(points[:count])
            return
        low, high = 0, len(points)
        while low < high:
            middle = (low + high) // 2
            if self.asked.is_allowed(self.asked.measure(points[middle])):
                low = middle + 1
            else:
                high = middle

    def fair_shares(self, fidelities: Sequence[float]) -> tuple[float, ...]:
        """The shares of the split that cost about what they measure, found out with the best policy so far.

        A task that scores whole splits, or has few batches, measures more than the share it is asked for.
        """
        whole = [point for point in self.asked.ranked() if self.asked.trials[point].state == "complete"]
        if not whole or self._objective.remaining < 1 + sum(fidelities):
            return ()
        policy, samples = self._objective.space.decode(whole[0]), _samples(self.asked.trials[whole[0]])
        parts = {share: _samples(self._objective(policy, share)) for share in fidelities}
        return tuple(share for share, part in parts.items() if 0 < part <= UNFAIR * share * samples)

    def breed(self, parents: int, count: int) -> np.ndarray:
        """Breeds up to `count` new points within the limits, shape `(offspring, decisions)`.

        Where the best parents have nothing new around them, all policies measured are parents.
        """
        ranked = self.asked.ranked()
        for chosen in (ranked[:parents], ranked):
            bred = self._new(np.array(chosen, dtype=np.int64), count)
            if len(bred):
                return bred
        return bred

    def race(self, points: np.ndarray, shares: Sequence[float]) -> None:
        """Measures points on rising shares of the split, and the best of them in full.

        Raises:
            SpentError: If nothing is left to spend.
        """
        objective, space = self._objective, self._objective.space
        runners: list[Point] = [tuple(point) for point in points.tolist()]
        for share, following in zip(shares, (*shares, 1.0)[1:], strict=True):
            affordable = int((objective.remaining - 1) / share)  # the winner is to be measured in full
            if affordable < 1:
                runners = runners[:1]
                break
            raced = runners[:affordable]
            seen = dict(zip(raced, objective.map(map(space.decode, raced), share), strict=True))
            self.behind |= seen
            ahead = sorted(seen, key=lambda point: self._standing(seen[point]))
            runners = ahead[: max(1, round(len(points) * shares[0] / following))]
        self._finish(runners)

    def catch_up(self) -> None:
        """Measures the best of those left behind in full.

        Raises:
            SpentError: If nothing is left to spend.
        """
        objective = self._objective
        ceiling = Bounds(objective.pricing, self.asked.ceiling(), self._problem)
        left = [point for point in self.behind if ceiling.keep(np.array([point]))[0]]
        self._finish([min(left, key=lambda point: self._standing(self.behind[point]))] if left else [])
        if not left:
            self.behind.clear()

    def _finish(self, points: Sequence[Point]) -> None:
        for point in self._objective.ahead(points, self._objective.space.decode):
            self.asked.measure(point)
            self.behind.pop(point, None)

    def _standing(self, trial: Trial) -> tuple[float, float]:
        """What a race ranks by: how far the drop will be over what is allowed, judged by a part, then the loss."""
        objective = self._objective
        if not trial.is_measured:
            return (math.inf, math.inf)
        if objective.quality_drop is None:
            return (trial.drop, objective.primary(trial))
        doubt = (trial.certain_drop - trial.drop) * math.sqrt(trial.fidelity)  # what is left of it on the whole split
        return (max(trial.drop + doubt - objective.quality_drop, 0.0), objective.primary(trial))

    def _new(self, parents: np.ndarray, count: int) -> np.ndarray:
        """Draws offspring until `count` of them are new and within the limits; fewer where they repeat."""
        objective, space = self._objective, self._objective.space
        limits = self.asked.ceiling()
        minimises = objective.quality_drop is not None and limits != objective.limits
        drawn = []
        for shrink in SHRINKS if minimises else (0.0,):
            within = dict(limits)
            if minimises:
                within[objective.primary_cost] *= 1 - shrink
            bounds = Bounds(objective.pricing, within, self._problem)
            each = max(FEWEST, DRAWN * count // (len(SHRINKS) if minimises else 1))
            drawn.append(switch_levels(space, parents, each, bounds, self._rng, fills=0 if minimises else FILLS))
        mixed = self._rng.permutation(np.concatenate(drawn))
        fresh: list[np.ndarray] = []
        for point in stacked([mixed], len(space.decisions)):
            at = tuple(point.tolist())
            if at not in self.asked and at not in self.behind and objective.is_feasible(space.decode(at)):
                fresh.append(point)
                if len(fresh) == count:
                    break
        return np.array(fresh, dtype=np.int64).reshape(-1, len(space.decisions))


def switch_levels(
    space: SearchSpace, parents: np.ndarray, count: int, bounds: Bounds, rng: np.random.Generator, fills: int = FILLS
) -> np.ndarray:
    """Draws offspring within the limits: a few decisions raised, and others moved until the limits are kept.

    Raised decisions are not lowered again. Of the others, random ones move by one format as long as that brings the
    policy nearer to the limits: mostly down, and up where more bits cost less. Slack that is left is filled by plain
    steps up.

    Args:
        space: What may be decided.
        parents: Points, shape `(parents, decisions)`, at least one.
        count: How many are drawn.
        bounds: The limits.
        rng: Where chance comes from.
        fills: Plain steps up tried at the end.

    Returns:
        Those that keep the limits, but for rounding, shape `(up to count, decisions)`; some may be parents.
    """
    tops = np.array([len(decision.formats) - 1 for decision in space.decisions])
    points: np.ndarray = parents[rng.integers(len(parents), size=count)].copy()
    raised = np.zeros(points.shape, dtype=bool)
    raises = rng.integers(0, RAISES + 1, size=(2, count)).min(0)
    for number in range(RAISES):
        rows, columns = _pick((points < tops) & ~raised & (raises > number)[:, np.newaxis], rng)
        points[rows, columns] += 1
        raised[rows, columns] = True
    excess = bounds.excess(points)
    for _ in range(TRIES):
        if not excess.any():
            break
        steps = np.where(rng.random(count) < 0.75, -1, 1)[:, np.newaxis]
        moved = np.clip(points + steps, 0, tops)
        rows, columns = _pick((moved != points) & ~raised & (excess > 0)[:, np.newaxis], rng)
        tried = points[rows]
        tried[np.arange(len(rows)), columns] = moved[rows, columns]
        nearer = bounds.excess(tried)
        better = nearer < excess[rows]
        points[rows[better]], excess[rows[better]] = tried[better], nearer[better]
    points = points[excess == 0]
    for _ in range(fills):
        rows, columns = _pick(points < tops, rng)
        tried = points[rows]
        tried[np.arange(len(rows)), columns] += 1
        kept = bounds.keep(tried)
        points[rows[kept]] = tried[kept]
    return points


def _pick(open_: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Picks one true entry of every row that has any: their rows and columns."""
    rows = np.flatnonzero(open_.any(1))
    columns: np.ndarray = np.argmax((rng.random(open_.shape) * open_)[rows], axis=1)
    return rows, columns


def _samples(trial: Trial) -> float:
    return trial.metrics.get("samples") or 0.0
