"""What the page of a comparison draws, as data for its script."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hwmodels import Format
from search.comparison.gather import FrontPoint, Growth, Run
from search.comparison.groups import Entry
from search.figures import style
from search.plan import Plan
from search.units import COST_NAMES, COST_UNITS

PARTS = ("weight_bytes", "latency_s", "energy_j", "bit_ops")
"""Costs of layers, which add up to the network's together with what belongs to no layer."""

DIGITS = 7
"""Significant digits of curves on the page, so that those of many long searches take little room."""

FILTERS = {
    "task": "Task",
    "device": "Device",
    "strategy": "Strategy",
    "budget": "Budget",
    "seed": "Seed",
    "status": "Status",
    "verdict": "Verdict",
}
"""What runs can be filtered by."""


def filter_values(entry: Entry) -> dict[str, str]:
    """What a run is, in every dimension of `FILTERS`."""
    return {
        "task": entry.group,
        "device": entry.place,
        "strategy": entry.arm,
        "budget": entry.budget,
        "seed": str(entry.run.seed),
        "status": entry.run.status,
        "verdict": entry.run.plan.budget.verdict if entry.run.plan else "no plan",
    }


def report_link(run: Run, folder: Path) -> str | None:
    """Where a run's report is, seen from a folder; None where there is none."""
    report = run.path / "report.html"
    return quote(Path(os.path.relpath(report.resolve(), folder)).as_posix()) if report.is_file() else None


def page_data(entries: Sequence[Entry], folder: Path) -> str:
    """What the page's script draws, as JSON that can stand in a script element; links are relative to `folder`."""
    networks: dict[tuple[tuple[str, str], ...], int] = {}
    runs = [_run_data(entry, networks, folder) for entry in entries]
    kinds = [kind for network in networks for _, kind in network]
    found = {
        "costs": {
            cost: {"name": name, "units": [list(unit) for unit in COST_UNITS[cost]]}
            for cost, name in COST_NAMES.items()
        },
        "parts": list(PARTS),
        "arms": _arms(entries),
        "kinds": style.colours(kinds, style.KIND_COLOURS),
        "rest": style.REST,
        "networks": [
            {
                "names": [name for name, _ in network],
                "short": style.short_names([name for name, _ in network]),
                "kinds": [kind for _, kind in network],
            }
            for network in networks
        ],
        "runs": runs,
    }
    return _as_json(found)


def _arms(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The arms, with the number of their strategy, and their number among the arms of that strategy."""
    strategies = sorted({entry.run.strategy for entry in entries})
    arms = sorted({(entry.run.strategy, entry.arm) for entry in entries})
    firsts = {strategy: next(i for i, arm in enumerate(arms) if arm[0] == strategy) for strategy in strategies}
    return [
        {"name": name, "strategy": strategies.index(strategy), "variant": place - firsts[strategy]}
        for place, (strategy, name) in enumerate(arms)
    ]


def _run_data(entry: Entry, networks: dict[tuple[tuple[str, str], ...], int], folder: Path) -> dict[str, Any]:
    run, plan = entry.run, entry.run.plan
    return {
        "name": entry.name,
        "path": str(run.path),
        "report": report_link(run, folder),
        "id": run.run_id,
        "rank": entry.rank,
        "best": entry.is_best,
        "reason": run.reason,
        "metric": run.metric,
        "higher": run.higher_is_better,
        "evaluations": run.evaluations,
        "seconds": run.seconds,
        "hypervolume": run.hypervolume,
        "primary": run.primary_cost,
        "filter": filter_values(entry),
        "limits": run.limits,
        "drop_limit": run.drop_limit,
        "loss": run.loss_kind,
        "ended": run.status == "finished",
        "front": [_point_data(point) for point in run.front],
        "growth": growth_data(run.growth) if run.growth else None,
        "plan": _plan_data(plan, run.kinds, networks) if plan else None,
    }


def _point_data(point: FrontPoint) -> dict[str, Any]:
    return {
        "role": point.role,
        "name": point.name,
        "digest": point.digest,
        "quality": point.quality,
        "low": point.low,
        "high": point.high,
        "costs": point.costs,
    }


def growth_data(growth: Growth) -> dict[str, Any]:
    """How a search went, at the trials after which something was better, the first, and the last."""
    rows = list(zip(growth.evaluations, growth.seconds, growth.best_loss, growth.hypervolume, strict=True))
    values = [tuple("" if math.isnan(value) else value for value in row[2:]) for row in rows]
    kept = [i for i in range(len(rows)) if i in (0, len(rows) - 1) or values[i] != values[i - 1]]
    names = ("evaluations", "seconds", "best_loss", "hypervolume")
    return {name: [float(f"{rows[i][place]:.{DIGITS}g}") for i in kept] for place, name in enumerate(names)}


def _plan_data(
    plan: Plan, kinds: Mapping[str, str], networks: dict[tuple[tuple[str, str], ...], int]
) -> dict[str, Any]:
    network = tuple((layer.name, kinds.get(layer.name, layer.kind)) for layer in plan.layers)
    formats = {name: Format.parse(name) for layer in plan.layers for name in (layer.weight, layer.input)}
    quality = plan.quality
    return {
        "digest": plan.digest,
        "network": networks.setdefault(network, len(networks)),
        "weights": [layer.weight for layer in plan.layers],
        "inputs": [layer.input if layer.quantizes_input else None for layer in plan.layers],
        "bits": {name: None if format.is_float else format.bits for name, format in formats.items()},
        "parts": {cost: [getattr(layer, cost) for layer in plan.layers] for cost in PARTS},
        "totals": {cost: found.value for cost, found in plan.cost.items()}
        | {"average_weight_bits": plan.average_weight_bits, "effective_bits": plan.effective_bits},
        "tiers": {cost: found.tier for cost, found in plan.cost.items()},
        "quality": quality.value,
        "drop": quality.drop,
        "drop_low": quality.drop_low,
        "drop_high": quality.drop_high,
        "float": quality.float_value,
    }


def _as_json(value: Any) -> str:
    """JSON for a script element: what is no number becomes null, and nothing in it ends the element."""
    text = json.dumps(_finite(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
