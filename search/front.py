"""The front: the plans worth considering, beside the float network and the uniform baselines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hwmodels import Format, Network, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.budget import Budget
from search.errors import ConfigError, closest
from search.objective import Objective
from search.pareto import front as non_dominated
from search.policy import Policy
from search.quality.evaluate import Quality
from search.sensitivity.choices import positions
from search.trials import Trial
from search.units import COST_NAMES

if TYPE_CHECKING:
    import pandas as pd

UNIFORM_BITS = (8, 6, 4)
Role = Literal["float", "uniform", "front", "winner"]
Verdict = Literal["met", "missed", "undecided"]


@dataclass(frozen=True)
class Member:
    """A policy shown in the front's table.

    Attributes:
        role: The float network, a uniform baseline, a member of the front, or the winner (which is on the front, too).
        name: What to call it.
        policy: The policy.
        trial: Its trial; None for float and uniform policies.
    """

    role: Role
    name: str
    policy: Policy
    trial: Trial | None = None


def front_costs(objective: Objective, costs: Sequence[str] = ()) -> tuple[str, ...]:
    """The costs that the front is about beside quality: those given, or the primary cost where none are.

    Raises:
        ConfigError: If a cost does not exist, is given twice, or is not known on this hardware.
    """
    if not costs:
        return (objective.primary_cost,)
    some = objective.space.decode([0] * len(objective.space.decisions))
    known = [name for name, cost in objective.pricing.costs(some).items() if not math.isnan(cost)]
    for name in costs:
        if name not in COST_NAMES:
            raise ConfigError(f"strategy.costs names {name!r}{closest(name, COST_NAMES)}; allowed: {', '.join(known)}")
        if name not in known:
            raise ConfigError(
                f"strategy.costs names {name}, which is not known on hardware {objective.pricing.cost_model.name}; "
                f"allowed: {', '.join(known)}"
            )
    if len(set(costs)) < len(costs):
        raise ConfigError(f"strategy.costs={list(costs)} names a cost twice; name each once")
    return tuple(costs)


def price(trial: Trial, cost: str) -> float:
    """A cost of a trial; infinite where it is not known."""
    found = trial.cost[cost]
    return math.inf if found is None else found


def compose_front(
    objective: Objective,
    trials: Sequence[Trial],
    winner: Trial,
    network: Network,
    inputs: Sequence[str],
    costs: Sequence[str] = (),
) -> list[Member]:
    """Lists the float network, the uniform 8, 6 and 4-bit policies, and the measured front by falling first cost.

    The front is every policy that no other beats in its drop and all of the costs, with the winner. Uniform policies
    give every layer `intN` weights, and inputs of the same width where the space has them, else of the widest it has.

    Args:
        objective: Knows the primary cost.
        trials: Everything tried.
        winner: The trial that won.
        network: The layers.
        inputs: Input formats of the space.
        costs: The costs that the front is about beside quality; none stands for the primary cost.

    Raises:
        ConfigError: If a cost is not known.
    """
    costs = front_costs(objective, costs)
    members = [Member("float", "float", Policy.uniform(network, FLOAT_PRECISION))]
    formats = sorted((Format.parse(name) for name in inputs), key=lambda format: format.bits)
    for bits in UNIFORM_BITS:
        input_ = next((format for format in formats if format.bits == bits), formats[-1])
        precision = Precision(Format(bits), input_)
        members.append(Member("uniform", f"uniform {precision}", Policy.uniform(network, precision)))
    kept = [trial for trial in measured_front(trials, costs) if trial.number != winner.number]
    for trial in sorted([*kept, winner], key=lambda trial: -price(trial, costs[0])):
        role: Role = "winner" if trial.number == winner.number else "front"
        members.append(Member(role, f"trial {trial.number}", trial.policy, trial))
    return members


def measured_front(trials: Sequence[Trial], costs: Sequence[str]) -> list[Trial]:
    """The trials, measured in full, that no other beats in its drop and all of these costs."""
    whole = [trial for trial in trials if trial.is_whole]
    points = np.array([[*(price(trial, cost) for cost in costs), trial.drop] for trial in whole], dtype=float)
    best = non_dominated(points.reshape(len(whole), len(costs) + 1), [False] * (len(costs) + 1))
    return [trial for trial, is_best in zip(whole, best, strict=True) if is_best]


def front_table(rows: Sequence[tuple[Member, Quality]], objective: Objective, budget: Budget) -> pd.DataFrame:
    """Builds front.csv: one row per member, costs in SI units, quality from the report split."""
    import pandas as pd

    table = []
    reference = objective.pricing.reference("float")
    for member, quality in rows:
        costs = objective.pricing.costs(member.policy)
        table.append(
            {
                "role": member.role,
                "name": member.name,
                "trial": member.trial.number if member.trial else None,
                "digest": member.policy.digest,
                "quality": quality.value,
                "drop": quality.drop,
                "drop_low": quality.drop_low,
                "drop_high": quality.drop_high,
                "samples": quality.samples,
                "selection_quality": member.trial.quality if member.trial else None,
                "predicted_loss": member.trial.metrics.get("predicted") if member.trial else None,
                **costs,
                "size_ratio": costs["weight_bytes"] / reference["weight_bytes"],
                "latency_ratio": costs["latency_s"] / reference["latency_s"] if reference["latency_s"] else math.nan,
                "verdict": verdict(costs, quality, objective.limits, budget.quality_drop),
                "policy": json.dumps(member.policy.to_dict()),
            }
        )
    return pd.DataFrame(table).astype({"trial": "Int64"})


def verdict(
    costs: Mapping[str, float], quality: Quality, limits: Mapping[str, float], quality_drop: float | None
) -> Verdict:
    """Says whether a budget is kept: costs are held against limits, the drop's whole 95% interval against its own.

    `undecided` means that the interval reaches to both sides of the limit, or that there is no interval.
    """
    if not all(costs[name] <= limit for name, limit in limits.items()):  # what is not known keeps nothing
        return "missed"
    if quality_drop is None or quality.drop_high <= quality_drop:
        return "met"
    return "missed" if quality.drop_low > quality_drop else "undecided"


def rank_correlation(trials: Sequence[Trial]) -> float | None:
    """Spearman's correlation of predicted loss and measured drop; None for fewer than five trials, or all alike."""
    known = [t for t in trials if t.is_whole and t.metrics.get("predicted") is not None]
    predicted, drops = [t.metrics["predicted"] for t in known], [t.drop for t in known]
    found = _correlations(np.array(predicted, dtype=float), np.array(drops))
    return found["spearman"] if found else None


def rank_correlations(objective: Objective, trials: Sequence[Trial]) -> dict[str, dict[str, float]]:
    """Spearman's and Kendall's correlation of every predictor's forecasts with measured drops, by predictor.

    Empty where no sensitivities were scored; a predictor is left out where `rank_correlation` would be None.
    """
    known = [trial for trial in trials if trial.is_whole]
    if not objective.is_scored or not known:
        return {}
    space, table = objective.space, objective.sensitivity
    at = np.stack([positions(space, space.encode(trial.policy)) for trial in known])
    drops = np.array([trial.drop for trial in known])
    found = {name: _correlations(table.predict(at, name), drops) for name in table.predictors}
    return {name: correlations for name, correlations in found.items() if correlations}


def _correlations(predicted: np.ndarray, drops: np.ndarray) -> dict[str, float] | None:
    """Both rank correlations; None for fewer than five values, or all alike."""
    from scipy.stats import kendalltau, spearmanr

    if len(drops) < 5 or len(set(predicted)) == 1 or len(set(drops)) == 1:
        return None
    return {
        "spearman": float(spearmanr(predicted, drops).statistic),
        "kendall": float(kendalltau(predicted, drops).statistic),
    }
