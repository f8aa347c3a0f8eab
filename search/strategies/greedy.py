"""Greedy selection: one format flipped after the other, in the order of what scores say it costs in quality.

Down to a quality floor, it is AIMET's automatic mixed precision (Qualcomm's AI Model Efficiency Toolkit,
`choose_mixed_precision`): an accuracy list of all single changes, applied one after the other from the largest
candidate on, measured until the allowed drop is exceeded. AIMET changes groups of quantizers in the order of accuracy
alone; here a flip's score is held against the cost it saves, as on the convex hull of a knapsack's choices (Sinha and
Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27, 1979).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hwmodels import Precision
from search.assignment import assignment_problem
from search.errors import ConfigError, closest
from search.files import replacing
from search.objective import Objective
from search.sensitivity.choices import starts_of
from search.sensitivity.table import SensitivityTable
from search.space import SearchSpace
from search.strategies.asked import Asked
from search.strategies.base import Strategy, checks_types
from search.strategies.bounds import Bounds
from search.strategies.neighbourhood import stacked
from search.strategies.projection import Projection
from search.trials import Trial

DIRECTIONS = ("auto", "down", "up")
WALKS = ("binary", "interpolation", "every")
TINY = 1e-12  # share of a limit below which nothing is saved
PARTNERS = 64  # flips down and flips up that alternatives exchange, the most promising ones


class Greedy(Strategy):
    """Walks along the path of policies that flipping one format at a time makes, then looks around where it ends.

    The path follows additive scores (`additive_scores`). `down` begins with the most bits everywhere and flips what
    adds least to the score for the cost that it saves; `up` begins with the fewest and flips what takes most from the
    score for what it costs, as long as all limits are kept. `auto` goes down to a quality floor, and up where costs
    alone are limited. A cost is the share of its limit, added up over all limits; without any it is the primary cost.

    Where the budget limits costs only, the best of the path that keeps them is measured. Where it limits the drop of
    quality, the last policy of the path is looked for whose drop is surely allowed: `every` measures the path from its
    beginning until the answer is known, as AIMET's brute force; `binary` bisects it; `interpolation` guesses from the
    measured drops and the scores in between. The latter two take it that drops grow along the path.

    The evaluations that remain go to alternatives of the best policy, the most promising by its score first: one flip,
    or one format down in exchange for one up. Each better policy is the next centre; where there is nothing new around
    the best one, that around the second best is measured, and so on.
    """

    name = "greedy"

    @checks_types
    def __init__(
        self,
        evaluations: int = 40,
        seconds: float | None = None,
        start_from: str | None = None,
        direction: str = "auto",
        walk: str = "binary",
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, whose policies are measured, too.
            direction: `down` from the most bits, `up` from the fewest, or `auto`.
            walk: How the quality floor is looked for along the path: `binary`, `interpolation` or `every`.

        Raises:
            ConfigError: If a setting is out of range.
        """
        super().__init__(evaluations, seconds, start_from)
        for key, value, allowed in (("direction", direction, DIRECTIONS), ("walk", walk, WALKS)):
            if value not in allowed:
                raise ConfigError(
                    f"strategy.{key}={value} is unknown{closest(str(value), allowed)}; allowed: {', '.join(allowed)}"
                )
        self.direction = direction
        self.walk = walk

    @property
    def proposes_one(self) -> bool:
        return True

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        asked = Asked(objective)
        asked.begin()
        slope = Slope(objective)
        is_down = self.direction == "down" or (self.direction == "auto" and objective.quality_drop is not None)
        path = slope.down() if is_down else slope.up()[::-1]
        path = np.array([point for point in path if objective.is_feasible(space.decode(point.tolist()))])
        if not len(path):
            path = np.array([Projection(objective.pricing, objective.limits).nearest(slope.down()[-1])])
        if objective.quality_drop is None:
            asked.measure(path[0].tolist())
        elif self.walk == "every":
            _walk_every(asked, path if is_down else path[::-1], until=not is_down)
        else:
            _close_in(asked, path, slope.forecast(path), objective.quality_drop, self.walk)
        while objective.remaining >= 1 and not objective.is_out_of_time:
            following = next(_alternatives(asked, slope, objective), None)
            if following is None:
                return
            asked.measure(following.tolist())

    def keep(self, folder: Path, objective: Objective, trials: Sequence[Trial]) -> None:
        """Writes AIMET's curve, `greedy_curve.csv`; see `curve` for its columns."""
        import pandas as pd

        with replacing(folder / "greedy_curve.csv") as aside:
            pd.DataFrame(curve(trials, objective.pricing.reference("float"))).to_csv(aside, index=False)


