"""What really runs where a backend alters a plan: its own quality and cost, since they are what the user gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from hwmodels import CostModel, Precision, Workload, at_workload
from search.plan import Plan
from search.policy import Policy
from search.quality.evaluate import Evaluator, Quality
from search.quantize.fold import fold_batch_norm
from search.quantize.simulate import QuantizedModel
from search.tasks.task import Task
from search.trace import trace


@dataclass(frozen=True)
class Realized:
    """The policy that runs, simulated and priced.

    Attributes:
        policy: The precisions that run.
        quality: Measured on the report split, in simulation.
        cost: Every cost in SI units; empty where the plan's hardware is not known or cannot run the policy.
    """

    policy: Policy
    quality: Quality
    cost: Mapping[str, float]


def simulate(plan: Plan, task: Task, policy: Mapping[str, Precision]) -> QuantizedModel:
    """Returns the plan's network, calibrated for a policy that may differ from the plan's, with that policy applied.

    What the plan has ranges for keeps them.
    """
    simulated = plan.simulate(task.model)
    if any(precision != plan.policy[name] for name, precision in policy.items()):
        known = plan.ranges
        simulated.calibrate([task.inputs(batch) for batch in task.batches("calibration")])
        simulated.ranges.inputs.update(known.inputs)
        simulated.ranges.tensors.update(known.tensors)
    simulated.apply(policy)
    return simulated


def realize(plan: Plan, task: Task, policy: Policy, cost_model: CostModel | None = None) -> Realized:
    """Measures and prices the policy that a backend runs in place of the plan's."""
    simulated = simulate(plan, task, policy)
    quality = Evaluator(task, simulated).measure(policy, "report")
    return Realized(policy, quality, _costs(plan, task, policy, cost_model))


def _costs(plan: Plan, task: Task, policy: Policy, cost_model: CostModel | None) -> dict[str, float]:
    if cost_model is None:
        return {}
    workload = Workload(**plan.workload)  # type: ignore[arg-type]
    traced = trace(fold_batch_norm(task.model, task.example_input).model, task.example_input)
    network = at_workload(traced, workload)
    if any(cost_model.refusal(network[name], precision) for name, precision in policy.items()):
        return {}
    return {name: value for name, value in asdict(cost_model.network_cost(network, policy, workload).total).items()}
