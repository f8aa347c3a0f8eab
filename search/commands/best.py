"""The command `bitplan best`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from search.budget import Budget
    from search.tracking.best import Found, Question

HELP = "the best plan that MLflow knows for a task, a device and a budget"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `best`."""
    parser.add_argument("--task", required=True, help="name of the task, such as digits")
    parser.add_argument("--hardware", required=True, help="name of the device, such as zen5")
    parser.add_argument(
        "--budget",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="limits, such as size_ratio=0.1 latency_s=0.001 quality_drop=0.01; ratios are against the float model",
    )
    parser.add_argument(
        "--metric",
        help="rank by the least of this; default: selection_drop, the drop on the split that searches choose by, or "
        "the cost where quality_drop is limited",
    )
    parser.add_argument("--model", default="", help="only plans of the network whose fingerprint begins like this")
    parser.add_argument("--data", default="", help="only plans on the data whose fingerprint begins like this")
    parser.add_argument("--all", type=int, default=5, metavar="N", help="list up to N plans; default: 5")
    parser.add_argument("--winners", action="store_true", help="only plans that searches chose and wrote as files")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the best plan there, its tensors beside it")
    parser.add_argument(
        "--uri", help="MLflow's tracking URI; default: $MLFLOW_TRACKING_URI, else mlflow.db in the root"
    )
    parser.add_argument("--root", type=Path, default=Path("runs"), help="the run root; default: runs")


def run(arguments: argparse.Namespace, console: Console) -> None:
    """Asks MLflow for the best plans within a budget, prints them, and writes the best where that is asked for."""
    from search.errors import ConfigError
    from search.tracking.best import Question, fetch_plan, find_best
    from search.tracking.store import tracking_uri

    if arguments.all < 1:
        raise ConfigError(f"--all {arguments.all} must be at least 1")
    if arguments.out is not None and arguments.out.is_dir():
        raise ConfigError(f"--out {arguments.out} is a folder; name the file, such as {arguments.out / 'plan.json'}")
    uri = tracking_uri(arguments.uri, arguments.root)
    question = Question(
        *(arguments.task, arguments.hardware, read_budget(arguments.budget)),
        *(arguments.metric, arguments.winners, arguments.model, arguments.data),
    )
    found = find_best(question, uri, arguments.root)
    console.print(best_table(found[: arguments.all], question))
    best = found[0]
    said = [f"ranked by {question.order[0]}; quality and drop are those of the report split"]
    said += [f"best: trial {best.tags['trial']} of {best.run_dir} (model {best.model_id})"]
    if arguments.out is not None:
        plan = fetch_plan(best, uri, arguments.out)
        said.append(f"wrote {arguments.out} (plan {plan.digest})")
    elif best.is_winner:
        said.append(f"plan: {best.plan_file or f'in MLflow, {best.artifacts}; fetch it with --out plan.json'}")
    else:
        said.append(f"only winners are files; {best.substitutes}")
    console.print("\n".join(said), highlight=False, soft_wrap=True, markup=False)


def read_budget(limits: Sequence[str]) -> Budget:
    """Reads limits such as `size_ratio=0.1`.

    Raises:
        ConfigError: If one is unknown, no number, or given twice.
    """
    from search.budget import Budget
    from search.errors import ConfigError
    from search.job import settings

    given: dict[str, float] = {}
    for limit in limits:
        name, _, value = limit.partition("=")
        name = name.removeprefix("budget.")
        if name == "reference":
            raise ConfigError("--budget reference= is no limit; ratios are against the float model")
        if name in given:
            raise ConfigError(f"--budget gives {name} twice; give each limit once")
        try:
            given[name] = float(value)
        except ValueError:
            raise ConfigError(f"--budget {limit} must be KEY=NUMBER, such as size_ratio=0.1") from None
    return settings(Budget, given, "budget")


def best_table(found: Sequence[Found], question: Question) -> Table:
    """The plans, best first; a column for every cost that the budget limits beside bits, size and latency."""
    from search.budget import RATIOS, budget_words
    from search.terminal import plain_table
    from search.units import COST_NAMES, NONE, interval, quantity, significant

    costs = dict.fromkeys(["weight_bytes", "latency_s", *question.limits, *question.order])
    apart = ("selection_drop", "drop", "certain_drop", "average_weight_bits")  # have columns of their own
    further = [cost for cost in costs if cost not in apart]
    metric = found[0].tags.get("metric", "quality")
    headers = [COST_NAMES.get(cost, cost.replace("_", " ")) for cost in further]
    limits = budget_words(question.budget.given(), question.budget.reference)
    workloads = dict.fromkeys(plan.tags.get("workload", "") for plan in found)
    alike = len(workloads) == 1
    table = plain_table(
        f"{question.task} on {question.hardware}{f' ({next(iter(workloads))})' * alike}, {limits}",
        [
            *("", "strategy", *["workload"] * (not alike), "seed", "selection drop"),
            *(metric, "drop vs float [95%]", "bits", *headers, "plan"),
        ],
        left=2 if alike else 3,
    )
    for number, plan in enumerate(found, 1):
        values, tags = plan.values, plan.tags
        chosen = values.get("selection_drop")
        drop = interval(values["drop"], values.get("drop_low"), values.get("drop_high"), signed=True)
        shown = [
            significant(values.get(cost)) if cost in RATIOS else quantity(cost, values.get(cost)) for cost in further
        ]
        table.add_row(
            *(str(number), tags["strategy"], *[tags.get("workload", "")] * (not alike), tags["seed"]),
            *(
                NONE if chosen is None else f"{chosen:+.4f}".replace("-", "−"),
                f"{values['quality']:.4f}",
                drop,
                f"{values['average_weight_bits']:.2f}",
                *shown,
            ),
            f"{tags['digest']}{' (winner)' if plan.is_winner else ''}",
            style="bold" if number == 1 else "",
        )
    return table
