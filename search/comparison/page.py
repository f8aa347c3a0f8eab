"""The page that compares searches: its table in HTML, and everything else as data that its script draws."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.comparison.data import FILTERS, filter_values, page_data, report_link
from search.comparison.gather import gather
from search.comparison.groups import Entry, sort_runs
from search.errors import DataError
from search.files import write_text
from search.pages import HERE, render
from search.plan import Plan
from search.rundir import RunDirectory
from search.units import COST_NAMES, NONE, interval, quantity, significant

if TYPE_CHECKING:
    from markupsafe import Markup

AXES = ("weight_bytes", "latency_s", "energy_j", "average_weight_bits", "effective_bits", "bit_ops", "activation_bytes")
"""Costs that the fronts can be drawn over, in the order of the choice."""

SCRIPTS = ("numbers", "figures", "growth", "difference", "page")

COLUMNS = (
    *("run", "task", "device", "strategy", "seed", "budget", "verdict", "quality", "drop [95% interval]", "bits"),
    *("size", "latency", "energy", "evaluations", "seconds", "hypervolume", "status"),
)
TEXTS = 4
"""Leading columns that are text."""


@dataclass(frozen=True)
class Comparison:
    """What was compared.

    Attributes:
        page: Where the page is.
        entries: The runs on it.
        notes: What a reader must know of runs that are not whole.
        copies: How many directories held copies of runs.
    """

    page: Path
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    copies: int


def write_comparison(directories: Sequence[RunDirectory], out: Path | None = None) -> Comparison:
    """Writes a page that compares runs.

    Args:
        directories: The runs.
        out: The page; by default `compare.html` in the folder that holds them all.

    Raises:
        DataError: If none of the runs can be read.
        FileError: If the page cannot be written.
    """
    found = gather(directories)
    if not found.runs:
        raise DataError("; ".join(["there is nothing to compare", *found.notes]))
    path = out or Path(os.path.commonpath([run.path.resolve().parent for run in found.runs])) / "compare.html"
    entries = sort_runs(found.runs)
    notes = (*(note for entry in entries for note in run_notes(entry)), *found.notes)
    page = render("compare", **page_values(entries, notes, found.copies, path.resolve().parent))
    return Comparison(write_text(path, page), tuple(entries), notes, found.copies)


def run_notes(entry: Entry) -> list[str]:
    """What a reader must know of a run that is not whole."""
    run, notes = entry.run, []
    if run.status != "finished":
        what = {"running": "is still running", "interrupted": "was interrupted"}.get(run.status, run.status)
        because = f": {run.reason}" if run.reason else ""
        plan = "; the plan shown is that of an earlier search there" if run.plan else ""
        notes.append(f"{entry.name} {what}{because}{plan}")
    return [*notes, *(f"{entry.name}: {problem}" for problem in run.problems)]


def page_values(entries: Sequence[Entry], notes: Sequence[str], copies: int, folder: Path) -> dict[str, Any]:
    """What the template shows; links are relative to `folder`."""
    from markupsafe import Markup

    places = {
        group: list(dict.fromkeys(e.place for e in entries if e.group == group))
        for group in _distinct(entries, "group")
    }
    return {
        "summary": _summary(entries),
        "notes": notes,
        "copies": copies,
        "filters": _filters(entries),
        "axes": [(cost, COST_NAMES[cost]) for cost in _axes(entries)],
        "axis": _usual_axis(entries),
        "columns": COLUMNS,
        "texts": TEXTS,
        "rows": [_row(entry, folder) for entry in entries],
        "roles": ["winner" if entry.is_best else "" for entry in entries],
        "tasks": [(group, _about(entries, group), there) for group, there in places.items()],
        "data": Markup(page_data(entries, folder)),
        "style": Markup((HERE / "compare.css").read_text(encoding="utf-8")),
        "code": Markup("\n".join((HERE / f"compare_{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)),
    }


def _distinct(entries: Iterable[Entry], field: str) -> list[str]:
    return list(dict.fromkeys(getattr(entry, field) for entry in entries))


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'s'[: number != 1]}"


def _summary(entries: Sequence[Entry]) -> str:
    """What is compared, in one sentence."""
    runs = [entry.run for entry in entries]
    strategies = {run.strategy for run in runs}
    counts = [
        _counted(len({entry.group for entry in entries}), "task"),
        _counted(len({run.hardware for run in runs}), "device"),
        f"{len(strategies)} strateg{'y' if len(strategies) == 1 else 'ies'}",
        _counted(len({run.seed for run in runs}), "seed"),
        _counted(len({entry.budget for entry in entries}), "budget"),
    ]
    finished = sum(run.status == "finished" for run in runs)
    whole = "" if finished == len(runs) else f"; {finished} of {len(runs)} finished"
    return f"{', '.join(counts)}{whole}."


def _about(entries: Sequence[Entry], group: str) -> str:
    """The metric of a group and what the float network reaches, in words."""
    runs = [entry.run for entry in entries if entry.group == group]
    known = [run.plan.quality.float_value for run in runs if run.plan]
    better = "" if runs[0].higher_is_better else ", lower is better"
    if not known:
        return f"Metric: {runs[0].metric}{better}"
    low, high = min(known), max(known)
    reached = f"{low:.4f}" if low == high else f"{low:.4f} to {high:.4f}"
    return f"Metric: {runs[0].metric}{better}; the float network has {reached} on the report split"


def _filters(entries: Sequence[Entry]) -> list[tuple[str, str, list[tuple[str, int]]]]:
    """For each dimension in which runs differ: its key, its name, and its values with the number of their runs."""
    found = []
    for key, name in FILTERS.items():
        values = [filter_values(entry)[key] for entry in entries]
        distinct = sorted(
            set(values), key=lambda value: (not value.isdigit(), int(value) if value.isdigit() else 0, value)
        )
        if len(distinct) > 1:
            found.append((key, name, [(value, values.count(value)) for value in distinct]))
    return found


def _axes(entries: Sequence[Entry]) -> list[str]:
    """The costs that some front knows."""
    known = {cost for entry in entries for point in entry.run.front for cost in point.costs}
    return [cost for cost in AXES if cost in known]


def _usual_axis(entries: Sequence[Entry]) -> str:
    """The cost that most budgets are about."""
    costs, primary = _axes(entries), [entry.run.primary_cost for entry in entries]
    return max(costs, key=primary.count, default="")


def _row(entry: Entry, folder: Path) -> list[Any]:
    """A row of the table of runs: strings, or pairs of what is shown and the number to sort by."""
    run, plan = entry.run, entry.run.plan
    row: list[Any] = [_link(entry, folder), entry.group, entry.place, entry.arm, str(run.seed), entry.budget]
    if plan is None:
        row += ["no plan", *[NONE] * 6]
    else:
        quality = plan.quality
        row += [
            plan.budget.verdict,
            (f"{quality.value:.4f}", quality.value),
            (interval(quality.drop, quality.drop_low, quality.drop_high, signed=True), quality.drop),
            (f"{plan.average_weight_bits:.2f}", plan.average_weight_bits),
            *(_priced(plan, cost) for cost in ("weight_bytes", "latency_s", "energy_j")),
        ]
    evaluations, seconds, volume = run.evaluations, run.seconds, run.hypervolume
    return [
        *row,
        NONE if evaluations is None else (f"{evaluations:g}", evaluations),
        NONE if seconds is None else (significant(seconds), seconds),
        NONE if volume is None else (f"{volume:.4f}{_of(run.primary_cost)}", volume),
        run.status,
    ]


def _link(entry: Entry, folder: Path) -> str | Markup:
    """A run's name, leading to its report where there is one."""
    from markupsafe import Markup

    href = report_link(entry.run, folder)
    return Markup('<a href="{}">{}</a>').format(href, entry.name) if href else entry.name


def _of(cost: str) -> str:
    """The name of the cost that a hypervolume is about, in brackets; nothing where it is not known."""
    return f" ({COST_NAMES[cost]})" if cost else ""


def _priced(plan: Plan, cost: str) -> str | tuple[str, float]:
    """A cost with its tier, unless it is exact."""
    found = plan.cost.get(cost)
    if found is None or found.value is None:
        return NONE
    tier = "" if found.tier == "exact" else f" ({found.tier})"
    return f"{quantity(cost, found.value)}{tier}", found.value
