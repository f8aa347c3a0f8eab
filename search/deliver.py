"""Exporting as the commands do it: written, printed, and measured where what runs is not the plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hwmodels import CostModel
from search.backends.base import Backend
from search.backends.realize import realize
from search.plan import Plan
from search.tasks.task import Task
from search.terminal import print_export, print_realized

if TYPE_CHECKING:
    from rich.console import Console


def deliver(
    backend: Backend,
    plan: Plan,
    task: Task,
    folder: Path,
    cost_model: CostModel | None,
    console: Console,
    recalibrate: bool = False,
    strict: bool = False,
) -> None:
    """Writes a plan for a backend and says what became of it.

    Args:
        backend: Whom for.
        plan: What.
        task: The plan's.
        folder: Where to.
        cost_model: Prices what runs in place of the plan; None where that is not known.
        console: Where to print.
        recalibrate: Whether the backend finds ranges of its own.
        strict: Whether to refuse what it alters or leaves in float.
    """
    report = backend.export(plan, task, folder, recalibrate, strict)
    print_export(report, console)
    if report.policy != plan.policy:
        print_realized(plan, realize(plan, task, report.policy, cost_model), backend.name, console)