def _walk_every(asked: Asked, path: np.ndarray, until: bool) -> None:
    """Measures a path from its beginning until a policy is the first that is allowed, or the first that is not."""
    for point in path:
        if asked.is_allowed(asked.measure(point.tolist())) == until:
            return


def _close_in(asked: Asked, path: np.ndarray, forecasts: np.ndarray, allowed: float, walk: str) -> None:
    """Finds the last policy of a path, best first, whose drop is allowed, taking it that drops grow along the path."""
    low, high = -1, len(path)
    drops: dict[int, float] = {}
    if walk == "interpolation":
        for end in dict.fromkeys((0, len(path) - 1)):
            trial = asked.measure(path[end].tolist())
            drops[end] = trial.certain_drop if trial.is_measured else np.inf
            low, high = (end, high) if asked.is_allowed(trial) else (low, min(high, end))
    while high - low > 1:
        middle = (low + high) // 2
        if {low, high} <= set(drops) and np.isfinite(drops[high]) and drops[high] > drops[low]:
            share = (allowed - drops[low]) / (drops[high] - drops[low])
            wanted = forecasts[low] + share * (forecasts[high] - forecasts[low])
            middle = int(np.clip(np.searchsorted(forecasts[: high + 1], wanted, "right") - 1, low + 1, high - 1))
        trial = asked.measure(path[middle].tolist())
        drops[middle] = trial.certain_drop if trial.is_measured else np.inf
        low, high = (middle, high) if asked.is_allowed(trial) else (low, middle)


def _alternatives(asked: Asked, slope: Slope, objective: Objective) -> Iterator[np.ndarray]:
    """New policies around the best one, the most promising first, then around the second best, and so on.

    Where the budget limits the drop of quality, that is what adds least to the score for the cost that it saves.
    """
    limits = asked.ceiling()
    bounds = Bounds(objective.pricing, limits, slope.problem)
    is_cheaper = objective.quality_drop is not None and limits != objective.limits
    for centre in asked.ranked():
        at = np.array(centre)
        points = slope.around(at)
        points = points[bounds.keep(points)]
        losses = slope.forecast(points)
        if is_cheaper:
            saved = slope.price(at[np.newaxis]) - slope.price(points)
            losses = _ratio(losses - slope.forecast(at[np.newaxis]), saved)
        for point in points[np.argsort(losses, kind="stable")]:
            if point.tolist() not in asked and objective.is_feasible(objective.space.decode(point.tolist())):
                yield point


