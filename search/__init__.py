"""bitplan: finds how many bits every layer of a trained network deserves.

    plan = search.find_plan(model, example_input, calibration, evaluate, budget={"size_ratio": 0.14})
    quantized = plan.apply(model)
    search.export(plan, "onnxruntime", model, "out/", example_input=example_input)

Names are imported when first used, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.api import export, find_plan, verify
    from search.errors import BitplanError
    from search.plan import Plan
    from search.strategies.base import Strategy
    from search.tasks.task import Task

__all__ = ["BitplanError", "Plan", "Strategy", "Task", "export", "find_plan", "verify"]

_HOMES = {
    "BitplanError": "search.errors",
    "Plan": "search.plan",
    "Strategy": "search.strategies.base",
    "Task": "search.tasks.task",
    "export": "search.api",
    "find_plan": "search.api",
    "verify": "search.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'search' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
