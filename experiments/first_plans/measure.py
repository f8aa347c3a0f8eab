"""What does searching buy over uniform precisions?

    python experiments/first_plans/measure.py [TASK ...]      # digits, resnet20, mobilenetv2; default: all

For each task: float, uniform weights at 8, 6 and 4 bits, and the plans found at 4 and 3 average weight bits
(MobileNetV2: 4), with and without bias correction where it helped on the selection split; 8-bit inputs throughout. All
are measured on the report split with the paired drop's 95% interval. Writes plans.csv, plans.png and the plans' bits;
runs are kept in runs/ and resumed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from hwmodels import Roofline
from search.budget import Budget
from search.figures.bits import allocation_info, draw_allocation
from search.front import UNIFORM_BITS
from search.job import Job, RecoverSettings, SpaceSettings
from search.progress import LineProgress
from search.run import search
from search.strategies.solver import Solver
from search.tasks.digits import Digits
from search.tasks.fashion_mnist import FashionMNIST
from search.tasks.task import Task

HERE = Path(__file__).parent
# Task, evaluations, budgets. MobileNetV2 gets one: its depthwise layers are slow on CPUs.
TASKS: dict[str, tuple[Callable[[], Task], int, tuple[int, ...]]] = {
    "digits": (Digits, 40, (4, 3)),
    "resnet20": (lambda: FashionMNIST("resnet20"), 24, (4, 3)),
    "mobilenetv2": (lambda: FashionMNIST("mobilenetv2"), 24, (4,)),
}
COLUMNS = [
    "task",
    "plan",
    "average_weight_bits",
    "effective_bits",
    "quality",
    "drop",
    "drop_low",
    "drop_high",
    "samples",
]


def rows_of(task: Task, evaluations: int, budgets: Sequence[int]) -> pd.DataFrame:
    """Searches every budget and collects the rows of interest: the winner as searched, and as repaired."""
    found: list[dict[str, Any]] = []
    for bits in budgets:
        job = Job(
            task=task,
            cost_model=Roofline("zen5"),
            strategy=Solver(evaluations),
            budget=Budget(average_weight_bits=bits),
            space=SpaceSettings(input=["uint8"]),
            recover=RecoverSettings(steps=["batch_norm"]),
            run_dir=HERE / "runs" / task.name / f"{bits}_bits",
            config={"bits": bits, "evaluations": evaluations, "recover": ["batch_norm"]},
        )
        result = search(job, LineProgress(Console(width=140)))
        front = result.front.assign(plan=result.front["name"])
        if not found:
            wanted = ["float", *(f"uniform int{width}/uint8" for width in UNIFORM_BITS)]
            found += front[front["name"].isin(wanted)].to_dict("records")
        winner = front[front["role"] == "winner"].assign(plan=f"plan at {bits} bits").to_dict("records")[0]
        found.append(winner)
        if any(step.kept for step in result.plan.recover):
            repaired = result.plan.quality.model_dump()
            found.append({**winner, "plan": f"plan at {bits} bits, repaired", **repaired, "quality": repaired["value"]})
        info = allocation_info(result.plan, result.run.layers())
        draw_allocation(info).savefig(HERE / f"{task.name}_{bits}_bits.png", dpi=110, metadata={"Software": None})
    return pd.DataFrame(found).assign(task=task.name)[COLUMNS]


def draw(table: pd.DataFrame, path: Path) -> None:
    """Draws the drop of every plan with its interval, one panel per task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(table["task"]))
    figure = Figure(figsize=(4.2 * len(names), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        rows = table[(table["task"] == name) & (table["plan"] != "float")]
        for place, row in enumerate(rows.to_dict("records")):
            colour = "#0072B2" if row["plan"].startswith("plan") else "#999999"
            low, drop, high = (100 * row[key] for key in ("drop_low", "drop", "drop_high"))
            axis.errorbar(drop, place, xerr=[[drop - low], [high - drop]], fmt="o", color=colour, capsize=3)
        places = range(len(rows))
        axis.set_yticks(places, rows["plan"])
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel("drop (points)")
        axis.set_title(name.removeprefix("fashion_mnist_"), fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measures the tasks named on the command line."""
    chosen = [TASKS[name] for name in sys.argv[1:] or TASKS]
    tables = [rows_of(make(), evaluations, budgets) for make, evaluations, budgets in chosen]
    measured = {name for table in tables for name in table["task"]}
    earlier = pd.read_csv(HERE / "plans.csv")
    table = pd.concat([*tables, earlier[~earlier["task"].isin(measured)]])
    table.to_csv(HERE / "plans.csv", index=False, float_format="%.6g")
    draw(table, HERE / "plans.png")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
