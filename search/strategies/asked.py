"""What a strategy has asked for so far, so that it asks for nothing twice: a known policy would be paid again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from search.objective import Objective
from search.trials import Trial

Point = tuple[int, ...]

CHEAPER = 1e-9  # share of a cost that counts as cheaper, above the rounding of sums


class Asked:
    """The points measured in full in one search.

    Attributes:
        trials: Their trials, in the order in which they were asked for.
    """

    def __init__(self, objective: Objective) -> None:
        self.trials: dict[Point, Trial] = {}
        self._objective = objective

    def __contains__(self, point: Sequence[int]) -> bool:
        return tuple(point) in self.trials

    def begin(self) -> None:
        """Measures what the search was told to start from.

        Raises:
            SpentError: If nothing is left to spend.
        """
        self.measure_each([self._objective.space.encode(policy) for policy in self._objective.starts])

    def measure(self, point: Sequence[int]) -> Trial:
        """Returns the trial of a point, asking for it unless it is known.

        Raises:
            SpentError: If nothing is left to spend.
        """
        at = tuple(int(level) for level in point)
        if at not in self.trials:
            self.trials[at] = self._objective(self._objective.space.decode(at))
        return self.trials[at]

    def measure_each(self, points: Iterable[Sequence[int]]) -> None:
        """Measures points in order, as `measure` does; others may measure those that come next meanwhile.

        Args:
            points: Taken a little ahead of what is measured, so they must not depend on it.

        Raises:
            SpentError: If nothing is left to spend.
        """
        for point in self._objective.ahead(points, self._objective.space.decode):
            self.measure(point)

    def ranked(self) -> list[Point]:
        """The points measured, best first, as the objective ranks them."""
        return sorted(self.trials, key=lambda point: self._objective.rank(self.trials[point]))

    def is_allowed(self, trial: Trial) -> bool:
        """Whether a trial keeps all that the budget limits: costs, and surely the drop of quality."""
        return trial.state == "complete" and max(self._objective.violations(trial).values(), default=0.0) <= 0

    def ceiling(self) -> dict[str, float]:
        """Limits that whatever is to be better must keep.

        Where the budget limits the drop of quality, that is the cost of the cheapest policy found to be allowed, too.
        """
        objective = self._objective
        limits = dict(objective.limits)
        allowed = [objective.primary(trial) for trial in self.trials.values() if self.is_allowed(trial)]
        if objective.quality_drop is not None and allowed:
            limits[objective.primary_cost] = min(allowed) * (1 - CHEAPER)
        return limits
