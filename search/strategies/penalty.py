"""One number for a trial, for algorithms that know no constraints: agents, and samplers such as CMA-ES."""

from __future__ import annotations

from search.objective import Objective
from search.trials import Trial

WEIGHT = 10.0  # of what is over a limit: a violation of one percent costs as much as a tenth of all there is to gain
UNMEASURED = 1.0  # loss of a policy over budget before its violations count, as if all quality were lost


def penalised_loss(objective: Objective, trial: Trial) -> float:
    """What to minimise: the relative loss of a trial, plus what it violates.

    The loss is the drop as a share of the float network's quality; where the budget limits the drop, it is the primary
    cost as a share of the float network's.
    """
    quality = abs(objective.float_quality) or 1.0
    violations = objective.violations(trial)
    if trial.is_measured and "quality_drop" in violations:
        violations["quality_drop"] /= quality
    over = sum(max(violation, 0.0) for violation in violations.values())
    if not trial.is_measured:
        return UNMEASURED + WEIGHT * over
    if objective.quality_drop is None:
        return trial.drop / quality + WEIGHT * over
    largest = objective.pricing.reference("float")[objective.primary_cost]
    return objective.primary(trial) / largest + WEIGHT * over
