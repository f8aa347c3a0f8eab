"""HAQ's latency table of MobileNetV2 from a model of a bit-serial array.

    python -m experiments.cost_models.haq [--table PATH]

Writes errors.csv, uniform.csv, plans.csv, numbers.csv and laws.png, and prints the tables of the README.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from experiments.cost_models.haq.figure import COLOURS, draw
from experiments.cost_models.haq.laws import PARAMETERS, fitting_range, kind_of, predictions
from experiments.cost_models.haq.plans import RATIO, Planner
from experiments.haq_mobilenetv2.latency import load_cycles, table_path
from experiments.haq_mobilenetv2.mobilenetv2 import mobilenetv2
from hwmodels import Network
from hwmodels.bitserial import BitSerial
from search.errors import BitplanError
from search.files import replacing, write_text

HERE = Path(__file__).parent
ALL = "all"
POLICIES = 2000
VECTOR_BYTES = 32
"""What buffers are counted in: 256 bits."""


def error_table(cycles: np.ndarray, predicted: dict[str, np.ndarray], kinds: list[str]) -> pd.DataFrame:
    """A row per law and kind of layer: entries that are met exactly, and errors |predicted / table - 1| of all."""
    rows = []
    for law, found in predicted.items():
        for kind in (ALL, *COLOURS):
            mine = [index for index, one in enumerate(kinds) if kind in (ALL, one)]
            off = np.abs(found[mine] / cycles[mine] - 1)
            rows.append(
                {
                    "law": law,
                    "kind": kind,
                    "layers": len(mine),
                    "entries": off.size,
                    "exact": int((found[mine] == cycles[mine]).sum()),
                    "median": float(np.median(off)),
                    "p90": float(np.percentile(off, 90)),
                    "max": float(off.max()),
                }
            )
    return pd.DataFrame(rows)


def uniform_table(cycles: np.ndarray, predicted: dict[str, np.ndarray]) -> pd.DataFrame:
    """A row per number of bits: cycles of all layers, by the table and by each law."""
    named = {"table": cycles} | predicted
    columns = {name: found[:, range(8), range(8)].sum(0) for name, found in named.items()}
    return pd.DataFrame({"bits": range(1, 9)} | columns)


def plan_table(network: Network, cycles: np.ndarray, predicted: dict[str, np.ndarray]) -> pd.DataFrame:
    """A row per law: rank correlation over random policies, and the plan it leads to for a ratio of 0.6."""
    planner = Planner(network, cycles)
    best = planner.plan(cycles, RATIO)
    bits = np.random.default_rng(0).integers(1, 8, (POLICIES, 2, len(network)))  # indices of 2 to 8 bits

    def totals(found: np.ndarray) -> np.ndarray:
        summed: np.ndarray = found[np.arange(len(network)), bits[:, 0], bits[:, 1]].sum(1)
        return summed

    rows = []
    for law, found in predicted.items():
        planned, moved = planner.plan(found, RATIO), planner.plan_within(found, RATIO)
        rows.append(
            {
                "law": law,
                "rank_correlation": float(spearmanr(totals(found), totals(cycles)).statistic),
                "promised_ratio": planned.promised_ratio,
                "true_ratio": planned.true_ratio,
                "loss": planned.loss,
                "loss_within_budget": moved.loss,
                "ratio_within_budget": moved.true_ratio,
                "regret": moved.loss / best.loss - 1,
            }
        )
    return pd.DataFrame(rows)


def number_table(network: Network, cycles: np.ndarray) -> pd.DataFrame:
    """A row per number of the array: what it is, and between what it can lie for every entry to be met."""
    array = BitSerial("haq").array
    rows = []
    for name in PARAMETERS:
        low, high = fitting_range(network, cycles, name, VECTOR_BYTES if name.endswith("buffer") else 1)
        given = getattr(array, name)
        unit = "bytes" if given.unit == "byte" else ""
        rows.append({"number": name, "value": given.value, "unit": unit, "least": low, "most": high})
    return pd.DataFrame(rows)


def summary(errors: pd.DataFrame, uniform: pd.DataFrame, plans: pd.DataFrame, numbers: pd.DataFrame) -> str:
    """The tables of the README."""
    laws = list(dict.fromkeys(errors["law"]))
    lines = [f"| layers | entries | {' | '.join(laws)} |", "|" + "---|" * (2 + len(laws))]
    for kind, mine in errors.groupby("kind", sort=False):
        cells = [f"{row.median:.1%}, {row.p90:.1%}, {row.max:.1%}" for row in mine.itertuples()]
        lines.append(f"| {kind} | {mine.entries.iloc[0]:,} | {' | '.join(cells)} |")
    exact = errors[errors["kind"] == ALL]["exact"]
    lines.append(f"| entries met exactly | | {' | '.join(f'{count:,}' for count in exact)} |")
    lines += ["", f"| bits | {' | '.join(uniform.columns[1:])} |", "|" + "---|" * len(uniform.columns)]
    for row in uniform.itertuples(index=False):
        lines.append(f"| {row[0]} | {' | '.join(f'{value / 1e6:.2f}' for value in row[1:])} |")
    lines += ["", "| law | rank correlation | promised | true | loss above the optimum |", "|" + "---|" * 5]
    for plan in plans.itertuples():
        shares = f"{plan.promised_ratio:.4f} | {plan.true_ratio:.4f}"
        lines.append(f"| {plan.law} | {plan.rank_correlation:.4f} | {shares} | {plan.regret:.2%} |")
    lines += ["", "| number | value | least | most |", "|" + "---|" * 4]
    for number in numbers.itertuples():
        ends = f"{number.least:,.0f} | {'any' if np.isinf(number.most) else f'{number.most:,.0f}'}"
        lines.append(f"| {number.number} | {number.value:,.0f} {number.unit} | {ends} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="HAQ's .npy; by default in the folder BITPLAN_REFERENCE_DATA names")
    options = parser.parse_args()
    try:
        cycles = load_cycles(table_path(options.table))
    except BitplanError as error:
        parser.error(str(error))
    network = mobilenetv2()
    kinds = [kind_of(layer) for layer in network]
    predicted = predictions(network, cycles)
    errors, uniform = error_table(cycles, predicted, kinds), uniform_table(cycles, predicted)
    plans, numbers = plan_table(network, cycles, predicted), number_table(network, cycles)
    for name, table in {"errors": errors, "uniform": uniform, "plans": plans, "numbers": numbers}.items():
        write_text(HERE / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))
    with replacing(HERE / "laws.png") as aside:
        aside.write_bytes(draw(cycles, predicted, kinds))
    print(summary(errors, uniform, plans, numbers))


if __name__ == "__main__":
    main()
