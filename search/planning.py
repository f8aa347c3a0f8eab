"""Writes down what a search found: the plan, and the run's identity."""

from __future__ import annotations

import hashlib
import math
import platform
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hwmodels import CostReport
from hwmodels.compare import knows_error, latency_interval
from search.front import verdict
from search.job import Job
from search.objective import Objective
from search.plan import (
    MeasuredQuality,
    ModelRecord,
    Plan,
    PlannedBudget,
    PlannedCost,
    PlannedLayer,
    PlannedRepair,
    TensorFile,
    fingerprint,
    pack,
    plan_tensors,
    tensor_digests,
)
from search.policy import Policy
from search.pricing import Pricing
from search.quality.evaluate import Evaluator, Quality
from search.quantize.fold import Fold, apply_folds
from search.recover import Gain
from search.rundir import UNRELATED

PACKAGES = ("bitplan", "torch", "numpy", "scipy", "optuna")


DETOURS = {
    "storage": "compute in {}: fewer bits make the file smaller, and no operation quicker",
    "fallback": "have no kernel of their own and fall back to {}",
}
"""How a device runs what it has no kernel for, in words."""


def make_plan(
    job: Job,
    objective: Objective,
    evaluator: Evaluator,
    policy: Policy,
    qualities: Mapping[str, Quality],
    folded: tuple[tuple[str, str], ...] = (),
    gains: Sequence[Gain] = (),
    confirmed: CostReport | None = None,
    dropped: Sequence[str] = (),
) -> Plan:
    """Writes the plan of a policy.

    Args:
        job: The settings.
        objective: Prices and limits.
        evaluator: Gives the float network's quality, and the simulated network as repaired.
        policy: What won.
        qualities: Its quality on the `selection` and the `report` split.
        folded: Layer and batch norm of every fold.
        gains: What repairs gained.
        confirmed: What the cost model's oracle makes of the policy; None where it has none.
        dropped: What of the space the device could not run, in words.
    """
    folds = tuple(Fold(*names) for names in folded)
    altered = evaluator.simulated.altered(apply_folds(job.task.model, folds), policy)
    pricing = objective.pricing
    report = confirmed or pricing.report(policy)
    costs = pricing.costs(policy) | asdict(report.total)
    tensors = plan_tensors(evaluator.simulated, policy, altered)
    digests = tensor_digests(job.task.model)
    measured = {
        split: _measured(job, split, quality, evaluator.float_quality(split).value)  # type: ignore[arg-type]
        for split, quality in qualities.items()
    }
    plan = Plan(
        schema="bitplan/1",
        digest=policy.digest,
        task=job.task.name,
        model=ModelRecord(
            name=type(job.task.model).__name__, fingerprint=fingerprint(job.task.model), folded=tuple(folded)
        ),
        data_fingerprint=job.task.fingerprint,
        hardware=job.cost_model.name,
        workload={name: value for name, value in asdict(job.workload).items() if value is not None},
        strategy=job.strategy.name,
        seed=job.seed,
        quantizer=asdict(job.quantizer),
        recover=tuple(PlannedRepair(repair=g.repair, before=g.before, after=g.after, kept=g.kept) for g in gains),
        space=asdict(job.space),
        budget=PlannedBudget(
            limits=job.budget.given(),
            reference=job.budget.reference,
            verdict=verdict(costs, qualities["report"], objective.limits, job.budget.quality_drop),
        ),
        average_weight_bits=costs["average_weight_bits"],
        effective_bits=costs["effective_bits"],
        cost=_planned_costs(pricing, report),
        cost_source=report.source,
        cautions=(*report.warnings, *dropped, *_detours(report, policy), *_slower(pricing, report)),
        quality=measured["report"],
        selection=measured["selection"],
        layers=_planned_layers(pricing, policy, report),
        points=evaluator.simulated.points,
        versions={"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        config={key: value for key, value in job.config.items() if key not in UNRELATED},
        tensors=TensorFile(file="plan.safetensors", sha256=hashlib.sha256(pack(tensors, digests)).hexdigest()),
    )
    return plan.with_tensors(tensors, digests)


def _planned_costs(pricing: Pricing, report: CostReport) -> dict[str, PlannedCost]:
    reference = pricing.reference("float")
    ends: dict[str, tuple[float, float]] = {}
    if knows_error(report):
        low, high = latency_interval(report)
        if low < high:
            ends["latency_s"] = low, high
    return {
        name: PlannedCost(
            value=_or_none(value),
            reference=_or_none(reference[name]),
            tier=report.tiers.get(name, "unknown"),
            low=ends.get(name, (None, None))[0],
            high=ends.get(name, (None, None))[1],
        )
        for name, value in asdict(report.total).items()
    }


def _detours(report: CostReport, policy: Policy) -> list[str]:
    """Which layers the device runs otherwise than their formats say, in words."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, layer in report.layers.items():
        if layer.support in DETOURS:
            found[layer.support, layer.compute].append(name)
    return [
        f"{', '.join(names) if len(names) <= 3 else f'{len(names)} layers'} "
        f"({', '.join(dict.fromkeys(str(policy[name]) for name in names))}) {DETOURS[support].format(compute)}"
        for (support, compute), names in found.items()
    ]


def _slower(pricing: Pricing, report: CostReport) -> list[str]:
    """Says so where the float network would be quicker."""
    float_s, own_s = pricing.reference("float")["latency_s"], report.total.latency_s
    if not own_s > float_s:
        return []
    return [f"it is predicted to take {own_s / float_s:.2f} times as long as the float network"]


def _planned_layers(pricing: Pricing, policy: Policy, report: CostReport) -> tuple[PlannedLayer, ...]:
    return tuple(
        PlannedLayer(
            name=layer.name,
            kind=layer.kind,
            weight=str(policy[layer.name].weight),
            input=str(policy[layer.name].input),
            weight_shape=layer.weight_shape,
            channel_axis=layer.channel_axis,
            quantizes_input=layer.quantizes_input,
            reads=layer.reads,
            groups=layer.groups,
            compute=report.layers[layer.name].compute,
            support=report.layers[layer.name].support,
            bound=report.layers[layer.name].bound,
            tier=report.layers[layer.name].tier,
            latency_s=_or_none(report.layers[layer.name].cost.latency_s),
            energy_j=_or_none(report.layers[layer.name].cost.energy_j),
            weight_bytes=report.layers[layer.name].cost.weight_bytes,
            bit_ops=report.layers[layer.name].cost.bit_ops,
        )
        for layer in pricing.network
    )


def _measured(job: Job, split: str, quality: Quality, float_value: float) -> MeasuredQuality:
    return MeasuredQuality(
        split=split,
        metric=job.task.metric,
        higher_is_better=job.task.higher_is_better,
        value=quality.value,
        float_value=float_value,
        samples=quality.samples,
        drop=quality.drop,
        drop_low=_or_none(quality.drop_low),
        drop_high=_or_none(quality.drop_high),
    )


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def identity(job: Job) -> dict[str, Any]:
    """What run.json says about a run from its start."""
    task = job.task
    return {
        "task": task.name,
        "hardware": job.cost_model.name,
        "strategy": job.strategy.name,
        "seed": job.seed,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "has_interval": task.per_sample,
        "model": {"name": type(task.model).__name__, "fingerprint": fingerprint(task.model)},
        "data_fingerprint": task.fingerprint,
        "budget": job.budget.given(),
        "budget_reference": job.budget.reference,
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def git_commit() -> str | None:
    """The commit checked out in the current folder; None outside a repository or without git."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, cwd=Path.cwd())
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
