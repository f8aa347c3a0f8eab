"""Every strategy on HAQ's own latency table of MobileNetV2, beside HAQ's published plan.

    python experiments/haq_mobilenetv2/measure.py --table PATH [--seeds 3] [--evaluations 600] [--seconds S]
        [--strategies NAME ...]

Scores are a formula (formula.py): strategies are compared on them, no network is. Runs every strategy of the
configuration, or those named, and prints the table of the README; writes strategies.csv, one row per run, which keeps
the rows of strategies that are not run again, references.csv and allocation.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from contenders import contenders, run
from figure import draw
from latency import Published, load_cycles, table_path
from problem import WHOLE, Bench, make_bench, references

from search.errors import BitplanError
from search.files import replacing, write_text
from search.policy import Policy

HERE = Path(__file__).parent
PUBLISHED = "HAQ's published plan"


def described(bench: Bench, policy: Policy) -> dict[str, Any]:
    """What a policy loses and costs, with its bits averaged over layers, and layer by layer as digits."""
    weights, inputs = ([getattr(policy[n], side).bits for n in bench.network.names] for side in ("weight", "input"))
    lost = 1 - bench.evaluator.measure(policy, "selection").value
    return {
        "points_lost": round(100 * lost, 5),
        "latency_ratio": round(bench.latency_ratio(policy), 6),
        "weight_bits": round(sum(weights) / len(weights), 3),
        "input_bits": round(sum(inputs) / len(inputs), 3),
        "weights": "".join(map(str, weights)),
        "inputs": "".join(map(str, inputs)),
    }


def reference_rows(bench: Bench, published: Published, cycles: np.ndarray) -> pd.DataFrame:
    """HAQ's published plan, whose score by the formula would mean nothing, and what solvers prove."""
    haq = {"plan": PUBLISHED, **described(bench, published.policy(bench.network)), "points_lost": None}
    coded = round(published.cycles_as_coded(cycles) / int(cycles[:, -1, -1].sum()), 6)
    coded_too = {**haq, "plan": f"{PUBLISHED} as coded, input 0 at 7 bits", "latency_ratio": coded}
    proved = [{"plan": r.name, **described(bench, r.policy), "gap": round(r.gap, 6)} for r in references(bench)]
    return pd.DataFrame([haq, coded_too, *proved])


def measured_rows(bench: Bench, name: str, evaluations: int, seeds: int, seconds: float | None = None) -> pd.DataFrame:
    """One row per seed."""
    rows = []
    for seed in range(seeds):
        found = run(bench, name, evaluations, seed, seconds)
        spent = {"measured": found.measured, "proposed": found.proposed, "seconds": round(found.seconds, 2)}
        rows.append({"strategy": name, "evaluations": evaluations, "seed": seed, **spent})
        rows[-1] |= described(bench, found.best.policy)
    return pd.DataFrame(rows)


def kept_rows(path: Path, evaluations: int, without: str = "") -> pd.DataFrame:
    """The rows there are already, of other strategies and as many evaluations."""
    if not path.is_file():
        return pd.DataFrame()
    rows = pd.read_csv(path, dtype={"weights": str, "inputs": str})
    return rows[(rows.evaluations == evaluations) & (rows.strategy != without)]


def summary(rows: pd.DataFrame, plans: pd.DataFrame) -> str:
    """The table of the README: medians over seeds, of the loss with its quartiles, the best strategy first."""
    lines = [
        "| plan | measured | points lost | latency ratio | weight bits | input bits | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for plan in plans.to_dict("records"):
        lost = "" if pd.isna(plan["points_lost"]) else f"{plan['points_lost']:.3f}"
        bits = f"{plan['weight_bits']:.2f} | {plan['input_bits']:.2f}"
        within = f", proved to within {plan['gap']:.2%}" if plan["gap"] > 0 else ""
        lines.append(f"| *{plan['plan']}{within}* | | {lost} | {plan['latency_ratio']:.4f} | {bits} | |")
    grouped = rows.groupby("strategy")
    for name in grouped.points_lost.median().sort_values().index:
        group = grouped.get_group(name)
        low, middle_lost, high = group.points_lost.quantile([0.25, 0.5, 0.75])
        middle = group[["measured", "latency_ratio", "weight_bits", "input_bits", "seconds"]].median()
        bits = f"{middle.weight_bits:.2f} | {middle.input_bits:.2f}"
        shown = (
            f"{middle_lost:.3f} [{low:.3f}, {high:.3f}] | {middle.latency_ratio:.4f} | {bits} | {middle.seconds:.1f}"
        )
        lines.append(f"| {name} | {middle.measured:.0f} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="HAQ's .npy; by default in the folder BITPLAN_REFERENCE_DATA names")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=600)
    parser.add_argument("--seconds", type=float, help="of thinking for every search; by default no limit")
    parser.add_argument("--strategies", nargs="+", help="by default all of the configuration")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        cycles = load_cycles(table_path(options.table))
        names, skipped = contenders(options.strategies)
    except BitplanError as error:
        parser.error(str(error))
    bench, published = make_bench(cycles), Published.load()
    for name, reason in skipped.items():
        print(f"{name} is left out: {reason}")
    plans = reference_rows(bench, published, cycles)
    write_text(HERE / "references.csv", plans.to_csv(index=False, lineterminator="\n"))
    path, failed = HERE / "strategies.csv", []
    for name in names:
        try:
            found = measured_rows(bench, name, options.evaluations, options.seeds, options.seconds)
        except BitplanError as error:
            failed.append(f"{name} failed: {error}")
            continue
        rows = pd.concat([kept_rows(path, options.evaluations, without=name), found]).sort_values(["strategy", "seed"])
        write_text(path, rows.to_csv(index=False, lineterminator="\n"))
        print(f"{name}: {found.seconds.sum():.1f} s", flush=True)
    rows = kept_rows(path, options.evaluations)
    if len(rows):
        report(bench, rows, plans)
    if failed:
        raise SystemExit("\n".join(failed))


def report(bench: Bench, rows: pd.DataFrame, plans: pd.DataFrame) -> None:
    """Draws the figure and prints the table."""
    best = rows.sort_values("points_lost").iloc[0]
    drawn = (PUBLISHED, WHOLE)
    shown = {row["plan"]: (row["weights"], row["inputs"]) for row in plans.to_dict("records") if row["plan"] in drawn}
    shown[f"best found, by {best.strategy}"] = (best.weights, best.inputs)
    with replacing(HERE / "allocation.png") as aside:
        aside.write_bytes(draw(bench.network, shown))
    print(summary(rows, plans))


if __name__ == "__main__":
    main()
