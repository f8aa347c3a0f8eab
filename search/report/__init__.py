"""The report: what a run found as one page that opens anywhere, written from the run directory alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.budget import budget_words
from search.errors import DataError
from search.events import EventLog
from search.figures import style, words
from search.figures.bits import AllocationInfo, allocation_info, draw_allocation, draw_members, members_info
from search.figures.convergence import ConvergenceInfo, convergence_info, draw_convergence
from search.figures.front import FrontInfo, draw_front, front_infos
from search.figures.interactive import plot_convergence, plot_front
from search.figures.layer_costs import draw_layer_costs, layer_costs_info
from search.figures.sensitivity import draw_sensitivity, sensitivity_info
from search.files import replacing, write_text
from search.pages import Picture, inline, render
from search.plan import Plan
from search.report import tables
from search.report.course import read_course
from search.report.plan_diff import best_uniform, plan_diff
from search.report.sentences import facts, final_hypervolume, notes, versus_words
from search.rundir import RunDirectory, flat
from search.storages import hidden
from search.units import COST_NAMES, quantity

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SECTIONS = {
    "winner": "The winner",
    "front": "Front",
    "uniform": "Against the best uniform plan",
    "layers": "Layers of the winner",
    "sensitivities": "Sensitivities",
    "convergence": "Convergence",
    "course": "How the run went",
    "configuration": "Configuration",
    "origin": "Origin",
}


@dataclass(frozen=True)
class Versus:
    """The winner against the best uniform baseline, as the page shows it.

    Attributes:
        name: What to call the baseline.
        sentences: What there is to say.
        totals: Rows of both plans' numbers.
        changes: Rows of the plan diff.
    """

    name: str
    sentences: list[str]
    totals: tables.Rows
    changes: tables.Rows


def write_report(run: RunDirectory) -> Path:
    """Writes `report.html` and `figures/*.png` from a run directory's files; returns the page's path.

    Raises:
        DataError: If the run has no plan yet.
    """
    about, plan, front = run.info(), run.plan(), run.table("front.csv")
    if plan is None or front is None or "limits" not in about:
        raise DataError(
            f"{run.path} holds no finished search to report on; repeat its command with run_dir={run.path} to finish it"
        )
    history, layers = run.table("history.csv"), run.layers()
    planes = front_infos(front, run.trials(), about)
    allocation = allocation_info(plan, layers)
    convergence = convergence_info(run.trials(), about, plan.selection.float_value, history)
    pictures = {}
    for name, figure, alt in _figures(run, plan, front, planes, allocation, convergence):
        with replacing(run.file(f"figures/{name}.png")) as aside:
            aside.write_bytes(style.png(figure))
        pictures[name] = Picture.of(figure, name, alt)
    course = read_course(EventLog(run.file("log.jsonl")).read())

    page = render(
        "report",
        sections=[(key, name) for key, name in SECTIONS.items() if key != "course" or course],
        about=about,
        plan=plan,
        pictures=pictures,
        planes=planes,
        front_plot=inline(plot_front(planes), "front-plot"),
        convergence_plot=inline(plot_convergence(convergence), "convergence-plot"),
        has_intensity=any(allocation.intensity),
        facts=facts(plan),
        notes=notes(about, plan),
        winner=tables.winner_rows(plan),
        budget=budget_words(plan.budget.limits, plan.budget.reference),
        drop=tables.drop_text(plan.quality, 4),
        size=quantity("weight_bytes", plan.cost["weight_bytes"].value),
        costs=[COST_NAMES[plane.cost] for plane in planes],
        hypervolume=final_hypervolume(history),
        members=tables.front_rows(front),
        roles=list(front["role"]),
        versus=versus_uniform(front, about, run.table("costs.parquet")),
        layers=tables.layer_rows(plan, layers),
        course=course,
        stages=tables.stage_rows(course) if course else [],
        events=tables.event_rows(course) if course else [],
        configuration=[[key, hidden(str(value))] for key, value in flat(about["config"]).items()],
        identity=tables.identity_rows(about, plan),
    )
    return write_text(run.file("report.html"), page)


def _figures(
    run: RunDirectory,
    plan: Plan,
    front: pd.DataFrame,
    planes: Sequence[FrontInfo],
    allocation: AllocationInfo,
    convergence: ConvergenceInfo,
) -> Iterator[tuple[str, Figure, str]]:
    """Draws every figure of a run: the name of its file, the figure, and what it shows in words."""
    yield "front", draw_front(planes), words.front_words(planes)
    yield "allocation", draw_allocation(allocation), words.allocation_words(allocation)
    members = members_info(front, run.layers(), [plane.cost for plane in planes])
    yield "members", draw_members(members), words.members_words(members)
    table = run.table("sensitivity.parquet")
    scores = None if table is None else sensitivity_info(table, plan)
    if scores:
        yield "sensitivity", draw_sensitivity(scores), words.sensitivity_words(scores)
    costs = layer_costs_info(plan)
    yield "layer_costs", draw_layer_costs(costs), words.layer_costs_words(costs)
    yield "convergence", draw_convergence(convergence), words.convergence_words(convergence)


def versus_uniform(front: pd.DataFrame, about: Mapping[str, Any], costs: pd.DataFrame | None) -> Versus:
    """Holds the winner against the best uniform baseline.

    Args:
        front: The table front.csv.
        about: What run.json says.
        costs: The table costs.parquet; None where there is none.
    """
    uniform = best_uniform(front, about)
    winner = next(row for row in front.to_dict("records") if row["role"] == "winner")
    winner["policy"] = json.loads(winner["policy"])
    changes = plan_diff(uniform["policy"], winner["policy"], costs)
    return Versus(
        name=uniform["name"],
        sentences=versus_words(uniform, winner, changes, about),
        totals=tables.versus_rows(uniform, winner, about["metric"]),
        changes=tables.change_rows(changes),
    )
