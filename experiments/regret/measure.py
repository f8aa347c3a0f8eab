"""Regret: how far are plans from the best there is, after how many evaluations?

    python experiments/regret/measure.py [--repair none|bias|batch_norm] [--seeds 20]

Every strategy searches at 3, 3.5, 4 and 5 average weight bits with 10, 20 and 40 evaluations. "0 evaluations" is what
it would measure first, so the plan it proposes unmeasured. Qualities come from the table that truth.py wrote, so that
many seeds cost no model run; choices are scored once, on the calibration split. Regret is the accuracy of the best
policy within the budget minus that of the best policy measured, in percentage points, both on the selection split.

Writes regret_NETWORK_REPAIR.csv, one row per run, and the figure; prints the table of the README.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from contenders import CONTENDERS, found
from figure import draw, summary
from table import TableEvaluator, Truth, code, identity, path_of, policies_of
from units import NETWORKS, make_bench

from search.errors import DataError
from search.files import write_text
from search.sensitivity.scoring import score_space
from search.sensitivity.settings import SensitivitySettings

HERE = Path(__file__).parent
BUDGETS = (3.0, 3.5, 4.0, 5.0)
EVALUATIONS = (0, 10, 20, 40)
SCORED = SensitivitySettings(scores=["kl", "fisher_diagonal"], interactions=["forward", "backward"])


def runs(network: str, repair: str, seeds: int) -> pd.DataFrame:
    """One row per strategy, budget, number of evaluations and seed."""
    bench, truth = make_bench(network, repair), Truth.load(path_of(network, repair))
    about = identity(bench)
    if about != {name: truth.about[name] for name in about}:
        raise DataError(f"{path_of(network, repair)} is of another network, data or settings; measure it anew")
    table = score_space(bench.task, bench.simulated, bench.space, SCORED, HERE / "runs" / f"{network}_{repair}")
    evaluator = TableEvaluator(bench, truth)
    bits = {key: policy.average_weight_bits(bench.network) for key, policy in policies_of(bench).items()}
    rows: list[dict[str, Any]] = []
    for budget in BUDGETS:
        within = [key for key, average in bits.items() if average <= budget]
        best = truth.accuracy[within].max()
        print(f"{budget} bits: {len(within)} policies, the best at {best:.2%}", flush=True)
        for name, contender in CONTENDERS.items():
            started = time.perf_counter()
            for evaluations in EVALUATIONS:
                for seed in range(seeds if contender.seeded else 1):
                    strategy = contender.make(max(evaluations, 1))
                    key = code(found(bench, evaluator, table, strategy, budget, seed), about["units"])
                    row = {"strategy": name, "budget": budget, "evaluations": evaluations, "seed": seed, "plan": key}
                    regret, divergence = 100 * (best - truth.accuracy[key]), truth.divergence[key]
                    rows.append({**row, "regret": round(regret, 4), "divergence": divergence})
            print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--repair", default="none", help="the table's")
    parser.add_argument("--seeds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = f"regret_{options.network}_{options.repair}"
    table = runs(options.network, options.repair, options.seeds)
    write_text(HERE / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
    draw(table, HERE / f"{name}.png")
    print(summary(table))


if __name__ == "__main__":
    main()
