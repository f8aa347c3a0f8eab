"""The winner, settled by the cost model's oracle where it has one.

An oracle, such as a compiler run on the whole network, is too slow for searching and does not add up over layers. So
the search goes by the cost table, and of what it found the best few are priced again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from hwmodels import CostReport
from search.errors import BitplanError
from search.objective import Objective
from search.trials import Trial

SHORTLIST = 8
"""Trials the oracle is asked about at most."""


def best_trial(objective: Objective, trials: Sequence[Trial]) -> Trial:
    """Picks the best trial from the log.

    Raises:
        BitplanError: If nothing within budget was measured.
    """
    return _ranked(objective, trials)[0]


def settle(objective: Objective, trials: Sequence[Trial]) -> tuple[Trial, CostReport | None]:
    """Picks the winner from the log, and says what an oracle makes of it; None where the cost model has none.

    Of the best trials the first that keeps the limits by the oracle's costs, too; the best of all where none of the
    shortlist does.

    Raises:
        BitplanError: If nothing within budget was measured.
    """
    pricing = objective.pricing
    first: tuple[Trial, CostReport] | None = None
    ranked = _ranked(objective, trials)
    for trial in ranked[:SHORTLIST]:
        report = pricing.cost_model.confirm(pricing.network, trial.policy, pricing.workload)
        if report is None:
            return trial, None
        first = first or (trial, report)
        costs = asdict(report.total)
        if all(costs[name] <= limit for name, limit in objective.limits.items() if name in costs):
            return trial, report
    return first or (ranked[0], None)


def _ranked(objective: Objective, trials: Sequence[Trial]) -> list[Trial]:
    """The trials that were measured whole, best first, each policy once."""
    complete = [trial for trial in trials if trial.is_whole]
    if not complete:
        raise BitplanError(
            f"no policy within budget was measured in {len(trials)} proposals; give strategy.evaluations more, "
            "use strategy=solver, which proposes only policies within budget, or relax the budget"
        )
    ranked: dict[str, Trial] = {}
    for trial in sorted(complete, key=objective.rank):
        ranked.setdefault(trial.digest, trial)
    return list(ranked.values())
