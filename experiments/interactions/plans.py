"""What are the plans worth that each predictor's solver proposes?

    python experiments/interactions/plans.py resnet20 [--repair none|bias|batch_norm] [--predictors kl forward ...]

Weights from {int2, int4, int8}, inputs uint8, at 2.5 to 5 average weight bits. Every predictor is given to
strategy=auto as the only one it may use, with 10 and 40 true evaluations on the first samples of the selection split;
"0 evaluations" is the plan it would measure first. `auto` may use all predictors. Plans of other tools come from
external/*.json. All plans are judged on the report split, by the drop against float with its paired 95% interval;
`repaired` is the same plan after `recover=batch_norm`. `first` is the metric on the report split's first 2,000 samples,
which `own`, what a tool measured in its own simulation, refers to.

Adds rows to plans_NETWORK.csv, or replaces them. Measurements are kept in runs/, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from kept import KeptEvaluator
from networks import NARROW, NETWORKS, RUNS, Bench, make_bench
from predictors import PREDICTORS, score

from hwmodels import Precision
from search.budget import Budget
from search.config import build, compose
from search.errors import BitplanError
from search.files import write_text
from search.objective import Objective, SpentError
from search.policy import Policy
from search.pricing import Pricing
from search.sensitivity.settings import AUTO
from search.sensitivity.table import SensitivityTable
from search.shortlist import best_trial
from search.strategies.base import Strategy
from search.trials import Trial

HERE = Path(__file__).parent
BUDGETS = (2.5, 3.0, 3.5, 4.0, 5.0)
EVALUATIONS = (0, 10, 40)
KEY = ["network", "repair", "source", "budget", "evaluations"]


@dataclass
class MemoryLog:
    """Trials of a search that nobody resumes; what they measured is kept elsewhere."""

    trials: list[Trial] = field(default_factory=list)

    def append(self, trial: Trial) -> None:
        self.trials.append(trial)


def searched(pricing: Pricing, evaluator: KeptEvaluator, table: SensitivityTable, bits: float, count: int) -> Policy:
    """The best plan within a budget of average weight bits after so many evaluations; 0 counts none, but makes one."""
    config = compose(["strategy=auto", f"strategy.evaluations={max(count, 1)}"])
    strategy: Strategy = build(config.strategy, Strategy, "strategy")
    limits, log = Budget(average_weight_bits=bits).limits(pricing.reference("float")), MemoryLog()
    objective = Objective(
        evaluator,
        pricing,
        limits,
        log,  # type: ignore[arg-type]
        strategy,
        lambda: table,
        primary_cost="average_weight_bits",
    )
    with suppress(SpentError):
        strategy.search(pricing.space, objective, np.random.default_rng(0))
    return best_trial(objective, log.trials).policy


def our_plans(
    bench: Bench, evaluator: KeptEvaluator, predictors: list[str], evaluations: list[int]
) -> Iterator[tuple[dict[str, Any], Policy]]:
    """Yields what each plan is called, and the plan."""
    space = bench.space(NARROW)
    pricing, scores = bench.pricing(space), score(bench, space, RUNS / f"plans_{bench.label}")
    for bits in BUDGETS:
        for predictor in predictors:
            table = replace(scores.table, predictor=predictor)
            for count in evaluations:
                policy = searched(pricing, evaluator, table, bits, count)
                yield {"source": predictor, "budget": bits, "evaluations": count}, policy


def other_plans(bench: Bench) -> Iterator[tuple[dict[str, Any], Policy]]:
    """Yields the plans of other tools, with what they measured themselves."""
    for path in sorted((HERE / "external").glob("*.json")):
        found = json.loads(path.read_text())
        if found["task"] == bench.task.name:
            for plan in found["plans"]:
                name = {"source": f"{found['tool']}, {plan['variant']}", "budget": plan["budget"]}
                yield name | {"own": plan["accuracy"]}, policy_of(bench, plan["weight_bits"])


def policy_of(bench: Bench, weight_bits: Mapping[str, int]) -> Policy:
    """The policy of a tool's weight bits.

    Raises:
        BitplanError: If they are not about the layers of our network.
    """
    if set(weight_bits) != set(bench.network.names):
        raise BitplanError(
            f"a tool's plan is about other layers: {sorted(set(weight_bits) ^ set(bench.network.names))}"
        )
    return Policy({layer: Precision.parse(f"int{bits}/uint8") for layer, bits in weight_bits.items()})


def judged(bench: Bench, evaluator: KeptEvaluator, policy: Policy) -> dict[str, Any]:
    """The plan on the report split, as it is and repaired."""
    plain, repaired = evaluator.report(policy), evaluator.report(policy, "batch_norm")
    bits = policy.average_weight_bits(bench.network)
    row = {"weight_bits": bits, **plain, **{f"repaired_{name}": value for name, value in repaired.items()}}
    return row | {"digest": policy.digest}


def line(row: Mapping[str, Any]) -> str:
    """A row in a few words."""
    spent = f"{row['evaluations']} evaluations" if "evaluations" in row else "as given"
    found = f"{row['quality']:.4f}, repaired {row['repaired_quality']:.4f}"
    return f"{row['budget']} bits, {row['source']}, {spent}: {row['weight_bits']:.2f} bits, {found}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--repair", default="none", help="what applying a choice repairs: none, bias or batch_norm")
    parser.add_argument("--predictors", nargs="+", default=[AUTO, *PREDICTORS], choices=[AUTO, *PREDICTORS])
    parser.add_argument("--evaluations", nargs="+", type=int, default=EVALUATIONS)
    parser.add_argument("--samples", type=int, default=2000, help="of the selection split, for evaluations")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = make_bench(options.network, options.repair)
    evaluator = KeptEvaluator(bench, RUNS / f"plans_{bench.label}", options.samples)
    rows: list[dict[str, Any]] = []
    for name, policy in (*our_plans(bench, evaluator, options.predictors, options.evaluations), *other_plans(bench)):
        rows.append({"network": bench.name, "repair": options.repair, **name, **judged(bench, evaluator, policy)})
        print(line(rows[-1]), flush=True)
    path = HERE / f"plans_{bench.name}.csv"
    earlier = [pd.read_csv(path)] if path.is_file() else []
    table = pd.concat([*earlier, pd.DataFrame(rows)]).drop_duplicates(KEY, keep="last")
    write_text(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


if __name__ == "__main__":
    main()
