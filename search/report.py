"""The report: what a run found as one page that opens anywhere, written from the run directory alone."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.errors import DataError
from search.figures import style
from search.figures.bits import allocation_info, draw_allocation, draw_members, members_info
from search.figures.convergence import convergence_info, draw_convergence
from search.figures.front import FrontInfo, draw_front, front_infos
from search.figures.interactive import plot_front
from search.figures.layer_costs import draw_layer_costs, layer_costs_info
from search.figures.sensitivity import draw_sensitivity, sensitivity_info
from search.files import replacing, write_text
from search.pages import render
from search.plan import MeasuredQuality, Plan
from search.rundir import RunDirectory, flat
from search.units import COST_NAMES, NONE, interval, quantity, significant

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup
    from matplotlib.figure import Figure

LOW_CORRELATION = 0.5
LIMIT_COSTS = {
    "size_ratio": "size",
    "latency_ratio": "latency",
    "energy_ratio": "energy",
    "bit_ops_ratio": "bit operations",
}

Rows = list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A figure as the page shows it.

    Attributes:
        source: The PNG as a data URL.
        width: Pixels across.
    """

    source: str
    width: int


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
    planes = front_infos(front, run.trials(), about)
    history = run.table("history.csv")
    pictures = {}
    for name, figure in _figures(run, plan, front, planes, history):
        image = style.png(figure)
        with replacing(run.file(f"figures/{name}.png")) as aside:
            aside.write_bytes(image)
        source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        pictures[name] = Picture(source, round(figure.get_figwidth() * style.PIXELS_PER_INCH))

    page = render(
        "report",
        about=about,
        plan=plan,
        pictures=pictures,
        planes=planes,
        interactive=_interactive(planes),
        notes=notes(about, plan),
        winner=winner_rows(plan),
        budget=budget_text(plan),
        drop=_drop(plan.quality, 4),
        size=quantity("weight_bytes", plan.cost["weight_bytes"].value),
        costs=[COST_NAMES[plane.cost] for plane in planes],
        hypervolume=final_hypervolume(history),
        members=front_rows(front),
        roles=list(front["role"]),
        layers=layer_rows(plan, run.layers()),
        configuration=[[key, str(value)] for key, value in flat(about["config"]).items()],
        identity=identity_rows(about, plan),
    )
    return write_text(run.file("report.html"), page)


def _figures(
    run: RunDirectory,
    plan: Plan,
    front: pd.DataFrame,
    planes: Sequence[FrontInfo],
    history: pd.DataFrame | None,
) -> Iterator[tuple[str, Figure]]:
    """Draws every figure of a run, by the name of its file."""
    layers, about = run.layers(), run.info()
    yield "front", draw_front(planes)
    yield "allocation", draw_allocation(allocation_info(plan, layers))
    yield "members", draw_members(members_info(front, layers, [plane.cost for plane in planes]))
    table = run.table("sensitivity.parquet")
    scores = None if table is None else sensitivity_info(table, plan)
    if scores:
        yield "sensitivity", draw_sensitivity(scores)
    yield "layer_costs", draw_layer_costs(layer_costs_info(plan))
    convergence = convergence_info(run.trials(), about, plan.selection.float_value, history)
    yield "convergence", draw_convergence(convergence)


def _interactive(planes: Sequence[FrontInfo]) -> Markup:
    from markupsafe import Markup

    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
    figure = plot_front(planes)
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=config, div_id="front-plot"))


def final_hypervolume(history: pd.DataFrame | None) -> float | None:
    """How much the front covers in the end; None where the run does not say."""
    known = [] if history is None else history["hypervolume"].dropna().tolist()
    return known[-1] if known else None


def budget_text(plan: Plan) -> str:
    """The budget in words, such as `size at most 0.14 of float`."""

    def limit(name: str, value: float) -> str:
        if name in LIMIT_COSTS:
            return f"{LIMIT_COSTS[name]} at most {value:g} of {plan.budget.reference}"
        if name in COST_NAMES:
            return f"{COST_NAMES[name]} at most {quantity(name, value)}"
        return f"drop of quality at most {value:g}"

    return ", ".join(limit(name, value) for name, value in plan.budget.limits.items()) or "no limit"


def notes(about: Mapping[str, Any], plan: Plan) -> list[str]:
    """What a reader must know to read the numbers right."""
    found = []
    if about["status"] == "failed" or about["status"] == "interrupted":
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


def winner_rows(plan: Plan) -> Rows:
    """The winner's numbers: name, value, the float network's value."""
    rows = [
        [
            f"{q.metric} on the {q.split} split ({q.samples:,} sample{'s'[: q.samples > 1]})",
            f"{q.value:.6g}",
            f"{q.float_value:.6g}",
        ]
        for q in (plan.quality, plan.selection)
    ]
    rows.insert(1, ["drop on the report split [95% interval]", _drop(plan.quality), ""])
    rows.append(["drop on the selection split [95% interval]", _drop(plan.selection), ""])
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


def _drop(quality: MeasuredQuality, decimals: int = 6) -> str:
    return interval(quality.drop, quality.drop_low, quality.drop_high, signed=True, decimals=decimals)


def front_rows(front: pd.DataFrame) -> Rows:
    """The rows of front.csv, formatted."""
    return [
        [
            row["name"],
            row["verdict"],
            row["digest"],
            f"{row['quality']:.4f}",
            NONE if row["role"] == "float" else interval(row["drop"], row["drop_low"], row["drop_high"], signed=True),
            f"{row['average_weight_bits']:.2f}",
            f"{row['effective_bits']:.2f}",
            f"{row['weight_bytes']:,.0f}",
            f"{row['size_ratio']:.4f}",
            quantity("latency_s", row["latency_s"]),
            quantity("energy_j", row["energy_j"]),
            quantity("activation_bytes", row["activation_bytes"]),
            quantity("bit_ops", row["bit_ops"]),
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
            layer.weight,
            layer.input,
            f"{counts[layer.name]:,}",
            f"{layer.weight_bytes:,.0f}",
            quantity("bit_ops", layer.bit_ops),
            quantity("latency_s", layer.latency_s),
            quantity("energy_j", layer.energy_j),
            layer.compute or NONE,
            layer.support or NONE,
            layer.bound or NONE,
            layer.tier or NONE,
        ]
        for layer in plan.layers
    ]


def identity_rows(about: Mapping[str, Any], plan: Plan) -> Rows:
    """Where the run came from: times, versions, fingerprints."""
    correlation = about["rank_correlation"]
    rows = {
        "run": about["run_id"],
        "plan": plan.digest,
        "status": about["status"],
        "started": _time(about.get("started")),
        "finished": _time(about.get("finished")),
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


def _time(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if seconds else NONE
