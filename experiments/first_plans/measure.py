"""What does searching buy over uniform precisions?

    python experiments/first_plans/measure.py [TASK ...]      # digits, resnet20, mobilenetv2; default: all

For each task: float, uniform int8/uint8 and int4/uint8, and the plans found at 4 and 3 average weight bits with 8-bit
inputs, all on the report split with the paired drop's 95% interval. Writes plans.csv and plans.png; runs are kept in
runs/ and resumed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from hwmodels import Roofline
from search.budget import Budget
from search.front import UNIFORM_BITS
from search.job import Job, SpaceSettings
from search.progress import LineProgress
from search.run import search
from search.strategies.solver import Solver
from search.tasks.digits import Digits
from search.tasks.fashion_mnist import FashionMNIST
from search.tasks.task import Task

HERE = Path(__file__).parent
TASKS = {
    "digits": Digits,
    "resnet20": lambda: FashionMNIST("resnet20"),
    "mobilenetv2": lambda: FashionMNIST("mobilenetv2"),
}
BUDGETS = (4, 3)
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


def rows_of(task: Task, evaluations: int) -> pd.DataFrame:
    """Searches both budgets and collects the rows of interest from their fronts."""
    found = []
    for bits in BUDGETS:
        for recover in ((), ("bias_correction",)):
            name = f"{bits} bits" + (", bias corrected" if recover else "")
            job = Job(
                task=task,
                cost_model=Roofline("zen5"),
                strategy=Solver(evaluations),
                budget=Budget(average_weight_bits=bits),
                space=SpaceSettings(input=["uint8"]),
                recover=recover,
                run_dir=HERE / "runs" / task.name / name.replace(" ", "_").replace(",", ""),
                config={"bits": bits, "evaluations": evaluations, "recover": list(recover)},
            )
            from rich.console import Console

            result = search(job, LineProgress(Console(width=140)))
            front = result.front
            if not found:
                wanted = ["float", *(f"uniform int{b}/uint8" for b in UNIFORM_BITS)]
                found += front[front["name"].isin(wanted)].assign(plan=front["name"]).to_dict("records")
            quality = result.plan.quality
            found.append(
                {
                    "plan": f"plan at {name}",
                    "average_weight_bits": result.plan.average_weight_bits,
                    "effective_bits": result.plan.effective_bits,
                    "quality": quality.value,
                    "drop": quality.drop,
                    "drop_low": quality.drop_low,
                    "drop_high": quality.drop_high,
                    "samples": quality.samples,
                }
            )
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
        drops = 100 * rows[["drop", "drop_low", "drop_high"]]
        spread = [drops["drop"] - drops["drop_low"], drops["drop_high"] - drops["drop"]]
        colours = ["#0072B2" if plan.startswith("plan") else "#999999" for plan in rows["plan"]]
        places = range(len(rows))
        axis.errorbar(drops["drop"], places, xerr=spread, fmt="none", ecolor=colours, capsize=3)
        axis.scatter(drops["drop"], places, color=colours, zorder=3)
        axis.set_yticks(places, rows["plan"])
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"{name}: drop in points")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measures the tasks named on the command line."""
    tables = [rows_of(TASKS[name](), evaluations=40 if name == "digits" else 24) for name in sys.argv[1:] or TASKS]
    table = pd.concat(tables)
    table.to_csv(HERE / "plans.csv", index=False, float_format="%.6g")
    draw(table, HERE / "plans.png")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
