"""The sentences and headline numbers of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from search.plan import Plan
from search.report.plan_diff import Change
from search.units import COST_NAMES, quantity, significant

if TYPE_CHECKING:
    import pandas as pd

LOW_CORRELATION = 0.5


def facts(plan: Plan) -> list[tuple[str, str]]:
    """The few numbers that matter: what each is, and the number."""
    quality = plan.quality
    found = [
        (f"{quality.metric}, float {quality.float_value:.4f}", f"{quality.value:.4f}"),
        ("average weight bits", f"{plan.average_weight_bits:.2f}"),
    ]
    for name in ("weight_bytes", "latency_s", "energy_j"):
        cost = plan.cost[name]
        if cost.value is not None:
            times = f", {significant(cost.value / cost.reference)}× float" if cost.reference else ""
            found.append((COST_NAMES[name] + times, quantity(name, cost.value)))
    return found


def final_hypervolume(history: pd.DataFrame | None) -> float | None:
    """How much the front covers in the end; None where the run does not say."""
    known = [] if history is None else history["hypervolume"].dropna().tolist()
    return known[-1] if known else None


def notes(about: Mapping[str, Any], plan: Plan) -> list[str]:
    """What a reader must know to read the numbers right."""
    found = []
    if about["status"] in ("failed", "interrupted") and not about.get("stopped"):
        found.append(f"The last search in this directory was {about['status']}; the plan is that of an earlier one.")
    if plan.budget.verdict == "undecided":
        found.append("Undecided: the interval of the quality's drop reaches to both sides of what the budget allows.")
    if not about["has_interval"]:
        found.append("The task gives one number per evaluation, so drops have no interval.")
    correlation = about["rank_correlation"]
    if correlation is not None and correlation < LOW_CORRELATION:
        found.append(
            f"The rank correlation of predicted losses with measured drops is low ({correlation:.2f}). "
            "Trust the measurements, not the prediction."
        )
    found += [
        f"{step.repair} took the drop on the selection split from {step.before:+.4f} to {step.after:+.4f}"
        + (", and was kept: the winner's table counts it." if step.kept else ", and was not kept.")
        for step in plan.recover
    ]
    return [*found, *(f"Mind: {caution}." for caution in plan.cautions)]


def versus_words(
    uniform: Mapping[Any, Any], winner: Mapping[Any, Any], changes: Sequence[Change], about: Mapping[str, Any]
) -> list[str]:
    """Says against which uniform baseline the winner is held, and what it does differently.

    Args:
        uniform: The baseline's row of front.csv.
        winner: The winner's row.
        changes: The plan diff from the one to the other.
        about: What run.json says.
    """
    name, cost = uniform["name"], about["primary_cost"]
    if uniform["verdict"] == "met":
        first = f"The best uniform plan that keeps the budget is {name}."
    else:
        surely = "surely " if uniform["verdict"] == "undecided" else ""
        first = f"No uniform plan {surely}keeps the budget; the nearest to it is {name}."
    better = (winner["quality"] - uniform["quality"]) * (1 if about["higher_is_better"] else -1)
    word = "better" if better > 0 else "worse"
    judged = f"{abs(better):.4f} {word} in {about['metric']}" if better else f"the same in {about['metric']}"
    share = winner[cost] / uniform[cost] - 1 if uniform[cost] else 0.0
    costs = f"{abs(share):.1%} {'less' if share < 0 else 'more'}" if share else "as much"
    second = f"On the report split the winner is {judged}, at {costs} {COST_NAMES[cost]}."
    more = sum(change.weight_bits > 0 for change in changes)
    fewer = sum(change.weight_bits < 0 for change in changes)
    third = (
        f"It treats {len(changes)} of {len(winner['policy'])} layers differently: {more} with more weight bits, "
        f"{fewer} with fewer, {len(changes) - more - fewer} with the same weight bits and another input or format."
    )
    return [first, f"{second} {third}"]
