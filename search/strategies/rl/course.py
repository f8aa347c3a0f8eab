"""The walk over a network: what an agent sees at every decision, and what its actions come to.

An observation holds, scaled to [0, 1]: what layers the decision is about, where in the walk it stands, how far the last
step went; for every limit, the budget asked for, the share of its slack that is left and how much of what is ahead that
affords; for every format, whether it can be reached, what it takes of the slack of every limit, and its predicted loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hwmodels import Layer
from search.errors import ConfigError
from search.pricing import Pricing
from search.space import Decision
from search.strategies.projection import Projection
from search.strategies.rl.ceiling import Ceiling, reachable, rows_of

AGAIN = 3  # times that a walk over a limit is taken again with less to spend, which is quicker than a projection

FEATURES = ("input", "layers", "weights", "macs", "values_in", "values_out", "kernel", "stride", "depthwise", "linear")


def features_of(pricing: Pricing) -> np.ndarray:
    """What tells the decisions of a space apart, shape `(decisions, FEATURES)`; counts and sizes as logarithms."""
    decisions = pricing.space.decisions
    rows = [_features(decision, [pricing.network[name] for name in decision.layers]) for decision in decisions]
    return np.round(np.array(rows), 6)


def _features(decision: Decision, layers: Sequence[Layer]) -> list[float]:
    def log(numbers: list[int]) -> float:
        return math.log1p(sum(numbers))

    count = max(len(layers), 1)
    return [
        float(decision.side == "input"),
        math.log(count),
        log([layer.weight_count for layer in layers]),
        log([layer.macs for layer in layers]),
        log([math.prod(layer.input_shape) for layer in layers]),
        log([math.prod(layer.output_shape) for layer in layers]),
        math.log1p(max((math.prod(layer.kernel) for layer in layers), default=0)),
        math.log1p(max((math.prod(layer.stride) for layer in layers), default=0)),
        sum(layer.is_depthwise for layer in layers) / count,
        sum(not layer.kernel for layer in layers) / count,
    ]


class Course:
    """The decisions of a priced space in order, with everything about them that stays the same from walk to walk.

    Attributes:
        pricing: The space and its prices.
        names: The costs that are limited.
        ceiling: The order of the decisions and what is reachable.
        width: Numbers in an observation.
    """

    def __init__(self, pricing: Pricing, names: Sequence[str], scaling: np.ndarray, losses: np.ndarray) -> None:
        """Prepares the walks.

        Args:
            pricing: The space and its prices.
            names: The costs that are limited.
            scaling: Least and largest value of every feature, shape `(2, FEATURES)`.
            losses: Predicted losses of single choices, scaled to [0, 1], shape `(decisions, most formats)`.
        """
        self.pricing = pricing
        self.names = tuple(names)
        self.ceiling = Ceiling(pricing.space, rows_of(pricing, names))
        self.limit_of = np.array([self.names.index(row.name) for row in self.ceiling.rows], dtype=np.int64)
        unknown = [name for number, name in enumerate(self.names) if number not in self.limit_of]
        if unknown:
            raise ConfigError(f"the hardware model does not know {', '.join(unknown)}; limit another cost")
        self.formats = max(len(decision.formats) for decision in pricing.space.decisions)
        low, high = scaling
        scaled = (features_of(pricing) - low) / np.where(high > low, high - low, 1.0)
        self.features = np.clip(scaled, 0.0, 1.0)
        self.losses = losses
        self.width = len(FEATURES) + 2 + 3 * len(self.names) + self.formats * (2 + len(self.names))
        room = self.ceiling.most - self.ceiling.least
        self.room = np.where(room > 0, room, 1.0)
        self._priced: dict[tuple[int, ...], dict[str, float]] = {}
        self._projections: dict[tuple[tuple[str, float], ...], Projection] = {}

    @property
    def steps(self) -> int:
        """Decisions in one walk."""
        return len(self.ceiling.order)

    def least(self) -> dict[str, float]:
        """The least that every limited cost can be, one by one; of a peak, a bound below it."""
        return self._by_limit(self.ceiling.least)

    def most(self) -> dict[str, float]:
        """The most that every limited cost can be."""
        return self._by_limit(self.ceiling.most)

    def costs(self, point: tuple[int, ...]) -> dict[str, float]:
        """The limited costs of a point, as the objective prices them."""
        if point not in self._priced:
            costs = self.pricing.costs(self.pricing.space.decode(point))
            self._priced[point] = {name: costs[name] for name in self.names}
        return self._priced[point]

    def nearest(self, point: tuple[int, ...], limits: Mapping[str, float]) -> tuple[int, ...]:
        """The nearest point within limits, by the exact projection."""
        key = tuple(limits.items())
        if key not in self._projections:
            self._projections[key] = Projection(self.pricing, limits)
        return self._projections[key].nearest(point)

    def _by_limit(self, totals: np.ndarray) -> dict[str, float]:
        return {name: float(totals[self.limit_of == number].max()) for number, name in enumerate(self.names)}


class Walk:
    """One policy in the making, within limits.

    Attributes:
        limits: The limits.
        point: The decisions so far; those to come, and those that are not open, stand at 0.
        taken: Steps taken.
    """

    def __init__(self, course: Course, limits: Mapping[str, float]) -> None:
        self.limits = dict(limits)
        self.point = [0] * len(course.pricing.space.decisions)
        self.taken = 0
        self._course = course
        self._slack = course.ceiling.slack(limits)
        self._granted = np.where(self._slack > 0, self._slack, 1.0)
        self._goal = np.clip(self._slack / course.room, 0.0, 1.0)
        self._moved = 0.0
        self._look()

    @property
    def is_over(self) -> bool:
        """Whether every decision is taken."""
        return self.taken == self._course.steps

    def take(self, action: float) -> int:
        """Takes the next decision: the reachable format nearest to an action in [-1, 1]; returns its index."""
        count = len(self._open)
        wanted = min(int((action + 1) / 2 * count), count - 1)
        levels = np.flatnonzero(self._open)
        level = int(levels[np.argmin(np.abs(levels - wanted))])
        self.point[self._course.ceiling.order[self.taken]] = level
        self._slack = self._slack - self._rises[:, level]
        self._moved = level / (count - 1)
        self.taken += 1
        self._look()
        return level

    def _look(self) -> None:
        """Finds out what the next decision may be."""
        if not self.is_over:
            self._rises = self._course.ceiling.rises(self._course.ceiling.order[self.taken], self.point)
            self._open = reachable(self._rises, self._slack)

    def observation(self) -> np.ndarray:
        """What the agent sees now, shape `(width,)`; zero once the walk is over."""
        course = self._course
        seen = np.zeros(course.width, dtype=np.float32)
        if self.is_over:
            return seen
        decision = course.ceiling.order[self.taken]
        limits, formats, count = len(course.names), course.formats, len(self._open)
        slack = np.maximum(self._slack, 0.0)
        ahead = course.ceiling.ahead[self.taken]
        afforded = np.where(slack < ahead, slack / np.where(ahead > 0, ahead, 1.0), 1.0)
        used = np.minimum(self._rises / np.where(slack > 0, slack, 1e-300)[:, None], 1.0)
        at = len(FEATURES)
        seen[:at] = course.features[decision]
        seen[at : at + 2] = self.taken / course.steps, self._moved
        at += 2
        for number in range(limits):
            rows = course.limit_of == number
            seen[at : at + 3] = self._goal[rows].min(), (slack / self._granted)[rows].min(), afforded[rows].min()
            at += 3
            seen[at : at + count] = used[rows].max(0)
            at += formats
        seen[at : at + count] = self._open
        seen[at + formats : at + formats + count] = course.losses[decision, :count]
        return np.clip(seen, 0.0, 1.0)


def settle(course: Course, limits: Mapping[str, float], actions: Sequence[float]) -> tuple[int, ...]:
    """The policy that a whole walk's actions come to, within the limits.

    What the ceiling does not see (boundaries between units, several limits that exclude each other) may leave the walk
    over a limit. Then the same actions are taken again with that much less to spend; and if that does not help, the
    nearest policy that keeps the limits is taken.

    Raises:
        ValueError: If no policy keeps the limits.
    """
    within = dict(limits)
    for _ in range(1 + AGAIN):
        walk = Walk(course, within)
        for action in actions:
            walk.take(action)
        point = tuple(walk.point)
        over = {name: cost - limits[name] for name, cost in course.costs(point).items() if cost > limits[name]}
        if not over:
            return point
        within |= {name: within[name] - excess for name, excess in over.items()}
    return course.nearest(point, limits)


def action_for(level: int, count: int) -> float:
    """The action in the middle of those that ask for a format, by its index among `count`."""
    return (2 * level + 1) / count - 1
