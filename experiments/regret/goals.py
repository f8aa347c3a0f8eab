"""What a strategy is asked for: the best quality within average weight bits, the fewest bits within a drop, a front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from search.budget import Budget
from search.pareto import hypervolume

COST = "average_weight_bits"
MOST_DROP = 0.05
"""Where hypervolumes end: this drop, at the limit on bits."""


@dataclass(frozen=True)
class Goal:
    """One task for strategies.

    Attributes:
        bits: Limit on average weight bits, if that is limited; then the drop is minimised.
        drop: The drop of quality allowed, if that is limited: the upper end of its interval is held against it. Then
            bits are minimised. Where nothing is limited the front is looked for.
    """

    bits: float | None = None
    drop: float | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        if self.bits is not None:
            return f"{self.bits:g} bits"
        if self.drop is None:
            return "front"
        return f"{100 * self.drop:g} point{'' if self.drop == 0.01 else 's'}"

    @property
    def budget(self) -> Budget:
        """The budget that says so."""
        return Budget(average_weight_bits=self.bits, quality_drop=self.drop)

    def losses(self, policies: pd.DataFrame) -> np.ndarray:
        """What is minimised: the drop in points, or bits; infinite where a policy is over the limit.

        Args:
            policies: What they cost and are worth, as `Study.policies` has it.
        """
        if self.drop is None:
            most = np.inf if self.bits is None else self.bits
            return np.where(policies["bits"] <= most, 100 * policies["drop"], np.inf)
        return np.where(policies["certain_drop"] <= self.drop, policies["bits"], np.inf)

    def unsearched(self, policies: pd.DataFrame) -> float:
        """The loss of the plan that needs no search: the fewest bits everywhere, or the most where quality counts."""
        at = policies["bits"].idxmin() if self.drop is None else policies["bits"].idxmax()
        return float(self.losses(policies.loc[[at]])[0])

    def volume(self, policies: pd.DataFrame) -> float:
        """Hypervolume of bits and drops below the limit on bits, or the most bits, and `MOST_DROP`."""
        corner = (8.0 if self.bits is None else self.bits, MOST_DROP)
        return hypervolume(policies[["bits", "drop"]].to_numpy(), corner, (False, False))


BITS = tuple(Goal(bits=bits) for bits in (3.0, 4.0))
DROPS = tuple(Goal(drop=drop) for drop in (0.005, 0.01))
FRONT = Goal()
GOALS: Mapping[str, Goal] = {goal.name: goal for goal in (*BITS, *DROPS, FRONT)}