class Slope:
    """What single flips add to the score and save in cost.

    Attributes:
        problem: The space and its prices, as solvers take them.
    """

    def __init__(self, objective: Objective) -> None:
        pricing, space = objective.pricing, objective.space
        self.problem = assignment_problem(pricing)
        self._bounds = Bounds(pricing, objective.limits, self.problem)
        weighed = objective.limits or {objective.primary_cost: pricing.reference("float")[objective.primary_cost]}
        self.price = Bounds(pricing, weighed, self.problem).price
        self._scores, self._starts = additive_scores(objective.sensitivity), starts_of(space)
        self._tops = np.array([len(decision.formats) - 1 for decision in space.decisions])
        self._nearest = Projection(pricing, objective.limits).nearest

    def forecast(self, points: np.ndarray) -> np.ndarray:
        """Adds up the scores of points, shape `(policies,)`."""
        losses: np.ndarray = self._scores[points + self._starts].sum(1)
        return losses

    def down(self) -> np.ndarray:
        """The path from the most bits down until no flip saves any cost, shape `(policies, decisions)`."""
        path = [self._tops]
        while True:
            at = path[-1][np.newaxis]
            points = self._flips(path[-1], range(-int(self._tops.max()), 0))
            saved = self.price(at) - self.price(points)
            points, saved = points[saved > TINY], saved[saved > TINY]
            if not len(points):
                return np.array(path)
            path.append(points[np.argmin(_ratio(self.forecast(points) - self.forecast(at), saved))])

    def up(self) -> np.ndarray:
        """The path from the fewest bits up until no flip that helps keeps the limits, shape `(policies, decisions)`."""
        path = [np.array(self._nearest([0] * len(self._tops)))]
        while True:
            at = path[-1][np.newaxis]
            points = self._flips(path[-1], range(1, int(self._tops.max()) + 1))
            gained = self.forecast(at) - self.forecast(points)
            points = points[(gained > 0) & self._bounds.keep(points)]
            if not len(points):
                return np.array(path)
            paid = self.price(points) - self.price(at)
            path.append(points[np.argmin(_ratio(self.forecast(points) - self.forecast(at), paid))])

    def around(self, point: np.ndarray) -> np.ndarray:
        """Points one flip away, and those that exchange one format down for one up."""
        deepest = int(self._tops.max())
        downs, ups = self._flips(point, range(-deepest, 0)), self._flips(point, range(1, deepest + 1))
        at = point[np.newaxis]
        added = self.forecast(np.concatenate([downs, ups])) - self.forecast(at)
        moved = self.price(np.concatenate([downs, ups])) - self.price(at)
        best_downs = downs[np.argsort(_ratio(added, -moved)[: len(downs)], kind="stable")[:PARTNERS]]
        best_ups = ups[np.argsort(_ratio(added, moved)[len(downs) :], kind="stable")[:PARTNERS]]
        exchanged = (best_downs[:, np.newaxis] + (best_ups - point)).reshape(-1, len(point))
        others = ((best_downs != point)[:, np.newaxis] & (best_ups != point)).any(-1).reshape(-1)
        return stacked([downs, ups, exchanged[~others]], len(point))

    def _flips(self, point: np.ndarray, steps: Sequence[int]) -> np.ndarray:
        """Points that differ by so many formats in one decision, shape `(flips, decisions)`."""
        moves = [step * np.eye(len(point), dtype=np.int64) for step in steps]
        points = np.concatenate([np.empty((0, len(point)), dtype=np.int64), *(point + move for move in moves)])
        flipped: np.ndarray = points[((points >= 0) & (points <= self._tops)).all(1)]
        return flipped


def _ratio(added: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """What flips add to the score for each share of the limits that they save or cost; free gains before all others."""
    free = np.where(added < 0, -np.inf, np.inf)
    ratio: np.ndarray = np.where(moved > TINY, added / np.maximum(moved, TINY), free)
    return ratio


def additive_scores(table: SensitivityTable) -> np.ndarray:
    """A score for every choice that adds up over a policy, shape `(choices,)`.

    The preferred predictor where it only adds up, else `kl`, else the first column; where there are interactions only,
    what they say of single choices.
    """
    names = [table.preferred, "kl", *table.columns]
    scores, interactions = table.parts(next((name for name in names if name in table.columns), None))
    return scores if interactions is None else scores + np.diag(interactions) / 2


def curve(trials: Sequence[Trial], reference: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """AIMET's curve: one row for every policy measured in full, in the order in which it was.

    Args:
        trials: A run's trials.
        reference: Costs of the float network.

    Returns:
        Rows of `trial, quality, drop, drop_low, drop_high`, every known cost relative to the float network's as
        `relative_COST`, `flips`, the number of layers whose precision differs from the row before, and `flipped`, such
        as `conv1 int8/uint8 > int4/uint8`, where there are at most three.
    """
    rows: list[dict[str, Any]] = []
    before: Mapping[str, Precision] = {}
    for trial in trials:
        if not trial.is_whole:
            continue
        flips = [
            f"{layer} {before[layer]} > {trial.policy[layer]}"
            for layer in before
            if before[layer] != trial.policy[layer]
        ]
        relative = {
            f"relative_{name}": value / whole
            for name, value in trial.cost.items()
            if value is not None and (whole := reference.get(name))
        }
        quality = {name: trial.metrics.get(name) for name in ("quality", "drop", "drop_low", "drop_high")}
        flipped = "; ".join(flips) if len(flips) <= 3 else ""
        rows.append({"trial": trial.number, **quality, **relative, "flips": len(flips), "flipped": flipped})
        before = trial.policy
    return rows
