"""The tables of the report: every number formatted, with the number itself wherever rows are sorted by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from hwmodels import Format
from search.figures import style
from search.plan import MeasuredQuality, Plan
from search.report.course import Course, particulars
from search.report.plan_diff import LAYER_COSTS, Change
from search.units import COST_NAMES, NONE, interval, quantity, significant

if TYPE_CHECKING:
    import pandas as pd

Cell = str | tuple[str, float | str]
"""What is shown, alone or with what rows are sorted by; empty there for what is not known."""

Rows = list[list[Cell]]


def cost_cell(name: str, value: float | None) -> Cell:
    """A cost in the unit that fits, sorted by its number of SI units."""
    return quantity(name, value), "" if value is None or math.isnan(value) else float(value)


def more_cell(name: str, value: float) -> Cell:
    """How much more a cost is, with its sign; a dash where it is not known."""
    if math.isnan(value):
        return NONE, ""
    return f"{'+' if value > 0 else ''}{quantity(name, value)}" if value else "0", value


def winner_rows(plan: Plan) -> list[list[str]]:
    """The winner's numbers: name, value, the float network's value."""
    rows = [
        [
            f"{q.metric} on the {q.split} split ({q.samples:,} sample{'s'[: q.samples > 1]})",
            f"{q.value:.6g}",
            f"{q.float_value:.6g}",
        ]
        for q in (plan.quality, plan.selection)
    ]
    rows.insert(1, ["drop on the report split [95% interval]", drop_text(plan.quality), ""])
    rows.append(["drop on the selection split [95% interval]", drop_text(plan.selection), ""])
    rows.append(["average weight bits", f"{plan.average_weight_bits:.4f}", "32"])
    rows.append(["effective weight bits, scales counted", f"{plan.effective_bits:.4f}", "32"])
    for name, cost in plan.cost.items():
        value = quantity(name, cost.value, 4)
        if name.endswith("_bytes") and cost.value is not None:
            value += f" ({cost.value:,.0f} B)"
        if cost.low is not None:
            value += f" [{quantity(name, cost.low)}, {quantity(name, cost.high)}; 80%]"
        if cost.value is not None and cost.reference:
            value += f", {significant(cost.value / cost.reference)}× float"
        rows.append([f"{COST_NAMES[name]} ({cost.tier})", value, quantity(name, cost.reference, 4)])
    return rows


def drop_text(quality: MeasuredQuality, decimals: int = 6) -> str:
    """The drop of a measured quality with its interval."""
    return interval(quality.drop, quality.drop_low, quality.drop_high, signed=True, decimals=decimals)


def front_rows(front: pd.DataFrame) -> Rows:
    """The rows of front.csv, formatted."""
    return [
        [
            row["name"],
            row["verdict"],
            row["digest"],
            f"{row['quality']:.4f}",
            (NONE, "")
            if row["role"] == "float"
            else (interval(row["drop"], row["drop_low"], row["drop_high"], signed=True), row["drop"]),
            f"{row['average_weight_bits']:.2f}",
            f"{row['effective_bits']:.2f}",
            f"{row['weight_bytes']:,.0f}",
            f"{row['size_ratio']:.4f}",
            *(cost_cell(name, row[name]) for name in ("latency_s", "energy_j", "activation_bytes", "bit_ops")),
            significant(row["selection_quality"], 4),
            significant(row["predicted_loss"]),
        ]
        for row in front.to_dict("records")
    ]


def layer_rows(plan: Plan, layers: list[dict[str, Any]]) -> Rows:
    """The winner layer by layer, formatted."""
    kinds = {layer["name"]: style.layer_kind(layer) for layer in layers}
    counts = {layer["name"]: layer["weight_count"] for layer in layers}
    return [
        [
            layer.name,
            kinds[layer.name],
            format_cell(layer.weight),
            format_cell(layer.input),
            f"{counts[layer.name]:,}",
            f"{layer.weight_bytes:,.0f}",
            *(cost_cell(name, getattr(layer, name)) for name in ("bit_ops", "latency_s", "energy_j")),
            layer.compute or NONE,
            layer.support or NONE,
            layer.bound or NONE,
            layer.tier or NONE,
        ]
        for layer in plan.layers
    ]


def identity_rows(about: Mapping[str, Any], plan: Plan) -> list[list[str]]:
    """Where the run came from: times, versions, fingerprints."""
    correlation = about["rank_correlation"]
    rows = {
        "run": about["run_id"],
        "plan": plan.digest,
        "status": about["status"],
        "started": time_text(about.get("started")),
        "finished": time_text(about.get("finished")),
        "seconds": significant(about.get("seconds")),
        "evaluations": f"{about['evaluations']:,.6g}",
        "rank correlation of predicted loss and measured drop": "not available"
        if correlation is None
        else f"{correlation:.3f}",
        "Spearman, Kendall of every predictor": "; ".join(
            f"{name} {found['spearman']:.2f}, {found['kendall']:.2f}"
            for name, found in about.get("rank_correlations", {}).items()
        )
        or "not available",
        "repair of every choice": plan.quantizer["repair"],
        "predicted optimum at the budget, proved": "; ".join(
            f"{name} {'exact' if not found['gap'] else 'to ' + format(found['gap'], '.1%')}"
            for name, found in about.get("proofs", {}).items()
        )
        or "not available",
        "seed": str(about["seed"]),
        "model": about["model"]["name"],
        "model fingerprint": about["model"]["fingerprint"],
        "data fingerprint": about["data_fingerprint"],
        "workload": ", ".join(f"{name} {value}" for name, value in plan.workload.items()),
        "costs": plan.cost_source,
        "git commit": about["git_commit"] or NONE,
        **about["versions"],
    }
    return [[name, str(value)] for name, value in rows.items()]


def time_text(seconds: float | None) -> str:
    """A moment, given in seconds since 1970; a dash for none."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if seconds else NONE


