"""From a plan back to the task and the device it was made for."""

from __future__ import annotations

from collections.abc import Sequence

from hwmodels import CostModel
from search.config import build, named_hardware
from search.errors import ConfigError
from search.plan import Plan
from search.pricing import placed
from search.tasks.task import Task


def planned_task(plan: Plan, overrides: Sequence[str]) -> Task:
    """Builds the task a plan was made for, from the configuration it carries.

    Raises:
        ConfigError: If the plan was made from Python, or an override is not about the task.
        DataError: If the task's model is not the plan's.
    """
    from omegaconf import OmegaConf

    node = plan.config.get("task")
    if not node:
        raise ConfigError("this plan was made from Python and names no task; use search.export and search.verify there")
    for override in overrides:
        if not override.startswith("task.") or "=" not in override:
            raise ConfigError(f"{override!r} is no task setting; allowed: task.KEY=VALUE")
    merged = OmegaConf.merge(OmegaConf.create({"task": node}), OmegaConf.from_dotlist(list(overrides)))
    task: Task = build(merged.task, Task, "task")
    plan.check(task.model)
    return task


def planned_hardware(plan: Plan) -> CostModel | None:
    """Builds the cost model a plan was priced with; None where the plan does not say enough of it."""
    from omegaconf import OmegaConf

    node = plan.config.get("hardware")
    if not node:
        return None
    found = named_hardware(node) if isinstance(node, str) else build(OmegaConf.create(node), CostModel, "hardware")
    return placed(found, plan.quantizer["placement"])