def format_cell(name: str) -> Cell:
    """A format, sorted by its bits."""
    return name, Format.parse(name).bits


def change_rows(changes: Sequence[Change]) -> Rows:
    """The rows of a plan diff."""
    return [
        [
            change.layer,
            format_cell(str(change.before.weight)),
            format_cell(str(change.after.weight)),
            format_cell(str(change.before.input)),
            format_cell(str(change.after.input)),
            *(more_cell(name, change.costs[name]) for name in LAYER_COSTS),
        ]
        for change in changes
    ]


def versus_rows(uniform: Mapping[Any, Any], winner: Mapping[Any, Any], metric: str) -> Rows:
    """The winner beside a uniform baseline, both rows of front.csv: what, the one's, the other's, the difference."""
    rows: Rows = [[f"{metric} on the report split"], ["drop from float [95% interval]"]]
    for row in (uniform, winner):
        rows[0].append(f"{row['quality']:.4f}")
        rows[1].append(interval(row["drop"], row["drop_low"], row["drop_high"], signed=True))
    rows[0].append(interval(winner["quality"] - uniform["quality"], None, None, signed=True))
    rows[1].append(interval(winner["drop"] - uniform["drop"], None, None, signed=True))
    for name, words in COST_NAMES.items():
        old, new = float(uniform[name]), float(winner[name])
        if math.isfinite(new):
            share = f" ({new / old - 1:+.1%})".replace("-", "−") if old else ""
            more = "the same" if new == old else f"{more_cell(name, new - old)[0]}{share}"
            rows.append([words, quantity(name, old, 4), quantity(name, new, 4), more])
    return rows


def event_rows(course: Course) -> Rows:
    """What happened in a run beside its stages and trials."""
    return [
        [
            (time_text(event["time"]), event["time"]),
            str(event["event"]),
            f"{event['host']} {event['process']}",
            particulars(event),
        ]
        for event in course.events
    ]


def stage_rows(course: Course) -> Rows:
    """How long each stage took, and its share of all."""
    total = sum(course.seconds.values()) or 1.0
    return [
        [name, (significant(seconds), seconds), f"{seconds / total:.0%}"] for name, seconds in course.seconds.items()
    ]
